"""Decisions from spectra: what goes, what grows, what is left alone, and what is said about it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import WidthGraph, Widths
from evolvenet.growth.loss_test import Evidence
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import PolicyContext, Proposal
from evolvenet.policies.threshold import Threshold, units_above
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import mlp

LONG_AGO = 1000
GRAPH = trace(mlp(6, 8, 8, 3), torch.zeros(1, 6).double())


def measured(spectrum: list[float], width: str = "0", **rest: Any) -> WidthStatistics:
    """A width that may change in any way, of as many units as its spectrum has values."""
    defaults = {"size": len(spectrum), "events_since_change": LONG_AGO, "growable": True}
    return WidthStatistics(width, spectrum=tuple(spectrum), **{**defaults, **rest})


def decide(policy: Threshold, *widths: WidthStatistics) -> dict[str, Proposal]:
    """What the policy proposes for these widths."""
    return policy.propose(context_of(*widths))


def context_of(*widths: WidthStatistics, graph: WidthGraph = GRAPH, **rest: Any) -> PolicyContext:
    progress = rest.pop("progress", 0.5)
    return PolicyContext(graph, progress, graph.sizes, measure=lambda: {each.width: each for each in widths}, **rest)


def flat(size: int, **rest: Any) -> WidthStatistics:
    """A saturated width."""
    return measured([1.0] * size, **rest)


def low(size: int, rank: int, **rest: Any) -> WidthStatistics:
    """A width of which only `rank` directions, all equally strong, carry anything."""
    return measured([1.0] * rank + [0.0] * (size - rank), **rest)


def slowly(energies: list[float], share: float) -> int:
    """Units go one after the other while the last one has less than the share of the mean, 1 over those that are left."""
    left = list(energies)
    while left and (left[-1] == 0 or left[-1] < share / len(left)):
        left.pop()
    return len(left)


@given(st.lists(st.floats(0, 1), max_size=24), st.floats(0, 1))
def test_units_go_one_after_the_other_and_a_second_time_none_goes(values: list[float], share: float) -> None:
    energies = sorted(values, reverse=True)
    kept = units_above(energies, share)
    assert kept == slowly(energies, share)
    assert units_above(energies[:kept], share) == kept


def test_units_without_energy_go() -> None:
    found = decide(Threshold(prune=0.01, grow=0.9), measured([5.0, 4.0, 3.0, 2.0, 0.2, 0.1, 0.1, 0.05]))
    energy = [value**2 for value in (5.0, 4.0, 3.0, 2.0, 0.2, 0.1, 0.1, 0.05)]
    most = 100 * 4 * energy[4] / sum(energy)
    assert found == {"0": Proposal(4, f"4 units have less than 1.0 % of the mean energy: at most {most:.1f} %")}


def test_one_unit_is_written_in_the_singular() -> None:
    found = decide(Threshold(prune=0.01, grow=0.9), measured([5.0, 4.0, 3.0, 0.2]))
    assert found["0"].reason == "1 unit has less than 1.0 % of the mean energy: 0.2 %"


def test_the_energies_decide_where_they_are_given() -> None:
    found = decide(Threshold(prune=0.01), measured([1.0] * 4, energies=(0.7, 0.3, 0.001, 0.0005)))
    assert found["0"].size == 2


def test_a_saturated_width_grows() -> None:
    found = decide(Threshold(prune=0.01, grow=0.9), flat(8))
    assert found == {"0": Proposal(10, "8 of 8 units have at least 1.0 % of the mean energy")}


def test_between_the_thresholds_nothing_happens() -> None:
    """A width of which 9 of 10 units have energy is saturated, but may not grow; one of which 8 have it shrinks."""
    assert decide(Threshold(grow=0.9, growth=0), low(10, 9)) == {}
    assert decide(Threshold(grow=0.9, growth=0), low(10, 8))["0"].size == 8


def test_a_saturated_width_is_not_pruned_even_if_it_may_not_grow() -> None:
    assert decide(Threshold(prune=0.01, grow=0.9), flat(8, growable=False)) == {}
    assert decide(Threshold(prune=0.01, grow=0.75), low(8, 6, growable=False)) == {}


@pytest.mark.parametrize(("largest_step", "size"), [(0.5, 5), (0.25, 8), (0.05, 10), (1.0, 2), (0.0, 10)])
def test_no_more_than_the_largest_step_goes_within_a_cooldown(largest_step: float, size: int) -> None:
    found = decide(Threshold(prune=0.01, grow=0.9, largest_step=largest_step, cooldown=0), low(10, 1))
    assert (found["0"].size if found else 10) == size


@pytest.mark.parametrize("events", [1, 4, 10, 50])
@pytest.mark.parametrize("units", [16, 4096])
def test_the_pace_is_a_share_of_the_run_whatever_the_number_of_events(events: int, units: int) -> None:
    """Within one cooldown half of the units go, in one event or in many."""
    policy, size, progress, last = Threshold(cooldown=0.1, start=0.4, largest_step=0.5), units, 0.4, 0.0
    for _ in range(events):
        previous, progress = progress, progress + 0.1 / events
        width = low(size, 1, last_change=-1 if last else 0, since_change=progress - last if last else math.inf)
        found = policy.propose(context_of(width, progress=progress, previous=previous))
        if found:
            size, last = found["0"].size, progress
    assert units / 2 <= size <= units * 0.65


def test_nothing_is_pruned_before_the_start_and_nothing_grows_after_settling() -> None:
    policy = Threshold(start=0.3, settle=0.6)
    shrinks = [bool(policy.propose(context_of(low(8, 2), progress=at, previous=at - 0.1))) for at in (0.2, 0.3, 0.9)]
    grows = [bool(policy.propose(context_of(flat(8), progress=at, previous=at - 0.1))) for at in (0.2, 0.6, 0.7)]
    assert shrinks == [False, True, True]
    assert grows == [True, True, False]


def test_widths_are_tested_for_growth_once_in_a_cooldown() -> None:
    policy, steps = Threshold(cooldown=0.1, settle=1.0), [k / 40 for k in range(41)]
    grown = [
        now for before, now in pairwise(steps) if policy.propose(context_of(flat(8), progress=now, previous=before))
    ]
    assert grown == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


@pytest.mark.parametrize(("smallest", "size"), [(1, 1), (2, 2), (6, 6), (10, None), (20, None)])
def test_no_width_falls_below_the_smallest(smallest: int, size: int | None) -> None:
    found = decide(Threshold(prune=0.01, grow=0.9, largest_step=1, cooldown=0, smallest=smallest), low(10, 1))
    assert (found["0"].size if found else None) == size


def test_no_width_falls_below_what_its_layers_need() -> None:
    needs = replace(GRAPH, widths=Widths({**GRAPH.widths, "0": replace(GRAPH.widths["0"], smallest=3)}))
    policy = Threshold(prune=0.01, grow=0.9, largest_step=1, cooldown=0, smallest=1)
    assert policy.propose(context_of(low(8, 1)))["0"].size == 1
    assert policy.propose(context_of(low(8, 1), graph=needs))["0"].size == 3


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=24),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_proposal_is_a_size_that_the_width_can_take(
    values: list[float], prune: float, grow: float, largest_step: float, growth: float
) -> None:
    spectrum = sorted(values, reverse=True)
    size = len(spectrum)
    policy = Threshold(prune=prune, grow=grow, largest_step=largest_step, growth=growth, cooldown=0)
    width = measured(spectrum)
    for proposal in decide(policy, width).values():
        assert proposal.size != size
        if proposal.size < size:
            assert proposal.size >= 2
            assert size - proposal.size <= largest_step * size
            assert proposal.size >= slowly(list(width.energies), prune)
        else:
            assert 0 < proposal.size - size <= math.ceil(growth * size)


def test_growth_is_rounded_up() -> None:
    assert decide(Threshold(prune=0.01, grow=0.9, growth=0.01), flat(8))["0"].size == 9
    assert decide(Threshold(prune=0.01, grow=0.9, growth=0), flat(8)) == {}


@pytest.mark.parametrize("since", [0.05, 0.1, 0.15])
@pytest.mark.parametrize("last", [-3, 0, 3])
def test_a_change_of_direction_waits_for_the_cooldown(since: float, last: int) -> None:
    policy = Threshold(prune=0.01, grow=0.9, cooldown=0.1)
    shrinks = bool(decide(policy, low(8, 2, since_change=since, last_change=last)))
    grows = bool(decide(policy, flat(8, since_change=since, last_change=last)))
    assert shrinks == (since > 0.1 or last <= 0)
    assert grows == (since > 0.1 or last >= 0)


def flapping(policy: Threshold, events: int) -> list[int]:
    """The events at which a width changed that looks saturated at 8 units, and whose every further unit carries nothing."""
    size, reversals, last, at, seen = 8, 0, 0, -LONG_AGO, []
    for event in range(events):
        spectrum = [1.0] * 8 + [1e-4] * (size - 8)
        since = (event - at) / events
        measure = measured(spectrum, size=size, since_change=since, last_change=last, reversals=reversals)
        for proposal in decide(policy, measure).values():
            reversals += last * (proposal.size - size) < 0
            size, last, at = proposal.size, proposal.size - size, event
            seen.append(event)
    return seen


def test_widths_settle_instead_of_flapping() -> None:
    """Each reversal waits twice as long as the one before, so there are about log2 of the events, not a share of them."""
    settles = flapping(Threshold(prune=0.01, grow=0.9, cooldown=0.002), 1000)
    assert 4 < len(settles) <= 2 + math.log2(1000 / 2)
    waits = [two - one for one, two in pairwise(settles)]
    assert all(later >= 2 * sooner - 1 for sooner, later in pairwise(waits))
    assert len(flapping(Threshold(prune=0.01, grow=0.9, cooldown=0), 1000)) > 300, "without it they do flap"


def test_growth_in_one_direction_is_not_held_back_by_reversals() -> None:
    policy = Threshold(prune=0.01, grow=0.9)
    assert decide(policy, flat(8, since_change=0.01, last_change=2, reversals=9))
    assert not decide(policy, flat(8, since_change=0.5, last_change=-2, reversals=9))
    assert decide(policy, low(8, 2, since_change=0.05, last_change=-2, reversals=9))


def test_without_a_cooldown_nothing_waits() -> None:
    policy = Threshold(prune=0.01, grow=0.9, cooldown=0)
    assert decide(policy, low(8, 2, since_change=0.01, last_change=3))
    assert decide(policy, flat(8, since_change=0.01, last_change=-3))


def test_what_is_mixed_does_not_grow_but_shrinks() -> None:
    policy = Threshold(prune=0.01, grow=0.9)
    assert decide(policy, flat(8, growable=False)) == {}
    assert decide(policy, low(8, 2, growable=False))


def test_growth_above_the_largest_number_of_parameters_is_left_out() -> None:
    one = GRAPH.proposed_parameters({"0": 10})
    both = GRAPH.proposed_parameters({"0": 10, "2": 10})
    assert GRAPH.parameters < one < both
    measures = flat(8), flat(8, width="2")
    sizes = {
        limit: {name: p.size for name, p in decide(Threshold(0.01, 0.9, max_parameters=limit), *measures).items()}
        for limit in (one - 1, one, both - 1, both)
    }
    assert sizes[both] == {"0": 10, "2": 10}
    assert sizes[both - 1] == sizes[one] == {"0": 10}
    assert "0" not in sizes[one - 1]


def test_pruning_makes_room_for_growth_in_the_same_event() -> None:
    limit = GRAPH.parameters
    policy = Threshold(prune=0.01, grow=0.9, max_parameters=limit)
    assert decide(policy, flat(8)) == {}
    assert {name: p.size for name, p in decide(policy, flat(8), low(8, 2, width="2")).items()} == {"0": 10, "2": 4}


def test_the_most_saturated_width_grows_first() -> None:
    nearly = low(10, 9, width="0")
    limit = max(GRAPH.proposed_parameters({"0": 13}), GRAPH.proposed_parameters({"2": 10}))
    found = decide(Threshold(prune=0.01, grow=0.9, max_parameters=limit), nearly, flat(8, width="2"))
    assert list(found) == ["2"]


def test_a_width_without_any_energy_shrinks() -> None:
    found = decide(Threshold(prune=0.01, grow=0.9, cooldown=0), measured([0.0] * 8))
    assert found["0"].size == 4
    assert found["0"].reason == "4 units have less than 1.0 % of the mean energy: at most 0.0 %"


def test_proposing_is_pure() -> None:
    policy = Threshold(prune=0.01, grow=0.9)
    widths = flat(8), low(8, 2, width="2")
    before = copy.deepcopy(widths)
    assert decide(policy, *widths) == decide(policy, *widths)
    assert widths == before
    assert policy == Threshold(prune=0.01, grow=0.9)


@pytest.mark.parametrize("name", ["prune", "grow", "largest_step", "growth", "start", "settle", "cooldown"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf"), "0.5", None, True])
def test_values_outside_0_to_1_are_refused(name: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=rf"expected {name} to be a number in 0 … 1, got {value!r}"):
        Threshold(**{"prune": 0.01, "grow": 0.9, name: value})


@pytest.mark.parametrize(("name", "value", "least"), [("certain", -1, 0), ("smallest", 0, 1), ("max_parameters", 0, 1)])
def test_counts_out_of_range_are_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(PolicyError, match=rf"expected {name} to be a number of {least} or more, got {value}"):
        Threshold(**{"prune": 0.01, "grow": 0.9, name: value})


def test_above_max_parameters_the_least_energetic_go_even_where_all_is_saturated() -> None:
    graph = trace(
        nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)
    )
    context = context_of(measured([1.0] * 9 + [0.5]), measured([1.0] * 8, width="2"), graph=graph)
    bound = graph.parameters - 1
    found = Threshold(prune=0.01, grow=0.9, max_parameters=bound, cooldown=0).propose(context)
    # The last of "0" has 0.25 / 9.25 · 10 = 27 % of the mean with the doubled thresholds 2, 4, … 32 %; one of "2" has 100 %.
    assert {name: proposal.size for name, proposal in found.items()} == {"0": 9}
    assert found["0"].reason == "1 unit has less than 32.0 % of the mean energy: 24.3 %"
    assert Threshold(prune=0.01, grow=0.9, max_parameters=graph.parameters, growth=0).propose(context) == {}


def with_loss_tests(
    policy: Threshold, t_statistics: Mapping[str, float], *widths: WidthStatistics
) -> tuple[dict[str, Proposal], list[Any]]:
    """What is proposed with these results of the loss tests, and the sizes that were tested."""
    seen: list[Any] = []

    def loss_tests(sizes: Mapping[str, int]) -> dict[str, Evidence]:
        seen.append(dict(sizes))
        return {name: Evidence(0.1, t_statistics[name]) for name in sizes if name in t_statistics}

    return policy.propose(context_of(*widths, run_loss_tests=loss_tests)), seen


@pytest.mark.parametrize(("t_statistic", "grows"), [(3.99, False), (4.0, True), (-9.0, False), (None, True)])
def test_a_saturated_width_grows_only_if_it_passes_the_loss_test(t_statistic: float | None, grows: bool) -> None:
    """Where the test cannot be made, the spectrum decides alone."""
    found, seen = with_loss_tests(
        Threshold(prune=0.01, grow=0.9), {} if t_statistic is None else {"0": t_statistic}, flat(8)
    )
    assert seen == [{"0": 10}]
    assert set(found) == ({"0"} if grows else set())
    if t_statistic == 4.0:
        assert found["0"].reason.endswith("of the mean energy, t-statistic of new units 4.0 (threshold 4)")


def test_no_loss_test_is_run_where_nothing_would_grow_or_the_spectrum_decides_alone() -> None:
    policy = Threshold(prune=0.01, grow=0.9)
    assert with_loss_tests(policy, {}, low(8, 4)) == (decide(policy, low(8, 4)), [])
    assert with_loss_tests(policy, {}, flat(8, growable=False)) == ({}, [])
    assert with_loss_tests(policy, {}, flat(8, last_change=-1, since_change=0.01)) == ({}, [])
    assert with_loss_tests(replace(policy, certain=0), {"0": -9.0}, flat(8)) == (decide(policy, flat(8)), [])


def test_parameters_go_to_the_widths_that_pass_the_loss_test() -> None:
    """Each would fit alone; the more saturated one fails, and leaves room for the other."""
    limit = GRAPH.proposed_parameters({"0": 10})
    policy = Threshold(prune=0.01, grow=0.8, max_parameters=limit)
    less = measured([1.0] * 7 + [0.0], "2")
    assert set(decide(policy, flat(8), less)) == {"0"}
    assert set(with_loss_tests(policy, {"0": 0.0, "2": 5.0}, flat(8), less)[0]) == {"2"}


def test_only_sizes_that_would_fit_are_tested() -> None:
    limit = GRAPH.proposed_parameters({"2": 10})
    found, seen = with_loss_tests(
        Threshold(prune=0.01, grow=0.8, max_parameters=limit), {"2": 5.0}, flat(8), measured([1.0] * 8, "2")
    )
    assert GRAPH.proposed_parameters({"0": 10}) > limit
    assert seen == [{"2": 10}]
    assert set(found) == {"2"}
