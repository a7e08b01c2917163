"""A checkpoint of a factorized model loads into a freshly built one, which is factorized and reshaped first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.surgery.checkpoint import register_reshape_before_load

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
RANKS: dict[str, Any] = {"0": ("spatial", 4), "2": ("tucker", (5, 6)), "5": 3}


def network(width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


def narrowed() -> nn.Sequential:
    """Factorized, then one width and one rank cut."""
    model = network()
    evolvenet.factorize(model, RANKS)
    graph = evolvenet.trace(model, X)
    evolvenet.resize(
        model, graph, {"0.1": evolvenet.IndexMap.keep(range(9), 12), "5.0": evolvenet.IndexMap.keep([0, 2], 3)}
    )
    return model


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = network(), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def test_load_factorizes_a_fresh_model(tmp_path: Path) -> None:
    model = narrowed()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for fresh in (network(), network(20), narrowed()):
        evolvenet.load(fresh, tmp_path / "weights.pt")
        torch.testing.assert_close(fresh(X), model(X), rtol=0, atol=0)
        assert [fresh[place].ranks for place in (0, 2, 5)] == [(4,), (5, 6), (2,)]
        assert evolvenet.merge(fresh) == ("0", "2", "5")


def test_load_finds_the_network_in_a_lightning_checkpoint(tmp_path: Path) -> None:
    whole = Module()
    evolvenet.factorize(whole.net, RANKS)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "run.ckpt")
    fresh = evolvenet.load(network(), tmp_path / "run.ckpt")
    torch.testing.assert_close(fresh(X), whole.net(X), rtol=0, atol=0)


def test_load_state_dict_factorizes_a_model_that_has_the_hook() -> None:
    model = narrowed()
    fresh = network()
    register_reshape_before_load(fresh)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(X), model(X), rtol=0, atol=0)


def test_a_checkpoint_with_whole_layers_merges_them_first(tmp_path: Path) -> None:
    whole, model = network(), narrowed()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    evolvenet.load(model, tmp_path / "weights.pt")
    assert repr(model) == repr(whole)
    torch.testing.assert_close(model(X), whole(X), rtol=0, atol=0)


def test_another_kind_takes_the_place_of_the_present_one(tmp_path: Path) -> None:
    one, two = network(), network()
    evolvenet.factorize(one, {"2": ("cp", 5)})
    evolvenet.factorize(two, {"2": ("tensor_train", 3), "5": 2})
    torch.save(two.state_dict(), tmp_path / "weights.pt")
    evolvenet.load(one, tmp_path / "weights.pt")
    assert repr(one) == repr(two)
    torch.testing.assert_close(one(X), two(X), rtol=0, atol=0)


def test_lightning_loads_a_factorized_checkpoint_by_itself(tmp_path: Path) -> None:
    evolvenet.WidthEvolution  # noqa: B018  its import lets Lightning load checkpoints of other shapes
    whole = Module()
    evolvenet.factorize(whole, {f"net.{name}": rank for name, rank in RANKS.items()})
    trainer = lightning.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(whole)
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    fresh = Module.load_from_checkpoint(tmp_path / "run.ckpt")
    torch.testing.assert_close(fresh(X), whole(X), rtol=0, atol=0)


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Flatten(), nn.Linear(192, 10))])
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(other: nn.Module, tmp_path: Path) -> None:
    torch.save(narrowed().state_dict(), tmp_path / "weights.pt")
    before = repr(other)
    with pytest.raises(evolvenet.RecordError, match="another model"):
        evolvenet.load(other, tmp_path / "weights.pt")
    assert repr(other) == before
