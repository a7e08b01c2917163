"""`Evolver` where neither Lightning nor transformers can be imported, and the edges that come only when asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import evolvenet
from tests.helpers.interpreters import BROKEN, fake_torchvision, run_script

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
EDGES = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "transformers", "accelerate"}
LOOP = """
import torch
import evolvenet
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters())
evolver = evolvenet.Evolver(model, optimizer, evolvenet.Threshold(prune=0.01, grow=0.9), torch.zeros(1, 4))
for step in range(4):
    batch = torch.randn(256, 4)
    evolver.observe(batch)
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
    if step == 1:
        event = evolver.step(at=step)
print(event.skipped, model[0].out_features < 64, evolver.history.events == [event])
"""


def test_a_plain_loop_needs_no_trainer_library_and_mends_torchvision(tmp_path: Path) -> None:
    ending = f"print({EDGES!r} & set(sys.modules))\nimport torchvision\nprint(torchvision.Image.__name__)"
    lines = run_script(BLOCK.format(names=EDGES) + LOOP + ending, fake_torchvision(tmp_path, BROKEN))
    assert lines == ["None True True", "set()", "run", "part", "run", "part", "Image"]


def test_a_plain_loop_imports_no_trainer_library_that_is_there() -> None:
    lines = run_script(LOOP + f"import sys\nprint({EDGES | {'torchvision'}!r} & set(sys.modules))")
    assert lines == ["None True True", "set()"]


def test_a_missing_library_is_named_when_its_edge_is_asked_for() -> None:
    lines = run_script(
        BLOCK.format(names=EDGES) + "import evolvenet\n"
        "try:\n evolvenet.transformers\n"
        "except evolvenet.MissingPackageError as error:\n print(isinstance(error, ImportError), error)\n"
        "try:\n from evolvenet import WidthEvolution\n"
        "except ModuleNotFoundError as error:\n print(error)\n"
    )
    remedy = "evolvenet.transformers: expected the transformers library, got No module named 'transformers'. Install it"
    assert lines == [f"True {remedy} with pip install transformers accelerate.", "No module named 'lightning'"]


def test_the_edges_come_when_asked_for() -> None:
    from evolvenet import WidthEvolution
    from evolvenet.lightning.callback import WidthEvolution as Direct

    assert WidthEvolution is evolvenet.WidthEvolution is Direct
    assert evolvenet.transformers is import_module("evolvenet.transformers")
    assert "WidthEvolution" in dir(evolvenet)
    assert set(evolvenet.__all__) <= set(dir(evolvenet))
    with pytest.raises(AttributeError, match="no attribute 'Widht'"):
        _ = evolvenet.Widht  # type: ignore[attr-defined]


def test_a_loop_that_trains_several_networks_gives_its_loss_as_a_function_of_the_batch() -> None:
    torch.manual_seed(0)
    nets = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4)),
            "decoder": nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 8)),
        }
    )
    optimizer = torch.optim.Adam(nets.parameters(), 1e-2)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return (nets["decoder"](nets["encoder"](batch)) - batch).square().mean()

    batches = torch.randn(256, 2) @ torch.randn(2, 8)
    evolver = evolvenet.Evolver(nets, optimizer, evolvenet.Threshold(prune=0.2, grow=1.0), batches[:2], step=loss_of)
    assert set(evolver.graph.sizes) == {"encoder.0", "encoder.2", "decoder.0"}
    for step in range(40):
        batch = batches[torch.randint(0, 256, (64,))]
        evolver.observe(batch)
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
        if step % 10 == 9:
            assert evolver.step().skipped is None
    assert evolver.graph.sizes["encoder.0"] < 48
    assert evolver.graph.sizes["encoder.2"] < 4
    assert float(loss_of(batches)) < float(batches.square().mean())
