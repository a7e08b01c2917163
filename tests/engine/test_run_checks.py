"""Runs in which no event can take place, and budgets that cannot be reached or were missed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolvenet import Budget, Evolver, Front, Threshold, trace
from evolvenet.engine.event_timer import EventState, EventTimer
from evolvenet.engine.run_checks import missed, no_event_possible
from evolvenet.measurement.cost import Costs
from evolvenet.policies.base import PolicyContext
from evolvenet.policies.schedule import Schedule
from tests.helpers.small_models import mlp


def simulated(schedule: Schedule, steps: int, epoch_steps: int, later: int) -> int:
    """Events of a run, by the timer that the callbacks use."""
    timer, events = EventTimer(schedule, later), 0
    timer.start()
    for step in range(steps):
        timer.count_batch()
        if timer.state is EventState.DUE and later:
            timer.finish()
            events += 1
        timer.check(step, step / steps, step // epoch_steps if step % epoch_steps == 0 else None)
        if timer.state is EventState.DUE and not later:
            timer.finish()
            events += 1
    return events


@given(
    st.integers(1, 40), st.booleans(), st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.75, 1.0]), st.integers(1, 12),
    st.integers(1, 6), st.integers(0, 1),
)  # fmt: skip
def test_a_run_has_no_event_where_the_check_says_so_and_no_other(
    every: int, by_steps: bool, start: int, stop: float, epoch_steps: int, epochs: int, later: int
) -> None:
    times: dict[str, Any] = {"every_n_steps": every} if by_steps else {"every_n_epochs": every}
    schedule = Schedule(**times, start_step=start, stop=stop)
    steps = epoch_steps * epochs
    problem = no_event_possible(schedule, steps, epoch_steps, epochs, later)
    assert (problem is not None) == (simulated(schedule, steps, epoch_steps, later) == 0)
    if problem is not None:
        assert "Take " in problem


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(every_n_epochs=20), "due after 20 epochs, and the run ends after 10. Take a smaller every_n_epochs"),
        (Schedule(every_n_epochs=9), "due after 9 epochs of 10, when more than the share stop=0.75 of the run is over"),
        (Schedule(stop=0.0), "stop=0 leaves no time for one"),
    ],
)
def test_epochs_of_unknown_length_are_counted(schedule: Schedule, expected: str) -> None:
    assert expected in (no_event_possible(schedule, None, None, epochs=10) or "")


def test_what_is_not_known_is_not_warned_of() -> None:
    assert no_event_possible(Schedule(every_n_steps=10), None, None, epochs=3) is None
    assert no_event_possible(Schedule(), None, None, None) is None


def evolver(policy: Any, **options: Any) -> Evolver:
    return Evolver(mlp(6, 16, 16, 3), None, policy, torch.zeros(1, 6).double(), **options)


@pytest.mark.parametrize(
    "policy",
    [
        Budget(params=10),
        Budget(macs=10),
        Front(points=[Budget(params=500), Budget(params=10)]),
        Threshold(prune=0.01, grow=0.9, max_parameters=10),
    ],
    ids=str,
)
def test_a_budget_below_the_smallest_network_is_named_at_the_start(
    policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    evolver(policy)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "=10) cannot be reached: with every width at its smallest the network has " in warning


@pytest.mark.parametrize("multiple", [1, 8])
def test_the_smallest_cost_is_exact(multiple: int) -> None:
    made = evolver(Budget(params=500), multiple=multiple)
    least = max(2, multiple)
    smallest = made.graph.proposed_parameters(dict.fromkeys(made.graph.sizes, least))
    costs = Costs.of(made.model, made.graph, made.example_inputs)
    context = PolicyContext(made.graph, 0.0, made.graph.sizes, count_costs=lambda: costs)
    assert Budget(params=smallest).unreachable(context) is None
    assert f"has {smallest:,} params" in (Budget(params=smallest - 1).unreachable(context) or "")


@pytest.mark.parametrize(
    ("budget", "start", "expected"),
    [(300, 16, "above its budget of 300 params"), (435, 16, None), (2000, 16, "below its"), (500, 32, None)],
)
def test_a_missed_budget_is_named_at_the_end(budget: int, start: int, expected: str | None) -> None:
    made = evolver(Budget(params=budget))
    made.history.initial.sizes.update(dict.fromkeys(made.graph.sizes, start))
    found = missed(made)
    assert (found is None) if expected is None else expected in (found or "")


def test_a_policy_without_an_aim_or_with_an_error_in_it_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Budget):
        def unreachable(self, context: PolicyContext) -> str | None:
            raise RuntimeError

    evolver(Broken(params=10))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert trace(mlp(6, 16, 16, 3), torch.zeros(1, 6).double()).sizes == {"0": 16, "2": 16}
