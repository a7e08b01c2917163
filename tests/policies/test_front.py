"""`Front`: each budget has its span, sets out from the one before it, and is met at the span's end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evolvenet import Budget, Evolver, Front, PolicyError
from evolvenet.measurement.cost import parameters
from tests.helpers.small_models import wide

POINTS = (12_000, 5_000, 1_500)


def front(**options: Any) -> Front:
    return Front([Budget(params=amount, by=0.5, growth=0, smallest=1) for amount in POINTS], **options)


def test_one_run_passes_through_all_points() -> None:
    policy, model = front(spans=[1, 2, 1]), wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 5, (64,))
    evolver, seen = Evolver(model, optimizer, policy, x[:1]), {}
    for event in range(40):
        evolver.observe(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert evolver.step(progress=event / 40).skipped is None
        seen[event] = parameters(model)
    # Where a unit is 3 % of the network, it cannot come nearer from above.
    for last, amount, near in zip((9, 29, 39), POINTS, (0.98, 0.98, 0.95), strict=True):
        assert near * amount <= seen[last] <= amount
    # Held in the second half of each span, and nothing is measured there.
    assert seen[5] == seen[9]
    assert seen[20] == seen[29]
    assert all(event.effective_rank == {} for event in evolver.history.events[21:30])
    assert all(two <= one for one, two in pairwise(seen.values()))


@given(
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.floats(0, 1),
)
def test_the_target_never_rises_and_ends_at_each_point(spans: list[float], progress: float) -> None:
    policy, start = front(spans=spans), 20_000
    assert policy.target(start, progress) >= policy.target(start, min(1.0, progress + 0.05)) - 1e-6
    for end, amount in zip(policy.ends, POINTS, strict=True):
        assert policy.target(start, end * (1 - 1e-9)) == pytest.approx(amount)


def test_each_budget_sets_out_from_the_one_before_it() -> None:
    """Half of the way to a budget, an eighth of the difference is left (Zhu and Gupta 2017)."""
    policy = Front([Budget(params=500, by=0.5), Budget(params=100, by=0.25)], spans=[1, 3])
    assert policy.target(9_000, 0.0) == 9_000
    assert policy.target(9_000, 0.0625) == 500 + 8_500 / 8
    assert [policy.target(9_000, progress) for progress in (0.125, 0.2)] == [500, 500]
    assert policy.target(9_000, 0.25 + 0.75 * 0.125) == 100 + 400 / 8
    assert [policy.target(9_000, progress) for progress in (0.25 + 0.75 * 0.25, 1.0)] == [100, 100]


def test_spans_are_equal_by_default() -> None:
    assert front().ends == pytest.approx((1 / 3, 2 / 3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": []}, "one or more budgets of one kind"),
        ({"points": [Budget(params=5), Budget(macs=5)]}, "got params, macs"),
        ({"points": [Budget(params=5)], "spans": [1, 2]}, "one span for each of 1 points, got 2"),
        ({"points": [Budget(params=5)], "spans": [0]}, "spans above 0"),
        ({"points": [Budget(params=5)], "spans": [-1]}, "each span to be"),
    ],
)
def test_wrong_fronts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Front(**options)
