"""An event that fails anywhere leaves everything as it was, and training goes on."""

from __future__ import annotations

import logging
from collections import Counter
from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet import Evolver
from evolvenet.errors import SpectrumError
from tests.helpers.cases import CASES
from tests.helpers.policies import Fixed
from tests.helpers.stages import at_boundary, failing
from tests.helpers.states import State

BY_NAME = {case.name: case for case in CASES}


class Run:
    """A network in the middle of a run, with momenta, gradients and a moving average of its weights."""

    def __init__(self, name: str = "resnet") -> None:
        self.case = BY_NAME[name]
        self.model = self.case.model().train()
        self.average = deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.rebuilt = 0
        graph_sizes = Evolver(self.model, None, Fixed({}), self.case.inputs()).graph.sizes
        sizes = {name: size + 2 if k % 2 else size - 1 for k, (name, size) in enumerate(graph_sizes.items())}
        self.policy = Fixed(sizes)
        self.evolver = Evolver(
            self.model,
            self.optimizer,
            self.policy,
            self.case.inputs(),
            copies=[self.average],
            after_change=self.rebuild,
        )
        for seed in range(3):
            self.train(seed)

    def rebuild(self) -> None:
        self.rebuilt += 1

    def train(self, seed: int) -> None:
        inputs = torch.cat([self.case.inputs(8 * seed + k) for k in range(8)])
        self.evolver.observe(inputs)
        self.optimizer.zero_grad()
        self.model(inputs).square().mean().backward()
        self.optimizer.step()
        assert all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def states(self) -> tuple[State, State]:
        return State.of(self.model, [self.optimizer]), State.of(self.average)


STAGES = (
    "batch gathering",
    "weight check",
    "policy",
    "statistics",
    "spectra",
    "validation",
    "replica update",
    "snapshot",
    "output change",
    "unit selection",
    "reconstruction",
    "growth",
    "surgery",
    "gradient",
    "tensor exchange",
    "module attributes",
    "optimizer state",
    "optimizer state check",
    "cost count",
    "after_change",
)
"""All stages of an event that prunes and grows."""


@cache
def boundaries_of_a_good_event(name: str) -> Counter[str]:
    """How many times an event enters or leaves each stage."""
    run = Run(name)
    with at_boundary("none", act=lambda: None) as passed:
        assert run.evolver.step().skipped is None
    return passed


def assert_nothing_happened(run: Run, before: tuple[State, State], graph: object, caplog: Any, stage: str) -> None:
    assert before[0].differences(run.model, [run.optimizer]) == []
    assert before[1].differences(run.average) == []
    assert run.evolver.graph is graph
    event = run.evolver.history.events[-1]
    assert event.changes == ()
    assert event.skipped == f"{stage} failed: boom"
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert f"widths are left as they are: {event.skipped}" in warnings[0].message


def test_these_are_all_stages_of_an_event() -> None:
    assert set(boundaries_of_a_good_event("resnet")) == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_on_entering_a_stage_leaves_all_as_it_was(stage: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    before, graph = run.states(), run.evolver.graph
    with failing(stage):
        run.evolver.step()
    assert_nothing_happened(run, before, graph, caplog, stage)
    run.train(7)
    assert len(run.evolver.step().changes) == len(run.policy.sizes)
    run.train(8)


@pytest.mark.parametrize(("name", "each"), [("mlp", 1), pytest.param("resnet", 2, marks=pytest.mark.long)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_boundary_of_a_stage_leaves_all_as_it_was(
    stage: str, name: str, each: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Before and after every tensor, every optimizer entry, every surgery: 212 failures, and 428 with the long ones."""
    total = boundaries_of_a_good_event(name)[stage]
    assert total >= (32 if stage in ("tensor exchange", "optimizer state") else 2)
    run = Run(name)
    before, graph = run.states(), run.evolver.graph
    for at in range(1, total + 1, each):
        caplog.clear()
        run.evolver._failures.counts.clear()
        with failing(stage, at):
            run.evolver.step()
        assert_nothing_happened(run, before, graph, caplog, stage)


def test_a_policy_or_after_change_may_fail(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    before, graph = run.states(), run.evolver.graph

    def fails(*args: Any) -> None:
        raise ZeroDivisionError("boom")

    with monkeypatch.context() as context:
        context.setattr(run.policy, "propose", fails)
        run.evolver.step()
    assert_nothing_happened(run, before, graph, caplog, "policy")
    caplog.clear()
    calls = 0

    def fails_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError("boom")

    run.evolver.after_change = fails_once
    run.evolver.step()
    assert_nothing_happened(run, before, graph, caplog, "after_change")
    assert calls == 2, "wrappers of the model are made anew for the shapes that are back"


def test_a_wrong_result_is_found_and_reverted() -> None:
    """Each thing that `validate` looks at, spoiled after a surgery that itself went well."""
    # Over 40 lines: five things to spoil, side by side.

    def another_object(run: Run) -> None:
        owner = run.model.get_submodule("stem")
        owner.weight = nn.Parameter(owner.weight.detach().clone())  # type: ignore[assignment]

    def number(run: Run) -> None:
        run.model.get_submodule("stem").out_channels += 1  # type: ignore[operator]

    def state(run: Run) -> None:
        weight = run.model.get_parameter("stem.weight")
        run.optimizer.state[weight]["exp_avg"] = torch.zeros(3)

    def shape(run: Run) -> None:
        norm = run.model.get_submodule("blocks.0.norm1")
        norm.running_mean = norm.running_mean[:-1]  # type: ignore[index,assignment]

    def nan(run: Run) -> None:
        run.model.get_parameter("head.bias").data[0] = float("nan")

    expected = {
        another_object: "the object that it was",
        number: "out_channels of Conv2d",
        state: "'exp_avg' to fit",
        shape: "running_mean",
        # The event is repeated with part of its widths, and finds the NaN there.
        nan: "finite weights",
    }
    last = boundaries_of_a_good_event("resnet")["surgery"]
    for spoil, message in expected.items():
        run = Run()
        graph = run.evolver.graph
        with at_boundary("surgery", partial(spoil, run), last):
            event = run.evolver.step()
        if spoil is number:
            # It is known of which width: that one rests.
            (reason,) = [
                reason for reason in run.evolver.graph.reasons.values() if "rests for the rest of the run" in reason
            ]
            assert message in reason, spoil.__name__
            continue
        assert event.changes == ()
        assert event.skipped is not None
        assert message in event.skipped, spoil.__name__
        assert run.evolver.graph is graph


def test_the_same_stage_failing_twice_switches_evolution_off(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    before = run.states()
    with failing("reconstruction", at=None):
        for _ in range(5):
            run.evolver.step()
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "reconstruction failed: boom. It was not the first time" in caplog.text
    assert run.evolver.off is not None
    assert len(run.evolver.history.events) == 2
    assert before[0].differences(run.model, [run.optimizer]) == []
    run.train(9)


def test_two_stages_failing_once_each_leave_evolution_on() -> None:
    run = Run()
    for stage in ("statistics", "reconstruction"):
        with failing(stage):
            run.evolver.step()
    assert run.evolver.off is None
    assert run.evolver.step().changes


def test_batches_or_weights_that_cannot_be_measured_never_switch_evolution_off() -> None:
    run = Run()
    for _ in range(4):
        with failing("statistics", error=SpectrumError):
            assert run.evolver.step().skipped == "boom"
    run.model.get_parameter("stem.weight").data[0] = float("nan")
    for _ in range(4):
        assert "Expected finite weights" in (run.evolver.step().skipped or "")
    assert run.evolver.off is None


def test_an_interrupt_is_passed_on_and_leaves_all_as_it_was() -> None:
    run = Run()
    before = run.states()
    with pytest.raises(KeyboardInterrupt), failing("tensor exchange", 17, KeyboardInterrupt):
        run.evolver.step()
    assert before[0].differences(run.model, [run.optimizer]) == []
    assert before[1].differences(run.average) == []


def test_a_wrong_policy_is_named() -> None:
    run = Run()
    run.policy.sizes = {"nowhere": 4}
    run.policy.propose = lambda measures, graph: {"nowhere": None}  # type: ignore[method-assign,assignment,return-value]
    event = run.evolver.step()
    assert (event.skipped or "").startswith("policy failed")


def test_copies_keep_their_function_as_the_model_does() -> None:
    """A cut average is fitted to its own answers; a copy that is the model to the last bit ends up as the model does."""
    run = Run()
    replica = deepcopy(run.model)
    run.evolver.copies = [run.average, replica]
    run.evolver.step()
    ours, theirs = run.model.state_dict(), replica.state_dict()
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [p.shape for p in run.average.parameters()] == [p.shape for p in run.model.parameters()]


def test_an_unlike_copy_skips_the_event() -> None:
    run = Run()
    run.evolver.copies = [nn.Linear(2, 2)]
    before = run.states()
    assert "replica update failed" in (run.evolver.step().skipped or "")
    assert before[0].differences(run.model, [run.optimizer]) == []
