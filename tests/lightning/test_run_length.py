"""How much of a run is done, whatever ends it; warnings where no event can fall, and where there was none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, Timer
from torch.utils.data import IterableDataset

from evolvenet import Budget, PolicyError, Proposal, Threshold, WidthEvolution
from evolvenet.lightning.run_length import skipped_validation
from tests.helpers.policies import Fixed
from tests.helpers.runs import Batches, User, batch, trainer


class Stream(IterableDataset):
    """Eight batches an epoch, without a length."""

    def __repr__(self) -> str:
        """The same in every process that collects the tests."""
        return "Stream()"

    def __iter__(self) -> Iterator[Any]:
        return (batch(index) for index in range(8))


class Watch:
    """Changes nothing; keeps the progress that it was given."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def propose(self, context: Any) -> dict[str, Proposal]:
        self.seen.append(context.progress)
        return {}


class Clock(Timer):
    """Each batch takes a second."""

    def time_elapsed(self, stage: Any = "train") -> float:
        return float(self.batches)

    batches = 0

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.batches += 1
        super().on_train_batch_end(trainer, *args, **kwargs)


class StopAfter(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        trainer.should_stop = trainer.global_step >= 20


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    kept = [record for record in caplog.records if record.name == "evolvenet" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in kept]


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (Batches(8), {"max_epochs": 5}, [0.3, 0.5, 0.7, 0.9]),
        (Stream(), {"max_epochs": 5}, [0.2, 0.4, 0.6, 0.8]),
        (Stream(), {"max_epochs": 5, "max_steps": 20}, [0.6]),
        (Stream(), {"max_epochs": -1, "max_steps": 40}, [0.3, 0.5, 0.7, 0.9]),
    ],
)
def test_progress_is_told_by_whatever_ends_the_run(
    data: Any, options: dict[str, Any], expected: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evolution = WidthEvolution(policy := Watch(), every_n_epochs=1, stop=1.0)
    trainer(tmp_path, [evolution], **options).fit(User(), data)
    assert policy.seen == pytest.approx(expected)
    assert warnings_of(caplog) == []


def test_under_max_time_progress_is_the_share_of_the_time(tmp_path: Path) -> None:
    evolution = WidthEvolution(policy := Watch(), every_n_epochs=1, stop=1.0)
    clock = Clock(duration=timedelta(seconds=40))
    trainer(tmp_path, [evolution, clock], max_epochs=-1).fit(User(), Stream())
    assert policy.seen == pytest.approx([0.3, 0.5, 0.7, 0.9])


def test_a_budget_is_met_on_data_without_a_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evolution = WidthEvolution(Budget(params=300, by=0.5), every_n_epochs=1)
    trainer(tmp_path, [evolution], max_epochs=8).fit(User(width=32), Stream())
    assert evolution.history is not None
    assert evolution.history.latest.parameters <= 300
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 1}], ids=str)
def test_a_run_of_unknown_length_is_named(options: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evolution = WidthEvolution(Watch(), every_n_steps=8)
    trainer(tmp_path, [evolution, StopAfter()], **options).fit(User(), Stream())
    assert any(
        "How long this run is to be is not known" in each and "max_steps" in each for each in warnings_of(caplog)
    )


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"every_n_epochs": 5}, {}, "due after 40 steps, and the run ends after 24"),
        ({"every_n_steps": 100}, {}, "due after 100 steps, and the run ends after 24"),
        ({"every_n_steps": 20}, {}, "when more than the share stop=0.75 of the run is over"),
        ({"every_n_steps": 2, "start_step": 30}, {}, "Take a smaller start_step"),
        ({"every_n_steps": 23, "stop": 1.0}, {}, "measures on the batches that follow"),
        ({"stop": 0.0}, {}, "stop=0 leaves no time"),
        ({"every_n_epochs": 5}, {"data": Stream()}, "due after 5 epochs, and the run ends after 3"),
        ({}, {"fast_dev_run": 2}, "Or leave fast_dev_run=2 out"),
    ],
    ids=str,
)
def test_a_run_without_room_for_an_event_is_named_at_its_start_and_its_end(
    settings: Any, options: Any, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = options.get("data", Batches(8))
    rest = {name: value for name, value in options.items() if name != "data"}
    trainer(tmp_path, [WidthEvolution(Fixed({}), **settings)], **rest).fit(User(), data)
    start, end = warnings_of(caplog)
    assert start.startswith("No event falls into this run")
    assert expected in start
    assert end.startswith("No event took place in this run")


def test_a_run_without_batches_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, [WidthEvolution(Fixed({}))], limit_train_batches=0).fit(User(), Batches(8))
    (warning,) = warnings_of(caplog)
    assert "No batch was trained on" in warning
    assert "limit_train_batches=0" in warning


def test_a_missed_budget_is_named_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evolution = WidthEvolution(Budget(params=150, largest_step=0.1), every_n_epochs=1)
    trainer(tmp_path, [evolution]).fit(User(width=32), Batches(8))
    assert any("above its budget of 150 params" in each for each in warnings_of(caplog))


@pytest.mark.parametrize("policy", [Threshold, "threshold", {"prune": 0.01}, None], ids=str)
def test_what_is_no_policy_is_refused_at_construction(policy: Any) -> None:
    with pytest.raises(PolicyError, match=r"Take for example policy=Threshold\("):
        WidthEvolution(policy)


@pytest.mark.parametrize(
    ("epochs", "epoch", "total", "current", "due"),
    [(1, 0, 4, 4, True), (2, 0, 4, 4, False), (2, 1, 12, 4, True), (None, 1, 12, 2, True), (None, 1, 10, 4, False)],
)
def test_a_validation_is_said_to_be_skipped_only_where_lightning_would_have_had_one(
    epochs: int | None, epoch: int, total: int, current: int, due: bool
) -> None:
    progress = SimpleNamespace(total=SimpleNamespace(processed=total), current=SimpleNamespace(processed=current))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    fitting: Any = SimpleNamespace(
        fit_loop=loop, val_check_batch=4, check_val_every_n_epoch=epochs, current_epoch=epoch, enable_validation=True
    )
    said = skipped_validation(fitting, {"evolver": {"pending_cut": {"past": "a snapshot"}}})
    assert (said is not None) == due
