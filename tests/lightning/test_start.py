"""The start of a run: where it fails, here or on another rank, widths stay and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evolvenet import Evolver, TraceError, WidthEvolution
from evolvenet.lightning import start
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
