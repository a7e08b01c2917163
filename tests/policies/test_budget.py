"""`Budget`: met within 2 % and never exceeded, from above and from below, and then left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet import Budget, Evolver, PolicyError, resize, trace
from evolvenet.graph.exact_growth import ExactGrowth
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import Width
from evolvenet.growth.loss_test import Evidence
from evolvenet.measurement.cost import Costs, macs, parameters, size_in_bytes
from evolvenet.measurement.width_spectra import measure
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import PolicyContext
from tests.helpers.cases import CASES, Case, graph_of
from tests.helpers.small_models import mlp, wide


@pytest.mark.parametrize("case", CASES, ids=str)
def test_costs_of_other_widths_are_those_of_the_resized_model(case: Case) -> None:
    """Multiply-accumulates that no weight explains (attention's products) are taken as they are now."""
    model, graph = case.model(), graph_of(case)
    costs = Costs.of(model, graph, case.inputs())
    sizes = {width.name: max(width.smallest, width.size - 1) for width in graph.resizable}
    resize(model, graph, {name: IndexMap.keep(range(size), graph.widths[name].size) for name, size in sizes.items()})
    assert costs.at("params", sizes) == parameters(model)
    assert costs.at("bytes", sizes) == size_in_bytes(model)
    if not costs.rest["macs"]:
        assert costs.at("macs", sizes) == macs(model, case.inputs())


COST = {
    "params": lambda model, x: parameters(model),
    "macs": macs,
    "bytes": lambda model, x: size_in_bytes(model),
}


def run(policy: Budget, model: nn.Module, events: int = 20) -> tuple[Evolver, list[float]]:
    """A short training run on random pictures; what the network cost after each event."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 5, (64,))
    evolver, seen = Evolver(model, optimizer, policy, x[:1]), []
    for event in range(1, events + 1):
        for _ in range(3):
            evolver.observe(x)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        done = evolver.step(progress=event / events)
        assert done.skipped is None
        seen.append(COST[policy.kind](model, x[:1]))
    return evolver, seen


@pytest.mark.parametrize("start", [3, 48])
@pytest.mark.parametrize(("kind", "amount"), [("params", 6_000), ("macs", 120_000), ("bytes", 30_000)])
def test_a_budget_is_met_by_its_time_from_either_side(kind: str, amount: int, start: int) -> None:
    budget: dict[str, Any] = {kind: amount}
    evolver, seen = run(Budget(**budget, by=0.6, saturated=0.0), wide(start))
    assert all(0.98 * amount <= cost <= amount for cost in seen[-6:])
    assert len(set(seen[-6:])) == 1, "widths have settled"
    falls = [one - two for one, two in pairwise(seen)]
    assert (
        all(fall >= -0.02 * amount for fall in falls) if start == 48 else all(fall <= 0.02 * amount for fall in falls)
    )
    assert evolver.off is None


def test_the_schedule_is_cubic_and_never_undershot() -> None:
    policy = Budget(params=6_000, by=0.8)
    model = wide()
    start = parameters(model)
    _, seen = run(policy, model)
    for event, cost in enumerate(seen, 1):
        target = policy.target(start, event / 20)
        # One event takes at most half of a width, so the beginning may lag behind.
        assert cost <= max(target, 0.5 * ([start, *seen][event - 1])) + 1
        assert cost >= 0.95 * target


@pytest.mark.parametrize("size", [8, 12])
def test_a_width_grows_to_the_next_multiple_though_that_is_more_than_its_share(size: int) -> None:
    torch.manual_seed(0)
    evolver, seen = run(Budget(params=6_000, by=0.5, multiple=8, growth=0.25, saturated=0.0), wide(size))
    assert max(evolver.graph.sizes.values()) >= 16, "at first no width has a share of eight units"
    assert all(now % 8 == 0 for now in evolver.graph.sizes.values())
    assert 0.9 * 6_000 <= seen[-1] <= 6_000


@pytest.mark.parametrize("multiple", [4, 8])
def test_sizes_are_multiples_on_request(multiple: int) -> None:
    evolver, seen = run(Budget(params=12_000, by=0.5, multiple=multiple), wide())
    assert all(size % multiple == 0 for size in evolver.graph.sizes.values())
    assert seen[-1] <= 12_000


def statistics_of(
    model: nn.Module, x: Any, spectra: Mapping[str, list[float]] | None = None
) -> dict[str, WidthStatistics]:
    graph = trace(model, x)
    found = spectra or {name: values.tolist() for name, values in measure(model, graph).items()}
    return {name: WidthStatistics(name, graph.sizes[name], tuple(each), 99, True) for name, each in found.items()}


def context_of(
    model: nn.Module,
    x: Any,
    spectra: Mapping[str, list[float]] | None = None,
    timed: Callable[[Mapping[str, int]], float] | None = None,
    progress: float = 1.0,
) -> PolicyContext:
    """An event of a network with these spectra; by default those of its weights."""
    graph = trace(model, x)
    costs = Costs.of(model, graph, x)
    return PolicyContext(
        graph,
        progress,
        graph.sizes,
        measure=lambda: statistics_of(model, x, spectra),
        count_costs=lambda: costs if timed is None else replace(costs, timed=timed),
    )


def test_latency_is_measured_and_fits() -> None:
    """A clock that counts multiply-accumulates stands in for the machine's."""
    model, x = wide(), torch.zeros(1, 1, 8, 8)
    timed: list[float] = []
    costs = context_of(model, x).costs

    def clock(sizes: Mapping[str, int]) -> float:
        timed.append(costs.at("macs", sizes) * 1e-9)
        return timed[-1]

    policy = Budget(latency=0.4 * clock({}), largest_step=1.0)
    found = policy.propose(context_of(model, x, timed=clock))
    cost = clock({name: proposal.size for name, proposal in found.items()})
    assert 0.35 * clock({}) < cost <= 0.4 * clock({})
    assert len(timed) < 20


@pytest.mark.parametrize("allowed", [1.02, 1.1, 1.5, 3.0])
def test_where_time_is_left_nothing_is_cut(allowed: float) -> None:
    """Latency has a search of its own, which must not begin below what the network has."""
    model, x = wide(12), torch.zeros(1, 1, 8, 8)
    costs = context_of(model, x).costs
    spectra = {name: [1.0] * size for name, size in trace(model, x).sizes.items()}

    def clock(sizes: Mapping[str, int]) -> float:
        return costs.at("macs", sizes)

    found = Budget(latency=allowed * clock({}), by=0.5).propose(context_of(model, x, spectra, clock))
    assert all(proposal.size > 12 for proposal in found.values())
    assert bool(found) == (allowed > 1.02)
    assert clock({name: proposal.size for name, proposal in found.items()}) <= allowed * clock({})


def test_the_real_clock_tells_wide_from_narrow() -> None:
    model, x = wide(), torch.zeros(8, 1, 8, 8)
    costs = context_of(model, x).costs
    narrow = dict.fromkeys(trace(model, x).sizes, 2)
    assert 0 < costs.at("latency", narrow) < costs.at("latency", {})


def test_with_trials_the_width_is_cut_whose_cut_moves_the_outputs_less() -> None:
    """Both widths have the same spectrum; cutting one of them does nothing to the outputs."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(1, 8)
    context = context_of(model, x, {"0": [1.0] * 8, "2": [1.0] * 8})
    for idle, used in (("0", "2"), ("2", "0")):
        curves = {idle: [(0, 9.0), (2, 0.0), (8, 0.0)], used: [(0, 9.0), (2, 3.0), (8, 0.0)]}
        budget = Budget(params=130, by=0, growth=0, trials=True)
        found = budget.propose(replace(context, run_trials=lambda curves=curves: curves))
        assert set(found) == {idle}
        assert "of the outputs' variance" in found[idle].reason


def test_in_a_run_trials_are_made_on_the_observed_batches() -> None:
    evolver, seen = run(Budget(params=6_000, by=0.5, trials=True), wide(), events=8)
    assert 0.98 * 6_000 <= seen[-1] <= 6_000
    reasons = [change.reason for event in evolver.history.events for change in event.changes]
    assert reasons
    assert all("of the outputs' variance" in reason for reason in reasons)


def test_a_network_whose_units_are_larger_than_the_margin_settles_too() -> None:
    """One unit more would be too many, one less misses 2 %: nothing is changed any more."""
    near = []
    for seed, budget in product(range(3), (75, 110, 140)):
        torch.manual_seed(seed)
        evolver, seen = run(Budget(params=budget, by=0.5, saturated=0.0, smallest=1), wide(3), events=16)
        assert all(cost <= budget for cost in seen[-7:])
        assert not [event for event in evolver.history.events[-6:] if event.changes]
        near.append(seen[-1] / budget)
    assert min(near) < 0.98, "else it says nothing"


@pytest.mark.parametrize("budget", [100, 290, 300, 315])
def test_what_whole_units_leave_is_filled_once_the_budget_holds(budget: int) -> None:
    """Where no growth is certain enough to be paid for, new units come last and nothing goes any more."""
    policy = Budget(params=budget, by=0.5, saturated=0.0, smallest=1, certain=math.inf)
    torch.manual_seed(0)
    evolver, seen = run(policy, wide(12), events=16)
    torch.manual_seed(0)
    cut, only_cut = run(replace(policy, growth=0), wide(12), events=16)
    assert only_cut[-1] <= seen[-1] <= budget
    costs = Costs.of(evolver.model, evolver.graph, torch.zeros(1, 1, 8, 8))
    more = [costs.at("params", {name: size + 1}) for name, size in evolver.graph.sizes.items()]
    assert seen[-1] >= 0.98 * budget or min(more) > budget
    assert seen[-1] > only_cut[-1] or budget != 290, "else it says nothing"
    holds = next(place for place, cost in enumerate(only_cut) if cost <= budget)
    assert [event.changes for event in evolver.history.events[:holds]] == [
        event.changes for event in cut.history.events[:holds]
    ]
    assert all(
        change.after > change.before for event in evolver.history.events[holds + 1 :] for change in event.changes
    )


def test_what_is_free_is_filled_on_the_way_up_and_not_on_the_way_down() -> None:
    """On the way down it would be cut again at the next event."""
    model, x = mlp(6, 8, 8, 3), torch.zeros(1, 6).double()
    context = context_of(model, x, {"0": [1.0] * 8, "2": [1.0] * 8}, progress=0.25)
    for initial, final, grows in ((16, 0.5, False), (4, 2.0, True)):
        began = replace(context, initial={"0": initial, "2": initial})
        budget = Budget(params=final * parameters(model), by=1.0)
        assert budget.target(context.costs.at("params", began.initial), 0.25) > parameters(model) + 40
        assert bool(budget.propose(began)) == grows


def test_without_growth_that_others_pay_for_no_loss_test_is_run() -> None:
    model, x = mlp(6, 8, 8, 3), torch.zeros(1, 6).double()
    spectra = {"0": [1.0] * 4 + [1e-6] * 4, "2": [1.0] * 8}
    context = replace(
        context_of(model, x, spectra, progress=0.5), run_loss_tests=lambda _: pytest.fail("a loss test was run")
    )
    assert not Budget(params=parameters(model), by=0.6, certain=math.inf).propose(context)


def test_growth_in_one_place_is_paid_by_pruning_in_another() -> None:
    """At the budget already: the width whose directions all count gets what the one with empty ones gives up."""
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
        torch.zeros(1, 8),
    )
    spectra = {"0": [1.0] * 16, "2": [1.0] * 4 + [1e-6] * 12}
    context = context_of(model, x, spectra, progress=0.5)
    found = Budget(params=parameters(model), by=0.6).propose(context)
    assert found["0"].size > 16
    assert found["2"].size < 16
    assert context.costs.at("params", {name: proposal.size for name, proposal in found.items()}) <= parameters(model)
    assert "gains" in found["0"].reason
    assert "loses" in found["2"].reason


def test_the_last_cut_takes_no_more_than_it_must() -> None:
    """A unit of the second width has the smaller loss per cost saved, but saves far more than is needed."""
    model, x = (
        nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 40)),
        torch.zeros(1, 2),
    )
    context = context_of(model, x, {"0": [1.0] * 6, "2": [1.0] * 5})
    curves = {"0": [(0, 9.0), (5, 0.1), (6, 0.0)], "2": [(0, 9.0), (4, 0.2), (5, 0.0)]}
    for needed, cut in ((5, "0"), (40, "2")):
        budget = Budget(params=parameters(model) - needed, by=0, growth=0, trials=True)
        assert set(budget.propose(replace(context, run_trials=lambda: curves))) == {cut}, needed


def test_the_loss_is_near_the_least_of_all_sizes_that_fit() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.zeros(1, 8)
    graph = trace(model, x)
    spectra = {"0": [5.0, 3, 1, 0.5, 0.2, 0.1], "2": [4.0, 4, 1, 0.3, 0.1]}
    target = 80
    policy = Budget(params=target, growth=0, largest_step=1.0, smallest=1)
    found = policy.propose(context_of(model, x, spectra))
    sizes = {**graph.sizes, **{name: proposal.size for name, proposal in found.items()}}

    def loss(chosen: Mapping[str, int]) -> float:
        kept = [
            sum(v**2 for v in spectra[name][:size]) / sum(v**2 for v in spectra[name]) for name, size in chosen.items()
        ]
        return -math.log(math.prod(kept))

    best = min(
        loss({"0": one, "2": two})
        for one in range(1, 7)
        for two in range(1, 6)
        if graph.proposed_parameters({"0": one, "2": two}) <= target
    )
    assert graph.proposed_parameters(sizes) <= target
    assert loss(sizes) <= 1.5 * best


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "got none"),
        ({"params": 5, "macs": 5}, "got params, macs"),
        ({"params": -1}, "params to be a number of 0|0 or more"),
        ({"params": float("nan")}, "params"),
        ({"params": 5, "by": 1.2}, "by to be a number in 0 … 1"),
        ({"params": 5, "multiple": 0}, "multiple"),
        ({"params": 5, "trust": -0.1}, "trust"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        Budget(**options)


def test_a_budget_below_the_smallest_network_goes_as_far_as_it_can() -> None:
    evolver, seen = run(Budget(params=10, by=0.2), wide(8))
    assert max(evolver.graph.sizes.values()) == 2
    assert seen[-1] > 10


@pytest.mark.parametrize(("t_statistic", "grows"), [(1.9, False), (2.1, True), (None, True)])
def test_growth_that_others_pay_for_needs_to_pass_the_loss_test(t_statistic: float | None, grows: bool) -> None:
    """At the budget one width has units to spare and the other is saturated; a width that cannot be tested passes."""
    model, x, tested = mlp(6, 8, 8, 3), torch.zeros(1, 6).double(), []

    def loss_tests(sizes: Mapping[str, int]) -> dict[str, Evidence]:
        tested.append(dict(sizes))
        return {} if t_statistic is None else {name: Evidence(0.1, t_statistic) for name in sizes}

    budget = Budget(params=parameters(model) - 1, by=0.5, growth=0.25)
    context = context_of(model, x, {"0": [1.0] * 4 + [1e-4] * 4, "2": [1.0] * 8})
    found = {name: each.size for name, each in budget.propose(replace(context, run_loss_tests=loss_tests)).items()}
    assert tested == [{"2": 10}]
    assert found["0"] < 8
    assert (found.get("2", 8) > 8) == grows


def test_growth_towards_a_budget_above_is_not_tested() -> None:
    model, x = mlp(6, 8, 8, 3), torch.zeros(1, 6).double()
    context = replace(
        context_of(model, x, {"0": [1.0] * 8, "2": [1.0] * 8}),
        run_loss_tests=lambda _: pytest.fail("a loss test was run"),
    )
    found = Budget(params=2 * parameters(model), by=0.5, growth=0.25).propose(context)
    assert {proposal.size for proposal in found.values()} == {10}


@pytest.mark.parametrize(("growth", "largest"), [(ExactGrowth("copy"), 8), (ExactGrowth("mean", ("norm",)), 12)])
def test_a_width_of_which_new_units_can_only_be_copies_does_not_grow(growth: ExactGrowth, largest: int) -> None:
    width = Width("stream", 8, mixed="a norm mixes them", exact_growth=growth)
    statistics: Any = SimpleNamespace(spectrum=torch.ones(8), growable=True)
    assert Budget(params=100, growth=0.5)._largest(statistics, width) == largest
