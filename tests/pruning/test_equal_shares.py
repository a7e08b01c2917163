"""Sizes without data, and sizes for several targets from the same trials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import evolvenet
from evolvenet.errors import ResizeError
from evolvenet.pruning import allocation
from evolvenet.pruning.equal_shares import equal_shares
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import mlp


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 5), st.floats(0, 1.2))
def test_shares_are_equal_but_for_one_unit_and_nothing_that_fits_is_left(
    units: list[int], step: int, share: float
) -> None:
    sizes = {str(k): count for k, count in enumerate(units)}
    options = {name: sorted({*range(step, count, step), count}) for name, count in sizes.items()}

    def cost(chosen: Any) -> float:
        return sum((k + 1) * size for k, size in enumerate(chosen.values()))

    limit = share * cost(sizes)
    found = equal_shares(sizes, options, cost, limit)
    smallest = {name: each[0] for name, each in options.items()}
    assert cost(found) <= limit or found == smallest
    for name, each in options.items():
        assert all(cost({**found, name: size}) > limit for size in each if size > found[name])
    # The most and the least share, were each one step less or more.
    least = min(
        min((size for size in options[n] if size > found[n]), default=2 * units[int(n)]) / sizes[n] for n in found
    )
    most = max(max((size for size in options[n] if size < found[n]), default=0) / sizes[n] for n in found)
    assert most <= least + max(step / count for count in units) + 1e-9


def test_without_data_every_width_keeps_the_same_share_whatever_its_spectrum() -> None:
    """A spectrum would call all inner units beyond the 16 inputs of a layer superfluous."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)
    )
    graph = trace(model, torch.zeros(1, 16))
    sizes = evolvenet.allocate(model, graph, graph.parameters // 2)
    shares = {name: size / graph.widths[name].size for name, size in sizes.items()}
    assert max(shares.values()) - min(shares.values()) <= 1 / 16


def test_units_whose_weights_are_zero_go_first() -> None:
    model = mlp(8, 40, 40, 3)
    with torch.no_grad():
        model[0].weight[10:] = 0
        model[0].bias[10:] = 0
    graph = trace(model, torch.zeros(1, 8).double())
    live = {"0": 10, "2": 40}
    assert evolvenet.allocate(model, graph, graph.proposed_parameters(live)) == live


@pytest.mark.parametrize("with_batches", [False, True])
def test_other_targets_need_no_new_trials(with_batches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(6, 20, 10, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    batches = [torch.randn(64, 6).double()] if with_batches else None
    targets = [int(share * graph.parameters) for share in (0.8, 0.5, 0.3)]
    expected = [evolvenet.allocate(model, graph, target, batches) for target in targets]
    monkeypatch.setattr(allocation, "trial_curves", None)
    for one in expected:
        assert [one.at(target) for target in targets] == expected
    uniform = expected[0].at(targets[1], uniform="layers", multiple=5)
    assert all(size % 5 == 0 for size in uniform.values())
    assert bool(expected[0].curves) == with_batches
    with pytest.raises(ResizeError, match="fewest that the model can have, got 3"):
        expected[0].at(3)


def test_trials_take_the_shares_and_samples_that_are_given() -> None:
    model = mlp(6, 20, 10, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    batches = [torch.randn(64, 6).double()]
    few = evolvenet.allocate(model, graph, graph.parameters // 2, batches, shares=(0.5,), samples=16)
    assert [size for size, _ in few.curves["0"]] == [0, 10, 20]
    many = evolvenet.allocate(model, graph, graph.parameters // 2, batches, shares=(0.5,))
    assert few.curves["0"][1][1] != pytest.approx(many.curves["0"][1][1], rel=1e-3)
