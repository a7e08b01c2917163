"""`Price`: units below the price are removed, widths above the band grow, in steps that become smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet import Evolver, PolicyError, Price, trace
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import PolicyContext, Proposal
from tests.helpers.small_models import mlp

MODEL = mlp(6, 20, 20, 3)
X = torch.zeros(1, 6).double()
GRAPH = trace(MODEL, X)
EACH = {"0": 6 + 1 + 20, "2": 20 + 1 + 3}
"""Parameters of a unit."""
CONSTANT = Price(price=1.0, rise=0.0, settle=0.0, most=1.0)


def line(name: str, price: float) -> list[tuple[int, float]]:
    """A curve on which every unit has a loss of `price` a thousand parameters."""
    return [(0, 20 * EACH[name] * price / 1000), (20, 0.0)]


def measured(name: str, **rest: Any) -> WidthStatistics:
    return WidthStatistics(name, 20, (1.0,) * 20, **{"events_since_change": 99, "growable": True, **rest})


def decide(
    policy: Price, curves: Mapping[str, Sequence[tuple[int, float]]], progress: float = 0.5, **rest: Any
) -> dict[str, Proposal]:
    """What is proposed after a share of a run."""
    context = PolicyContext(
        GRAPH,
        progress,
        GRAPH.sizes,
        measure=lambda: {name: measured(name, **rest) for name in curves},
        count_costs=lambda: Costs.of(MODEL, GRAPH, X),
        run_trials=lambda **_: curves,
    )
    return policy.propose(context)


def sizes(found: Mapping[str, Proposal]) -> dict[str, int]:
    return {name: proposal.size for name, proposal in found.items()}


@pytest.mark.parametrize(("loss", "size"), [(0.99, 15), (1.01, None), (1.49, None), (1.51, 23)])
def test_below_the_price_units_are_removed_and_above_the_band_they_are_added(loss: float, size: int | None) -> None:
    found = decide(CONSTANT, {"0": line("0", loss)})
    assert sizes(found) == ({} if size is None else {"0": size})


def test_the_cut_ends_where_the_loss_per_cost_reaches_the_price() -> None:
    """That of the last three is half of it, that of the others twice."""
    unit = EACH["0"] / 1000
    curve = [(0, 17 * 2 * unit + 1.5 * unit), (17, 1.5 * unit), (20, 0.0)]
    found = decide(CONSTANT, {"0": curve})
    assert sizes(found) == {"0": 17}
    assert found["0"].reason == "3 units hold 0.5 of the outputs' variance a thousand params (price 1)"


def test_the_losses_of_all_cuts_of_one_event_add_up_to_at_most_the_most() -> None:
    """Five units of "0" lose 0.027, of "2" 0.108: the smaller loss comes first."""
    for names in (("0", "2"), ("2", "0")):
        curves = {name: line(name, {"0": 0.2, "2": 0.9}[name]) for name in names}
        assert sizes(decide(CONSTANT, curves)) == {"0": 15, "2": 15}
        assert sizes(decide(replace(CONSTANT, most=0.12), curves)) == {"0": 15}
        assert sizes(decide(replace(CONSTANT, most=0.14), curves)) == {"0": 15, "2": 15}


@pytest.mark.parametrize(
    ("rest", "pruned", "grown"),
    [
        ({"last_change": 3, "events_since_change": 2}, False, True),
        ({"last_change": 3, "events_since_change": 3}, True, True),
        ({"last_change": -3, "events_since_change": 2}, True, False),
        ({"last_change": -3, "events_since_change": 3}, True, True),
        ({"growable": False}, True, False),
    ],
)
def test_after_a_change_the_opposite_one_waits_for_the_cooldown(
    rest: dict[str, Any], pruned: bool, grown: bool
) -> None:
    assert bool(decide(CONSTANT, {"0": line("0", 0.5)}, **rest)) == pruned
    assert bool(decide(CONSTANT, {"0": line("0", 9.0)}, **rest)) == grown


def test_steps_become_smaller_towards_the_end_and_widths_keep_their_fewest() -> None:
    settling = Price(price=1.0, rise=0.0, smallest=18)
    assert sizes(decide(settling, {"0": line("0", 9.0)}, progress=0.0)) == {"0": 23}
    assert sizes(decide(settling, {"0": line("0", 9.0)}, progress=0.9)) == {"0": 21}
    assert sizes(decide(settling, {"0": line("0", 0.1)}, progress=0.0)) == {"0": 18}
    assert sizes(decide(settling, {"0": line("0", 0.1)}, progress=0.9)) == {"0": 19}


@pytest.mark.parametrize(
    ("progress", "pruned", "grown"), [(0.0, 15, 23), (0.3, 18, 22), (0.49, 19, 21), (0.5, None, None)]
)
def test_widths_stay_once_the_steps_have_shrunk_to_nothing(
    progress: float, pruned: int | None, grown: int | None
) -> None:
    settling = Price(price=1.0, rise=0.0, settle=0.5)
    for loss, size in ((0.1, pruned), (9.0, grown)):
        assert sizes(decide(settling, {"0": line("0", loss)}, progress)) == ({} if size is None else {"0": size})


@pytest.mark.parametrize(("progress", "price"), [(0.0, 0.25), (0.2, 0.5), (0.4, 1.0), (0.9, 1.0)])
def test_the_price_rises_to_its_height(progress: float, price: float) -> None:
    policy = Price(price=1.0, rise=0.4, low=0.25)
    assert policy.now(progress) == pytest.approx(price)
    assert sizes(decide(policy, {"0": line("0", 0.98 * price)}, progress))["0"] < 20
    assert decide(policy, {"0": line("0", 1.02 * price)}, progress) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"price": 0},
        {"price": float("nan")},
        {"band": 0.9},
        {"kind": "latency"},
        {"growth": 1.1},
        {"rise": -0.1},
        {"settle": 1.1},
        {"low": 0},
        {"low": 1.1},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(wrong))):
        Price(**{"price": 1.0, **wrong})


def test_a_wide_and_a_narrow_start_come_nearer_in_a_real_run() -> None:
    """100 times as many units at the start, less than three times as many at the end; the same task, the same price."""

    def end(width: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
        teacher = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        evolver = Evolver(model, optimizer, Price(price=1.0), torch.zeros(1, 8))
        for step in range(1, 601):
            x = torch.randn(256, 8)
            evolver.observe(x)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), teacher(x).detach()).backward()
            optimizer.step()
            if step % 20 == 0:
                evolver.step(at=step, progress=step / 600)
        return evolver.graph.sizes["0"]

    wide, narrow = end(200), end(2)
    assert max(wide, narrow) < 3 * min(wide, narrow)
    assert narrow > 4
    assert wide < 80


@pytest.mark.parametrize("kind", ["params", "macs", "bytes"])
def test_the_price_is_per_thousand_of_the_given_kind(kind: str) -> None:
    """One percent above and below the price of a unit's cost of this kind."""
    unit = {"params": EACH["0"], "macs": EACH["0"] - 1, "bytes": 8 * EACH["0"]}[kind] / 1000
    policy = replace(CONSTANT, kind=kind, price=0.1)
    assert decide(policy, {"0": [(0, 2.02 * unit), (20, 0.0)]}) == {}
    assert sizes(decide(policy, {"0": [(0, 1.98 * unit), (20, 0.0)]})) == {"0": 15}


@pytest.mark.parametrize(("saved", "most", "loss"), [(3000, 1.0, 0.3), (3000, 0.2, 0.2), (-5, 1.0, 0.0)])
def test_a_block_may_lose_the_price_of_what_it_saves_and_no_more_than_the_most(
    saved: float, most: float, loss: float
) -> None:
    policy = replace(CONSTANT, kind="macs", price=0.1, most=most)
    context = PolicyContext(GRAPH, 0.5, GRAPH.sizes, measure=dict)
    kinds = {"macs": saved, "params": 1e9}
    assert policy.block_loss(context, "a.block", kinds.__getitem__, lambda _: 0.0) == pytest.approx(loss)
