"""Other callbacks, loggers, compiled modules and tuners, each with evolution on."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evolvenet import WidthEvolution
from tests.helpers.policies import Walk
from tests.helpers.runs import Batches, Classifier, batch, fresh, trainer

SIZES = ((9, 16), (9, 20), (12, 7))


def evolution(**options: Any) -> WidthEvolution:
    settings: dict[str, Any] = {"every_n_steps": 5, "calibration_batches": 2, "stop": 1.0, **options}
    return WidthEvolution(Walk(*SIZES), **settings)


def evolved(callback: WidthEvolution) -> None:
    """Every event did what it was asked to."""
    assert callback.history is not None
    assert [event.skipped for event in callback.history.events] == [None] * len(callback.history.events)
    assert len(callback.history.events) >= 3
    assert all(event.changes for event in callback.history.events)


def loss(model: nn.Module) -> float:
    """On batches that no training saw."""
    model.eval()
    with torch.no_grad():
        parts = [nn.functional.cross_entropy(model(x), y) for x, y in map(batch, range(1000, 1010))]
    return float(torch.stack(parts).mean())


@pytest.mark.parametrize("first", [True, False], ids=["evolution first", "evolution last"])
@pytest.mark.parametrize("kind", ["weights", "ema", "swa"])
def test_averages_of_weights_go_along(kind: str, first: bool, tmp_path: Path) -> None:
    averaging: Any = {
        "weights": lambda: WeightAveraging(),
        "ema": lambda: EMAWeightAveraging(decay=0.8),
        "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2),
    }[kind]()
    callback, model = evolution(), fresh()
    order = [callback, averaging] if first else [averaging, callback]
    trainer(tmp_path, order, max_epochs=4).fit(model, Batches(), Batches(2))
    evolved(callback)
    shapes = [parameter.shape for parameter in model.parameters()]
    kept = averaging._average_model
    kept = kept.module if hasattr(kept, "module") else kept
    assert [parameter.shape for parameter in kept.parameters()] == shapes
    assert loss(model) < 1.0


def test_a_cut_average_is_as_good_as_before(tmp_path: Path) -> None:
    """What it answers right after an event, compared with a bare cut of it: validation runs on the average."""
    seen: list[tuple[float, float]] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
            average = averaging._average_model
            if average is not None and trainer.global_step:
                seen.append((trainer.global_step, loss(average.module)))
                average.train()

    averaging, callback = EMAWeightAveraging(decay=0.9), evolution(every_n_steps=10, start_step=20)
    # Watch looks before and after the event's own hook.
    trainer(tmp_path, [averaging, Watch(), callback, Watch()], max_epochs=4).fit(fresh(), Batches(), Batches(2))
    assert callback.history is not None
    for event in callback.history.events:
        before, after = (value for step, value in seen if step == event.step)
        assert abs(after - before) < 0.15
        assert after != before


class Unlogged(Classifier):
    """Dynamo cannot compile Lightning's `log`, with or without evolution."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)


@pytest.mark.parametrize("where", ["module", "network"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules(where: str, backend: str, tmp_path: Path) -> None:
    callback, model = evolution(), Unlogged()
    if where == "network":
        model.net = torch.compile(model.net, backend=backend, fullgraph=True)  # type: ignore[assignment]
    whole: Any = torch.compile(model, backend=backend) if where == "module" else model
    trainer(tmp_path, [callback], max_epochs=3).fit(whole, Batches())
    evolved(callback)


def test_a_compiled_network_stays_compiled_over_many_widths(tmp_path: Path) -> None:
    """After eight shapes dynamo would give up on it for good."""
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    sizes = [(12 - k % 3, 8 + k) for k in range(14)]
    callback, model = WidthEvolution(Walk(*sizes), every_n_steps=2, calibration_batches=1, stop=1.0), fresh()
    model.net = torch.compile(model.net, backend=backend, fullgraph=True)  # type: ignore[assignment]
    trainer(tmp_path, [callback], max_epochs=4).fit(model, Batches())
    assert callback.history is not None
    events = sum(bool(event.changes) for event in callback.history.events)
    assert events > 10
    assert len(compiled) > events


def test_loggers_get_widths_parameters_macs_and_energies(tmp_path: Path) -> None:
    callback, model = evolution(), fresh()
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    trainer(tmp_path, [callback], logger=loggers).fit(model, Batches())
    evolved(callback)
    assert callback.history is not None
    rows = list(csv.DictReader(Path(loggers[0].log_dir, "metrics.csv").read_text(encoding="utf-8").splitlines()))
    board = EventAccumulator(loggers[1].log_dir)
    board.Reload()
    for event in callback.history.events:
        expected = {
            "evolve/parameters": event.parameters,
            "evolve/macs": event.macs,
            **{f"evolve/size/{name}": size for name, size in event.sizes.items()},
            **{f"evolve/effective_rank/{name}": rank for name, rank in event.effective_rank.items()},
            **{f"evolve/kept_energy/{name}": share for name, share in event.kept_energy.items()},
        }
        assert len(expected) == 2 + 3 * 2
        at = [row for row in rows if row["step"] == str(event.step)]
        for name, value in expected.items():
            assert any(row[name] and float(row[name]) == pytest.approx(value) for row in at), name
            values = [scalar.value for scalar in board.Scalars(name) if scalar.step == event.step]
            assert values[-1:] == [pytest.approx(value, rel=1e-6)], name


def test_many_callbacks_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, model = evolution(), fresh()
    others = [
        ModelSummary(max_depth=-1),
        RichModelSummary(),
        EarlyStopping("val/loss", patience=20),
        LearningRateMonitor(),
        DeviceStatsMonitor(),
        Timer(),
        OnExceptionCheckpoint(tmp_path),
        GradientAccumulationScheduler({0: 1, 2: 2}),
        TQDMProgressBar(),
        ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True),
    ]
    run = trainer(
        tmp_path, [*others[:5], callback, *others[5:]], logger=CSVLogger(tmp_path), max_epochs=4,
        enable_progress_bar=True, enable_model_summary=True,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        run.fit(model, Batches(), Batches(2))
    evolved(callback)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    best = others[-1].best_model_path  # type: ignore[union-attr]
    run.test(model, Batches(2), ckpt_path=best, verbose=False, weights_only=True)


def test_the_rich_progress_bar(tmp_path: Path) -> None:
    callback = evolution()
    trainer(tmp_path, [RichProgressBar(), callback], enable_progress_bar=True).fit(fresh(), Batches())
    evolved(callback)


def test_early_stopping_stops(tmp_path: Path) -> None:
    callback = evolution()
    run = trainer(tmp_path, [callback, EarlyStopping("val/loss", patience=1, min_delta=10.0)], max_epochs=20)
    run.fit(fresh(), Batches(), Batches(2))
    assert run.current_epoch == 2
    assert callback.history is not None
    assert callback.history.events[0].changes


class Sized(Classifier):
    """Has what the finders look for."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-3, 32

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        parts = [batch(index) for index in range(16)]
        x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)


@pytest.mark.parametrize("kind", ["rate", "batch size"])
def test_finders(kind: str, tmp_path: Path) -> None:
    """They train, throw it away and restore a checkpoint before the run: evolution begins with the run."""
    finder: Any = (
        LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        if kind == "rate"
        else BatchSizeFinder(mode="power", steps_per_trial=2, init_val=32, max_trials=2)
    )
    torch.manual_seed(0)
    callback, model = evolution(), Sized()
    run = trainer(tmp_path, [callback, finder], max_epochs=6, enable_checkpointing=False)
    run.fit(model, val_dataloaders=Batches(2))
    evolved(callback)
    assert callback.history is not None
    assert callback.history.initial.step == 0
    assert (model.lr != 1e-3) if kind == "rate" else (model.batch_size > 32)


class Breaks(Classifier):
    """Fails in its twentieth step."""

    fails = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.fails and self.trainer.global_step == 19:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_at_an_exception_resumes(tmp_path: Path) -> None:
    torch.manual_seed(5)
    keeper, callback, model = OnExceptionCheckpoint(tmp_path, filename="broken"), evolution(), Breaks()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path, [callback, keeper], enable_checkpointing=True).fit(model, Batches())
    assert not model._forward_pre_hooks
    assert not model._state_dict_hooks
    # Due at 15: the batches of steps 16 and 17 made the event before 18; due at 20 is yet to come.
    state = torch.load(tmp_path / "broken.ckpt", weights_only=True)["callbacks"]["WidthEvolution"]
    assert len(state["evolver"]["history"]["events"]) == 3
    again, fresh_model = evolution(), Breaks()
    fresh_model.fails = False
    run = trainer(tmp_path, [again])
    run.fit(fresh_model, Batches(), ckpt_path=tmp_path / "broken.ckpt", weights_only=True)
    # The loader has counted the batch that broke.
    assert run.global_step == 23
    evolved(again)


def test_what_was_heard_before_an_exception_is_in_its_checkpoint(tmp_path: Path) -> None:
    """Whichever of the two callbacks hears of the exception first."""
    for order in (1, -1):
        model, folder = Breaks(), tmp_path / str(order)
        callbacks = [
            evolution(every_n_steps=17, calibration_batches=8),
            OnExceptionCheckpoint(folder, filename="broken"),
        ]
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer(tmp_path, callbacks[::order], enable_checkpointing=True).fit(model, Batches())
        state = torch.load(folder / "broken.ckpt", weights_only=True)["callbacks"]["WidthEvolution"]
        assert [state["due_since"], len(state["evolver"]["batches"])] == [17, 2]


class MakesItsOwn(Classifier):
    """Makes tensors of the default type in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) @ torch.eye(3, device=x.device)


def test_what_a_forward_makes_has_the_run_s_type(tmp_path: Path) -> None:
    callback = evolution()
    trainer(tmp_path, [callback], precision="64-true").fit(MakesItsOwn(), Batches())
    evolved(callback)
