"""Losses between trials: measured ones stay, falling curves fall, and exponential losses are divided as they should be."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolvenet.pruning.marginal_analysis import convex, fit_to_cost, loss_at
from evolvenet.pruning.trials import filled

LOSSES = st.lists(st.floats(1e-6, 10), min_size=1, max_size=6)


@given(LOSSES)
def test_what_was_measured_stays_and_falling_losses_fall(losses: list[float]) -> None:
    falling = sorted(losses, reverse=True)
    curve = [(7 * place, loss) for place, loss in enumerate([*falling, 0.0])]
    found = filled(curve)
    assert set(curve) <= set(found)
    assert [size for size, _ in found] == sorted({size for size, _ in found})
    values = [loss for _, loss in found]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(values))


def test_two_exponential_losses_are_divided_near_their_optimum() -> None:
    rates, sizes = {"a": 0.05, "b": 0.08}, (10, 20, 50, 70, 100)

    def true(name: str, size: int) -> float:
        return math.exp(-rates[name] * size) - math.exp(-rates[name] * 100)

    curves = {name: [(0, 11.0), *((size, true(name, size)) for size in sizes)] for name in rates}
    options = {name: range(1, 101) for name in rates}

    def divided(hulls: dict) -> float:
        start = dict.fromkeys(rates, 100)
        found = fit_to_cost(hulls, options, start, lambda chosen: sum(chosen.values()), limit=70)
        return sum(true(name, size) for name, size in found.items())

    best = min(true("a", size) + true("b", 70 - size) for size in range(1, 70))
    lines = divided({name: convex(curve) for name, curve in curves.items()})
    assert divided({name: convex(filled(curve)) for name, curve in curves.items()}) == pytest.approx(best, rel=0.01)
    assert lines > 1.1 * best
    assert loss_at(filled(curves["a"]), 35) == pytest.approx(true("a", 35), rel=0.1)
