"""The control by Torch-Pruning, but for Torch-Pruning itself: that is in the environment of the comparisons alone.

What it cuts, and the run it does so in, is tested there (tests/experiments/compare_torch_pruning.py).
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from evolvenet import Budget, Front, IndexMap, resize, trace
from experiments.models.resnet import UnpaddedResNet
from experiments.training.controls import ControlError
from experiments.training.jobs import readable_errors
from experiments.training.torch_pruning import TorchPruning, renew, sizes_of
from tests.helpers.experiments import configuration

EXAMPLE = torch.zeros(1, 1, 28, 28)


def config(experiment: str) -> dict:
    return OmegaConf.to_container(configuration(f"+experiment={experiment}"), resolve=True)  # type: ignore[return-value]


def test_the_control_differs_in_the_pruner_alone() -> None:
    ours, theirs = config("mnist_resnet"), config("mnist_torch_pruning")
    assert theirs["evolve"].pop("_target_") == "experiments.training.torch_pruning.TorchPruning"
    assert ours["evolve"].pop("_target_") == "evolvenet.WidthEvolution"
    assert theirs.pop("title") != ours.pop("title")
    assert theirs == ours


def test_uniform_widths_are_trained_like_a_points_widths() -> None:
    scratch, uniform = config("mnist_scratch"), config("mnist_uniform")
    front = config("mnist_resnet")
    assert uniform["model"].keys() == front["model"].keys()
    assert uniform["model"]["_target_"] == front["model"]["_target_"]
    assert scratch["model"]["model"] == config("mnist_short")["model"], "from scratch: the same network"
    for each in (scratch, uniform):
        del each["title"], each["model"], each["classifier"]["model"]
    assert uniform == scratch


def test_without_the_package_the_run_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # as where it is not installed
    with pytest.raises(SystemExit) as caught, readable_errors():
        instantiate(config("mnist_torch_pruning")["evolve"])
    message = str(caught.value)
    assert message.startswith("error: Torch-Pruning: expected the package torch_pruning")
    assert "make compare-install" in message
    assert "\n" not in message


def test_budgets_of_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", SimpleNamespace())
    with pytest.raises(ControlError, match="expected budgets of params, got macs"):
        TorchPruning(Front([Budget(macs=1000)]), every_n_steps=2)


def test_a_renewed_optimizer_has_new_parameters_no_state_and_its_schedule() -> None:
    old, new = nn.Linear(4, 3), nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(old.parameters(), lr=0.1, weight_decay=0.5)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(model: nn.Module) -> None:
        optimizer.zero_grad()
        model(torch.ones(5, 4)).square().mean().backward()
        optimizer.step()
        schedule.step()

    step(old)
    renew(optimizer, new.parameters())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.05
    reference = nn.Linear(4, 2)
    reference.load_state_dict(new.state_dict())
    before = [parameter.clone() for parameter in old.parameters()]
    step(new)
    assert schedule.get_last_lr() == [0.1 / 3]
    assert all(torch.equal(*pair) for pair in zip(old.parameters(), before, strict=True))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.5)
    schedule = LambdaLR(optimizer, lambda step: 1)
    step(reference)
    assert all(torch.equal(*pair) for pair in zip(new.parameters(), reference.parameters(), strict=True))


def test_sizes_have_the_names_of_the_unpruned_network() -> None:
    model = UnpaddedResNet(width=6, inside=(8, 9))
    graph = trace(model, EXAMPLE)
    assert sizes_of(model, graph) == graph.sizes == {"stem": 6, "blocks.0.pointwise1": 8, "blocks.1.pointwise1": 9}
    cut = resize(model, graph, {"stem": IndexMap.keep(range(3), 6), "blocks.1.pointwise1": IndexMap.keep(range(5), 9)})
    assert sizes_of(model, graph) == cut.sizes
