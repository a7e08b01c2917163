"""The smallest rank within a tolerance: that of a search one by one, in few evaluations; what is not monotone is said."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import evolvenet
from evolvenet.lowrank.rank_choice import Within
from evolvenet.lowrank.tolerance import bisected
from tests.helpers.states import State

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.Flatten(),
        nn.Linear(216, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).double()


class Agreement:
    """Minus the relative error of the outputs, as a metric; counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.calls = 0
        self.expected = copy.deepcopy(model).eval()(X).detach()

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        with torch.no_grad():
            apart = model.eval()(X) - self.expected
        return -float(apart.square().sum() / self.expected.square().sum())


@pytest.mark.parametrize(("layer", "kind", "drop"), [("6", "svd", 0.02), ("0", "spatial", 0.02), ("3", "cp", 0.25)])
@pytest.mark.parametrize("data", [True, False])
def test_the_rank_is_that_of_a_search_one_by_one(layer: str, kind: str, drop: float, data: bool) -> None:
    model = network()
    metric = Agreement(model)
    batches = [X] if data else None
    report = evolvenet.factorize(model, {layer: (kind, Within(metric, drop))}, batches=batches)
    assert metric.calls == report.evaluations <= 12
    ranks = report[layer].ranks
    values: dict[int, float] = {}
    for rank in range(1, ranks[0] + 1):
        other = network()
        evolvenet.factorize(other, {layer: (kind, rank)}, batches=batches)
        values[rank] = Agreement(network())(other)
    assert values[ranks[0]] == pytest.approx(report.searches[0].found)
    assert [rank for rank, value in values.items() if value >= -drop] == [ranks[0]]


def test_layers_share_their_drops_in_the_order_of_execution() -> None:
    model = network().eval()
    metric = Agreement(model)
    report = evolvenet.factorize(
        model,
        {"8": Within(metric, 0.01), "6": Within(metric, 0.01), "0": ("spatial", Within(metric, 0.01))},
        batches=[X],
    )
    assert [search.layer for search in report.searches] == ["0", "6", "8"]
    assert [round(search.limit, 6) for search in report.searches] == [-0.01, -0.02, -0.03]
    assert metric(model) >= -0.03
    assert metric(model) == pytest.approx(report.searches[-1].found)


@pytest.mark.parametrize("drop", [0.02, 0.1])
def test_for_the_whole_model_one_share_of_energy_is_bisected(drop: float) -> None:
    model = network()
    metric = Agreement(model)
    report = evolvenet.factorize(model, Within(metric, drop), batches=[X])
    assert metric.calls == report.evaluations <= 10
    assert -drop <= metric(model) == pytest.approx(report.searches[0].found)
    assert report.after < report.before
    assert "all: metric" in str(report)
    if drop == 0.1:
        assert metric(model) < -0.02


def test_where_no_rank_is_within_the_tolerance_the_model_is_as_it_was() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    before = State.of(model, [optimizer])
    metric = Agreement(model)
    for ranks in (Within(metric, 0.0), {"6": Within(metric, 0.0)}):
        report = evolvenet.factorize(model, ranks, batches=[X], optimizers=optimizer)
        assert before.differences(model, [optimizer]) == []
        assert all(line.kind is None for line in report)
    assert "keeps the metric within the tolerance" in (report["6"].reason or "")
    assert "no rank within the tolerance" in str(report)


def test_a_metric_that_is_not_monotone_is_said_and_the_smallest_measured_rank_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(64, 64))

    def metric(model: nn.Module) -> float:
        rank = getattr(model[0], "ranks", (64,))[0]  # type: ignore[index]
        return float(rank >= 20 or rank in (9, 10, 11))

    with caplog.at_level(logging.WARNING):
        report = evolvenet.factorize(model, {"0": Within(metric, drop=0)})
    (search,) = report.searches
    assert report["0"].ranks == (10,)
    assert not search.monotone
    assert "not monotone" in str(report)
    assert "not monotone" in caplog.text


def test_smaller_may_be_better_and_what_evaluate_leaves_behind_is_undone() -> None:
    model = network().train()
    metric = Agreement(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(model: nn.Module) -> float:
        model.train()(X)
        return -metric(model)

    report = evolvenet.factorize(model, {"6": Within(loss, 0.05, mode="min")})
    assert report["6"].kind == "svd"
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_what_evaluate_must_not_do_is_refused() -> None:
    model = network()

    def trains(model: nn.Module) -> float:
        next(model.parameters()).add_(1)
        return 1.0

    with pytest.raises(
        evolvenet.FactorizationError, match=r"leave the parameters as they are, got others for 0\.weight"
    ):
        evolvenet.factorize(model, Within(trains, 0.1))
    with pytest.raises(evolvenet.FactorizationError, match="got NaN"):
        evolvenet.factorize(model, Within(lambda model: math.nan, 0.1))
    with pytest.raises(evolvenet.FactorizationError, match="expected a drop of 0 or more"):
        Within(lambda model: 0.0, -0.1)
    with pytest.raises(evolvenet.FactorizationError, match="no ranks with a budget"):
        evolvenet.factorize(model, Within(lambda model: 0.0, 0.1), parameters=100)


@given(st.lists(st.booleans(), max_size=200))
def test_bisection_finds_a_place_that_is_enough_and_of_rising_values_the_first(values: list[bool]) -> None:
    for each in (values, sorted(values)):
        place, known = bisected(len(each), lambda place, each=each: float(each[place]), 0.5)
        assert len(known) <= math.log2(len(each) + 1) + 4
        assert place is None or each[place]
        assert (place is None) == (not any(each[place] for place in known))
    first = next((place for place, value in enumerate(sorted(values)) if value), None)
    assert place == first
