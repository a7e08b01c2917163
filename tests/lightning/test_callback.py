"""`WidthEvolution` inside real `Trainer.fit` runs on plain LightningModules."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import evolvenet
from evolvenet import PolicyError, Threshold, UnsupportedStrategyError, WidthEvolution
from tests.helpers.policies import Fixed
from tests.helpers.runs import trainer


class Plain(lightning.LightningModule):
    """Knows nothing of EvolveNet."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class DeepSpeedLike(DDPStrategy):
    """What a strategy is that derives from DDP and shards: DeepSpeed's, which is not installed here."""


class CallsItsChild(Plain):
    """Calls the network, not itself: forward is never run as a module."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


class CallsNothing(Plain):
    """Hides every module call."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net.forward(x), y)


class Manual(Plain):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(x), y))
        optimizer.step()


def loader(count: int = 160) -> DataLoader:
    x = torch.randn(count, 6)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=16)


@pytest.mark.parametrize("kind", [Plain, CallsItsChild, Manual])
def test_widths_change_while_training(
    kind: Callable[[], Plain], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = kind()
    prefix = "" if kind is CallsItsChild else "net."
    evolution = WidthEvolution(Fixed({f"{prefix}0": 9, f"{prefix}2": 30}), every_n_epochs=1)
    with caplog.at_level(logging.DEBUG, logger="evolvenet"):
        trainer(tmp_path, [evolution]).fit(model, loader())
    assert (model.net[0].out_features, model.net[2].out_features) == (9, 30)
    assert f"step 14: {prefix}0 32 → 9: fixed" in caplog.text
    assert evolution.history is not None
    assert [event.step for event in evolution.history.events] == [14, 24]
    assert not model._forward_pre_hooks
    assert not model.net._forward_pre_hooks


def test_the_default_is_every_epoch_with_a_real_policy(tmp_path: Path) -> None:
    model = Plain()
    evolution = WidthEvolution(policy=Threshold(prune=0.02, grow=0.95), stop=1.0)
    trainer(tmp_path, [evolution]).fit(model, loader())
    assert evolution.history is not None
    assert evolution.history.events[-1].parameters < evolution.history.initial.parameters


def test_every_n_steps_start_step_and_stop(tmp_path: Path) -> None:
    evolution = WidthEvolution(Fixed({}), every_n_steps=4, start_step=7, stop=0.6)
    trainer(tmp_path, [evolution]).fit(Plain(), loader())
    assert evolution.history is not None
    assert [event.step for event in evolution.history.events] == [12, 16, 20]


def test_events_wait_for_the_accumulation_boundary(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if evolution.history and len(evolution.history.events) > len(seen):
                seen.append(batch_idx % 5 == 0)

    evolution = WidthEvolution(Fixed({"net.0": 9}), every_n_steps=1, stop=1.0)
    trainer(tmp_path, [evolution, Watch()], accumulate_grad_batches=5).fit(Plain(), loader())
    assert len(seen) == 4
    assert all(seen)


def test_decisions_are_made_on_training_batches_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    observe = evolvenet.Evolver.observe

    def watch(self: evolvenet.Evolver, batch: Any, *given: Any, **options: Any) -> None:
        seen.append(float(batch.abs().max()))
        observe(self, batch, *given, **options)

    monkeypatch.setattr(evolvenet.Evolver, "observe", watch)

    class Marked(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(torch.full((4, 6), 1e6))

    evolution = WidthEvolution(Fixed({}), every_n_epochs=1)
    trainer(tmp_path, [evolution]).fit(Marked(), loader(), loader(32))
    assert len(seen) == 8
    assert all(largest < 100 for largest in seen)


def test_best_checkpoint_and_resume_take_their_own_widths(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{epoch}")
    model = Plain()
    evolution = WidthEvolution(Fixed({"net.0": 9}), every_n_epochs=1, stop=1.0)
    fitting = trainer(tmp_path, [evolution, keeper])
    fitting.fit(model, loader(), loader(32))
    wide, narrow = tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"
    fitting.test(model, loader(32), ckpt_path=str(wide), verbose=False, weights_only=True)
    assert model.net[0].out_features == 32
    fitting.test(model, loader(32), ckpt_path=str(narrow), verbose=False, weights_only=True)
    assert model.net[0].out_features == 9

    fresh = Plain()
    again = WidthEvolution(Fixed({"net.0": 9}), every_n_epochs=1, stop=1.0)
    trainer(tmp_path, [again], max_epochs=4).fit(fresh, loader(), ckpt_path=str(narrow), weights_only=True)
    assert fresh.net[0].out_features == 9
    assert again.history is not None
    assert [event.step for event in again.history.events] == [14, 24, 34]

    loaded = evolvenet.load(Plain(), narrow)
    assert loaded.get_submodule("net.0").out_features == 9
    network = evolvenet.load(Plain().net, narrow)
    assert network.get_submodule("0").out_features == 9


def test_the_model_pickles_and_copies_afterwards(tmp_path: Path) -> None:
    model = Plain()
    trainer(tmp_path, [WidthEvolution(Fixed({"net.0": 9}))]).fit(model, loader())
    model.trainer = None
    copied, unpickled = deepcopy(model), pickle.loads(pickle.dumps(model))
    inputs = torch.randn(2, 6)
    assert torch.equal(copied(inputs), model(inputs))
    assert torch.equal(unpickled(inputs), model(inputs))


def test_nan_weights_at_an_event_are_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
            if trainer.global_step == 12:
                pl_module.net[0].weight.data[0, 0] = float("nan")

    evolution = WidthEvolution(Fixed({"net.0": 9}), every_n_epochs=1)
    fitting = trainer(tmp_path, [evolution, Breaks()])
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        fitting.fit(Plain(), loader())
    assert fitting.global_step == 30
    assert "NaN" in caplog.text
    assert evolution.history is not None
    assert evolution.history.events[0].skipped


def test_a_training_step_without_module_calls_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, [evolution := WidthEvolution(Fixed({}))]).fit(CallsNothing(), loader())
    assert evolution.evolver is None
    assert "Call the network as a module" in caplog.text


def test_example_inputs_can_be_given(tmp_path: Path) -> None:
    evolution = WidthEvolution(Fixed({"net.0": 9}), example_inputs=torch.zeros(2, 6))
    model = Plain()
    trainer(tmp_path, [evolution]).fit(model, loader())
    assert model.net[0].out_features == 9


def test_a_model_without_a_width_goes_on_with_a_warning_that_gives_the_reasons(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Plain()
    model.net = nn.Sequential(nn.Linear(6, 3))
    trainer(tmp_path, [WidthEvolution(Fixed({}))]).fit(model, loader())
    assert "No width of Plain can be resized: net.0: " in caplog.text


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedLike])
def test_strategies_that_shard_are_refused_before_training(kind: type) -> None:
    """Lightning itself refuses some of them on a CPU, so the callback is asked directly."""
    strategy = object.__new__(kind)
    model = Plain()
    with pytest.raises(UnsupportedStrategyError, match=rf"got {kind.__name__}.*devices=1.*evolvenet.load"):
        WidthEvolution(Fixed({})).setup(SimpleNamespace(strategy=strategy, callbacks=[]), model, "fit")  # type: ignore[arg-type]
    assert not model._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 1}, "got both"),
        ({"every_n_steps": 0}, "every_n_steps of 1 or more"),
        ({"stop": 1.5}, "0 … 1"),
        ({"calibration_batches": 0}, "calibration_batches"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        WidthEvolution(Fixed({}), **options)
