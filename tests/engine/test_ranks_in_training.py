"""Ranks in the events of a run: rotated, with the optimizer's state and every replica, and better than without."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import evolvenet
from evolvenet.graph.width_graph import WidthGraph, Widths
from evolvenet.policies.base import Policy
from evolvenet.surgery.optimizer_state import validate_state
from evolvenet.tracing.trace import trace
from tests.helpers.factorized import correlated, decaying, mixed_chain, seeded
from tests.helpers.policies import Fixed


def network() -> nn.Sequential:
    """Two factorized layers of full rank, their factors mixed."""
    generator = seeded()
    one, two = (decaying(nn.Linear(*sizes), generator) for sizes in ((20, 24), (24, 16)))
    return nn.Sequential(
        mixed_chain(one, "svd", (20,), generator), nn.ReLU(), mixed_chain(two, "svd", (16,), generator), nn.Tanh()
    )


X = correlated(512, 20, seeded(1)) / 3
ORDINARY = ["0.1", "2.1"]


def run(model: nn.Module, policy: Policy, optimizer: Optimizer | None = None, events: int = 4) -> evolvenet.Evolver:
    evolver = evolvenet.Evolver(model, optimizer, policy, X[:2], fixed=ORDINARY)
    for event in range(events):
        for part in X.split(128):
            evolver.observe(part)
        assert evolver.step(progress=event / max(1, events - 1)).skipped is None
    return evolver


def error(model: nn.Module, whole: nn.Module) -> float:
    with torch.no_grad():
        outputs = whole(X)
        return float((model(X) - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum())


def without_marks(graph: WidthGraph) -> WidthGraph:
    """The graph with its ranks as ordinary widths."""
    return replace(graph, widths=Widths({n: replace(width, rank_of=None) for n, width in graph.widths.items()}))


def test_a_budget_over_ranks_ends_with_less_error_than_the_same_cut_without_a_rotation() -> None:
    model, whole = network(), network()
    most = sum(parameter.numel() for parameter in model.parameters())
    evolver = run(model, evolvenet.Budget(params=0.4 * most, by=0.6))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.4 * most
    changed = {change.width for event in evolver.history.events for change in event.changes}
    assert changed == {"0.0", "2.0"}
    other = network()
    evolvenet.prune(other, without_marks(trace(other, X[:2])), evolver.graph.sizes, batches=list(X.split(128)))
    assert error(model, whole) < 0.5 * error(other, whole)


def test_state_and_replicas_go_through_the_rotation_of_an_event() -> None:
    model = network()
    average = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    evolver = evolvenet.Evolver(
        model, optimizer, Fixed({"0.0": 15, "2.0": 12}), X[:2], copies=[average], fixed=ORDINARY
    )

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(X) - X[:, :16].tanh()).square().mean().backward()
            optimizer.step()
            evolver.observe(X)
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)

    train(5)
    wholes = [deepcopy(each) for each in (model, average)]
    event = evolver.step(progress=0.5)
    assert event.skipped is None
    assert event.sizes["0.0"] == 15
    for each, whole in zip((model, average), wholes, strict=True):
        assert trace(each, X[:2]).sizes | {"0.1": 24} == evolver.graph.sizes | {"0.1": 24}
        assert error(each, whole) < 0.02
    validate_state(optimizer)
    state = optimizer.state[model.get_parameter("0.0.weight")]
    assert state["exp_avg"].shape == (15, 20)
    assert bool((state["exp_avg_sq"] > 0).all())
    train(3)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_rank_that_grows_again_keeps_the_function() -> None:
    model = network()
    evolver = run(model, Fixed({"0.0": 12}), events=1)
    whole = deepcopy(model)
    evolver.policy = Fixed({"0.0": 14})
    evolver.observe(X)
    evolver.step(progress=0.9)
    assert evolver.graph.sizes["0.0"] == 14
    assert error(model, whole) < 1e-20


@pytest.mark.parametrize("policy", [evolvenet.Threshold(prune=0.3), evolvenet.Budget(params=900, trials=True)], ids=str)
def test_policies_go_by_the_outputs_and_not_by_the_basis(policy: Policy) -> None:
    sizes: list[dict[str, int]] = []
    errors: list[float] = []
    for turned in (False, True):
        model = network()
        if turned:
            _turn(model)
        evolver = run(model, policy, events=2)
        sizes.append(evolver.graph.sizes)
        errors.append(error(model, network()))
    assert sizes[0] == sizes[1] != {"0.0": 20, "2.0": 16}
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def _turn(model: nn.Sequential) -> None:
    for name, size in (("0", 20), ("2", 16)):
        matrix: Tensor = torch.linalg.qr(torch.randn(size, size, generator=seeded(9)).double())[0]
        made, used = (model.get_parameter(f"{name}.{k}.weight") for k in (0, 1))
        made.data, used.data = 3 * matrix @ made.data, used.data @ matrix.mT / 3
