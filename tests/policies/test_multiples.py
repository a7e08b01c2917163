"""Whatever the policy, sizes change to multiples alone; budgets and limits hold nevertheless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from evolvenet import Budget, Evolver, Front, IndexMap, Price, Proposal, Threshold, Tolerance
from evolvenet.graph.restriction import with_multiple
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import Policy, PolicyContext, check_proposals, rounded
from evolvenet.pruning.allocation import energy_curve
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import mlp

BASE = trace(mlp(6, 64, 64, 64, 3), torch.zeros(1, 6).double())
NAMES = tuple(BASE.sizes)


@dataclass(frozen=True)
class Random:
    """A policy of one's own, which knows nothing of multiples."""

    sizes: Sequence[int]

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        return {name: Proposal(size, "random") for name, size in zip(NAMES, self.sizes, strict=True)}


def resized(graph: WidthGraph, sizes: dict[str, int]) -> WidthGraph:
    maps = {}
    for name, size in sizes.items():
        now = graph.sizes[name]
        maps[name] = IndexMap.keep(range(size), now) if size <= now else IndexMap.grow(now, size - now)
    return graph.resized(maps)


def context_of(
    graph: WidthGraph, progress: float, decay: float, state: Any = None, initial: Any = None
) -> PolicyContext:
    """Spectra that fall by a factor a direction; a decay of 1 is saturated."""
    known = {
        name: WidthStatistics(name, size, tuple(decay**place for place in range(size)), 1000, growable=True)
        for name, size in graph.sizes.items()
    }
    costs = Costs(graph, {}, {}, {}, lambda sizes: math.nan)
    return PolicyContext(
        graph, progress, initial or graph.sizes, state, measure=lambda: known, count_costs=lambda: costs,
        run_trials=lambda **_: {name: energy_curve(each.spectrum) for name, each in known.items()},
    )  # fmt: skip


def events(policy: Policy, graph: WidthGraph, decay: float, count: int, state: Any = None) -> list[WidthGraph]:
    """The widths after each of `count` events; every proposal is checked."""
    initial, found = graph.sizes, []
    for event in range(1, count + 1):
        context = context_of(graph, event / count, decay, state, initial)
        raw = check_proposals(policy.propose(context), graph)
        proposals = rounded(raw, graph)
        if not isinstance(policy, Random):
            assert proposals == raw, "a policy of the package proposes only what needs no rounding"
        for name, proposal in proposals.items():
            assert proposal.size % graph.widths[name].step == 0 or proposal.size == graph.sizes[name]
        graph = resized(graph, {name: proposal.size for name, proposal in proposals.items()})
        found.append(graph)
    return found


starts = st.tuples(*[st.integers(2, 90)] * len(NAMES))
multiples = st.sampled_from([1, 2, 3, 8, 16])
decays = st.sampled_from([1.0, 0.98, 0.8, 0.5])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(starts, multiples, decays, st.data())
def test_every_policy_proposes_multiples_alone(start: Any, multiple: int, decay: float, data: st.DataObject) -> None:
    graph = with_multiple(resized(BASE, dict(zip(NAMES, start, strict=True))), multiple)
    best = replace(Tolerance(metric="acc", drop=0.1), share=0.3).judge(None, 0.9).state
    policies: list[tuple[Policy, Any]] = [
        (Threshold(prune=0.05, grow=0.9, certain=0), None),
        (Threshold(prune=0.05, grow=0.9, largest_step=0.05, growth=0.01, certain=0), None),
        (Price(price=1e-1, settle=0), None),
        (Budget(params=1_500, certain=0, saturated=0.1), None),
        (Front(points=[Budget(params=4_000, by=0.5), Budget(params=900, by=0.5)]), None),
        (Tolerance(metric="acc", drop=0.1), best),
        (Random(data.draw(st.tuples(*[st.integers(1, 90)] * len(NAMES)))), None),
    ]
    for policy, state in policies:
        for after in events(policy, graph, decay, 3, state):
            for name, size in after.sizes.items():
                assert size % multiple == 0 or size == graph.sizes[name]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(starts, multiples, st.sampled_from([1.0, 0.9]), st.floats(0, 1), st.sampled_from([0.5, 0.05]))
def test_budgets_are_met_in_multiples(start: Any, multiple: int, decay: float, share: float, step: float) -> None:
    graph = with_multiple(resized(BASE, dict(zip(NAMES, start, strict=True))), multiple)
    least = {name: max(2, multiple) if size >= multiple else size for name, size in graph.sizes.items()}
    low, high = graph.proposed_parameters(least), graph.parameters
    limit = math.ceil(low + share * max(0, high - low))
    # A small share of a few units is none, but one multiple may always go.
    largest_step = step if multiple > 1 else 0.5
    last = events(Budget(params=limit, by=0.5, largest_step=largest_step, growth=0), graph, decay, 80)[-1]
    assert last.parameters <= max(limit, graph.parameters if low >= high else 0)


@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_growth_in_multiples_stays_within_the_limit_of_parameters(multiple: int) -> None:
    graph = with_multiple(resized(BASE, dict.fromkeys(NAMES, 16)), multiple)
    policy = Threshold(prune=0.0, grow=0.5, cooldown=0, certain=0, max_parameters=3_000)
    found = [after.parameters for after in events(policy, graph, 1.0, 30)]
    assert graph.parameters < found[-1] == max(found) <= 3_000


@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_a_network_above_the_limit_shrinks_below_it_in_multiples(multiple: int) -> None:
    graph = with_multiple(resized(BASE, dict.fromkeys(NAMES, 50)), multiple)
    policy = Threshold(prune=0.0, grow=0.9, growth=0, largest_step=0.1, cooldown=0, max_parameters=1_500)
    assert events(policy, graph, 0.99, 60)[-1].parameters <= 1_500


def test_in_a_run_every_size_is_a_multiple_or_the_first_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, 2))
    evolver = Evolver(model, None, Threshold(prune=0.05, grow=0.95), torch.zeros(1, 4), multiple=8)
    for _ in range(4):
        evolver.observe(torch.randn(256, 4))
        evolver.step()
    sizes = [event.sizes["0"] for event in evolver.history.events]
    assert sizes[-1] < 50
    assert all(size % 8 == 0 for size in sizes)
    assert all(event.sizes["2"] == 6 for event in evolver.history.events)
