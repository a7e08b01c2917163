"""Lightning runs in which layers become chains: resumed to the last bit, loaded, tested, with averages of the weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

import evolvenet
from evolvenet import Budget, Front, Tolerance, WidthEvolution
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.measurement.cost import parameters
from tests.helpers.resuming import Randomness, assert_same
from tests.helpers.runs import Batches, Classifier, trainer

MOST = 550


class Flat(Classifier):
    """Hidden layers of a low rank, so that chains are the better cut."""

    def __init__(self) -> None:
        super().__init__(width=24)
        weight = self.net[4].weight
        assert isinstance(weight, nn.Parameter)
        u, s, v = torch.linalg.svd(weight.data)
        s[4:] *= 1e-2
        weight.data = 2 * u @ torch.diag(s) @ v

    def train_dataloader(self) -> Batches:
        return Batches()


def built() -> Flat:
    torch.manual_seed(5)
    return Flat()


def fit(
    folder: Path, policy: Any, callbacks: Any = (), ckpt: Path | None = None, **options: Any
) -> tuple[Flat, WidthEvolution]:
    model = built()
    evolution = WidthEvolution(policy, every_n_steps=5, calibration_batches=3, stop=1.0)
    torch.manual_seed(11)
    fitting = trainer(folder, [Randomness(), evolution, *callbacks], **options)
    fitting.fit(model, Batches(), ckpt_path=ckpt, weights_only=True)
    return model, evolution


def chains(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, FactoredLayer)]


def state_of(model: Flat) -> dict[str, Any]:
    optimizer = model.trainer.optimizers[0]
    return {"weights": dict(model.state_dict()), "optimizer": optimizer.state_dict()["state"]}


def record_of(evolution: WidthEvolution) -> list[Any]:
    assert evolution.history is not None
    return [(e.step, e.changes, e.sizes, e.parameters, e.skipped) for e in evolution.history.events]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path: Path) -> None:
    policy = Budget(params=MOST, by=0.7, lowrank=True)
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, evolution = fit(tmp_path, policy, [keeper, EMAWeightAveraging(decay=0.9)])
    record = record_of(evolution)
    assert all(skipped is None for *_, skipped in record)
    made = [step for step, changes, *_ in record if any("factorized" in change.reason for change in changes)]
    assert made
    assert chains(whole)
    assert parameters(whole) <= MOST
    for step in (made[0] - 1, made[0], made[0] + 1, made[-1] + 2):
        resumed, other = fit(tmp_path, policy, [EMAWeightAveraging(decay=0.9)], tmp_path / f"step={step}.ckpt")
        assert_same(state_of(resumed), state_of(whole))
        assert_same(record_of(other), record)


def test_checkpoints_with_chains_are_loaded_and_tested(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="last")
    model, _ = fit(tmp_path, Budget(params=MOST, by=0.7, lowrank=True), [keeper])
    made = chains(model)
    assert made
    x = torch.randn(8, 6)
    with torch.no_grad():
        outputs = model.eval()(x)
    evolvenet.save(model, tmp_path / "net.pt")
    loaded = evolvenet.load(built(), tmp_path / "net.pt")
    (path,) = tmp_path.glob("last*.ckpt")
    from_checkpoint = Flat.load_from_checkpoint(path)
    for each in (loaded, from_checkpoint):
        assert chains(each) == made
        with torch.no_grad():
            assert torch.equal(each.eval()(x), outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = model.trainer.test(model, Batches(1), ckpt_path="best", weights_only=True)
    assert result["test/loss"] > 0


def test_an_average_of_the_weights_ends_with_the_chains(tmp_path: Path) -> None:
    model, evolution = fit(tmp_path, Budget(params=MOST, by=0.5, lowrank=True), [EMAWeightAveraging(decay=0.5)])
    assert all(skipped is None for *_, skipped in record_of(evolution))
    assert chains(model)
    assert parameters(model) <= MOST
    assert bool(model(torch.randn(4, 6)).isfinite().all())


def test_a_front_makes_chains_for_its_points(tmp_path: Path) -> None:
    points = [Budget(params=params, by=0.6, lowrank=True) for params in (700, 450)]
    model, evolution = fit(tmp_path, Front(points=points))
    assert all(skipped is None for *_, skipped in record_of(evolution))
    assert any("factorized" in change.reason for _, changes, *_ in record_of(evolution) for change in changes)
    assert parameters(model) <= 450


class Judged(Flat):
    """Its validation metric falls after the first epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", 0.9 if self.current_epoch in (0, 3) else 0.5)

    def val_dataloader(self) -> Batches:
        return Batches(1)


@pytest.mark.parametrize("at", [None, 10, 15])
def test_a_cut_that_made_chains_is_taken_back_also_after_a_resume(at: int | None, tmp_path: Path) -> None:
    def go(ckpt: Path | None, *callbacks: Any) -> tuple[Judged, WidthEvolution]:
        torch.manual_seed(5)
        model = Judged()
        policy = Tolerance(metric="val/acc", drop=0.01, share=0.4, validations=1, lowrank=True)
        evolution = WidthEvolution(policy, every_n_epochs=1, calibration_batches=3, stop=1.0)
        torch.manual_seed(11)
        fitting = trainer(tmp_path, [Randomness(), evolution, *callbacks], max_epochs=4)
        fitting.fit(model, ckpt_path=ckpt, weights_only=True)
        return model, evolution

    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, evolution = go(None, keeper)
    record = record_of(evolution)
    assert all(skipped is None for *_, skipped in record)
    assert any("factorized" in change.reason for _, changes, *_ in record for change in changes)
    back = [change for _, changes, *_ in record for change in changes if "taken back" in change.reason]
    assert any(change.width.endswith(".0") and change.width.count(".") == 2 for change in back)
    if at is not None:
        resumed, other = go(tmp_path / f"step={at}.ckpt")
        assert_same(state_of(resumed), state_of(whole))
        assert_same(record_of(other), record)


class Anchored(Flat):
    """Keeps a bare copy of one weight, as a penalty of elastic weights does."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = {"net.4.weight": self.net[4].get_parameter("weight").detach().clone()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weight = self.net[4].get_parameter("weight")
        return super().training_step(batch, batch_idx) + (weight - self.anchor["net.4.weight"]).square().sum()


def test_a_layer_of_which_the_module_keeps_a_copy_stays_whole(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Anchored()
    evolution = WidthEvolution(
        Budget(params=300, by=0.5, lowrank=True), every_n_steps=5, calibration_batches=3, stop=1.0
    )
    trainer(tmp_path, [evolution]).fit(model, Batches())
    assert "net.4" not in chains(model)
    assert all(skipped is None for *_, skipped in record_of(evolution))
