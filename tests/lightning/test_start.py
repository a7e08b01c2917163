"""The start of a run: where it fails, here or on another rank, widths stay and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evolvenet import Evolver, TraceError, WidthEvolution, trace
from evolvenet.lightning import start
from evolvenet.lightning.subject import NETWORK, TRAINING_STEP
from tests.helpers.policies import Fixed
from tests.helpers.runs import Batches, User, trainer


def fail(*_: Any) -> Any:
    raise TraceError("no trace")


@pytest.mark.parametrize("example", [None, torch.zeros(2, 6)])
@pytest.mark.parametrize("where", ["warn_of_unreached", "FirstRuns", "log_event"])
def test_a_start_that_fails_half_way_leaves_no_evolver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, example: Any
) -> None:
    monkeypatch.setattr(start, where, fail)
    evolution = WidthEvolution(Fixed({"net.0": 9}), every_n_steps=1, stop=1.0, example_inputs=example)
    fitting = trainer(tmp_path, [evolution])
    fitting.fit(model := User(), Batches())
    assert fitting.state.finished
    assert evolution.evolver is None
    assert evolution.history is None
    assert not any(module._forward_hooks for module in model.modules())
    assert sum("Widths stay as they are in this run: no trace" in each.getMessage() for each in caplog.records) == 1


def test_a_rank_whose_start_succeeds_exchanges_nothing_after_another_rank_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that had failed would not take part in `calibrate`, and both would wait for each other."""
    everywhere, evolution = start.run_on_all_ranks, WidthEvolution(Fixed({}), every_n_steps=1)

    def act_and_fail_elsewhere(group: Any, act: Callable[[], Any]) -> Any:
        found = everywhere(group, act)
        if evolution.evolver is not None:
            raise TraceError("rank 1: TraceError: no")
        return found

    calibrated: list[Any] = []
    monkeypatch.setattr(start, "run_on_all_ranks", act_and_fail_elsewhere)
    monkeypatch.setattr(Evolver, "calibrate", lambda *given: calibrated.append(given))
    trainer(tmp_path, [evolution]).fit(User(), Batches())
    assert (calibrated, evolution.evolver) == ([], None)


def test_a_network_that_another_rank_has_traced_and_this_one_has_not_called_is_named() -> None:
    def inputs(path: str) -> list[Any]:
        return [torch.zeros(1)]

    evolution, recorder = WidthEvolution(Fixed({})), SimpleNamespace(names=["other"], inputs=inputs)
    for kind, root in ((NETWORK, "net"), (TRAINING_STEP, "")):
        with pytest.raises(TraceError, match=r"Expected inputs of (net|the module) .* got calls of other alone"):
            evolution._subject_of_state(recorder, {"kind": kind, "root": root})  # type: ignore[arg-type]


def test_where_ranks_differ_a_failure_of_one_is_known_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """The other rank's graph differs, and its batch calls more modules."""

        rank, size = 0, 2
        answers = iter([lambda sizes: [sizes, {}], lambda none: [none, none], lambda calls: [calls, 99]])

        def all_gather(self, value: Any) -> list[Any]:
            answer = next(self.answers, None)
            return [value, {"kind": NETWORK, "root": "gone"}] if answer is None else answer(value)

    gathered: list[Any] = []

    class Counting(Other):
        def all_gather(self, value: Any) -> list[Any]:
            gathered.append(value)
            return super().all_gather(value)

    evolution, model = WidthEvolution(Fixed({})), User()
    evolution._recorder = SimpleNamespace(names=[], inputs=lambda path: [])  # type: ignore[assignment]
    graph = trace(model, torch.zeros(2, 6))
    subject: Any = SimpleNamespace(path="", inputs=torch.zeros(2, 6), graph=graph, state_dict=dict)
    monkeypatch.setattr(start, "process_group", Counting)
    with pytest.raises(TraceError, match="Expected inputs of gone"):
        evolution._of_the_rank_that_calls_most(model, subject)
    assert "Expected inputs of gone" in gathered[-1]


@pytest.mark.parametrize("example", [None, torch.zeros(2, 6)])
def test_parameters_are_not_gathered_any_more_once_the_model_cannot_be_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: Any
) -> None:
    gathered: list[Any] = []

    def count(*given: Any) -> Any:
        gathered.append(given)
        return nullcontext()

    monkeypatch.setattr("evolvenet.lightning.callback.whole_parameters", count)
    monkeypatch.setattr(start, "warn_of_unreached", fail)
    evolution = WidthEvolution(Fixed({}), every_n_steps=1, example_inputs=example)
    trainer(tmp_path, [evolution], max_epochs=1).fit(User(), Batches())
    assert len(gathered) == 2  # For the start, and for the last report.


def test_the_clock_of_a_run_stops_where_it_fails_and_a_later_fit_adds_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("evolvenet.engine.run_curves.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Fails(User):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                now[0] += 4.0
                raise RuntimeError("no more")
            return super().training_step(batch, batch_idx)

    evolution = WidthEvolution(Fixed({}), every_n_steps=1)
    for run in (1, 2):
        with pytest.raises(RuntimeError, match="no more"):
            trainer(tmp_path, [evolution]).fit(Fails(), Batches())
        now[0] += 100.0
        assert evolution.curves.seconds == 4.0 * run


def test_modules_are_not_walked_after_a_batch_that_ran_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolvenet.lightning.evolution.is_sharded", fail)
    trainer(tmp_path, [WidthEvolution(Fixed({}), every_n_steps=1)], max_epochs=1).fit(User(), Batches())
