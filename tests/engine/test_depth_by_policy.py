"""Policies with `depth=True` remove residual blocks at events: within what they allow, revertibly, and resumed bit by bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.surgery.remaining_layers import RemainingLayers
from evolvenet.surgery.removed_block import RemovedBlock


class Layer(nn.Module):
    """A layer with a place in a cache, as in decoders of the transformers library."""

    def __init__(self, place: int, width: int) -> None:
        super().__init__()
        self.layer_idx, self.up, self.down = place, nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Stack(nn.Module):
    """Three layers in a list, each with widths of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(Layer(place, 8 + place) for place in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


class Places(Stack):
    """The same without places in a cache."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            del layer.layer_idx


def network(kind: type[Stack] = Stack, scale: float = 1e-3) -> Any:
    """Its second layer adds next to nothing."""
    torch.manual_seed(0)
    model: Any = kind().double()
    with torch.no_grad():
        model.layers[1].down.weight.mul_(scale)
        model.layers[1].down.bias.zero_()
    return model


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).double()


def train(model: nn.Module, evolver: evolvenet.Evolver, steps: int) -> None:
    for _ in range(steps):
        evolver.observe(X)
        evolver.optimizers[0].zero_grad()
        (model(X) - X[:, :3]).square().mean().backward()
        evolver.optimizers[0].step()


def run(policy: Any, model: Any, lr: float = 1e-4, **options: Any) -> evolvenet.Evolver:
    return evolvenet.Evolver(model, torch.optim.AdamW(model.parameters(), lr=lr), policy, X, **options)


POLICIES = [
    evolvenet.Threshold(depth=True),
    evolvenet.Price(price=1e-4, rise=0, depth=True),
    evolvenet.Budget(params=150, by=0.5, depth=True),
    evolvenet.Front(points=[evolvenet.Budget(params=200, depth=True), evolvenet.Budget(params=100)]),
]


@pytest.mark.parametrize("kind", [Stack, Places])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_policy_removes_what_adds_nothing_and_nothing_else(policy: Any, kind: type[Stack]) -> None:
    model = network(kind)
    evolver = run(policy, model, copies=[average := copy.deepcopy(model)])
    train(model, evolver, 2)
    before = model(X)
    event = evolver.step(progress=0.4)
    assert event.skipped is None
    assert event.removed_blocks == ("layers.1",)
    assert "removed layers.1" in str(evolver.history)
    assert len([each for each in model.layers if not isinstance(each, RemovedBlock)]) == 2
    assert torch.dist(model(X), before) < 0.2 * before.norm()
    held = {id(each) for each in evolver.optimizers[0].param_groups[0]["params"]}
    assert held == {id(each) for each in model.parameters()}
    assert [each.shape for each in average.parameters()] == [each.shape for each in model.parameters()]
    train(model, evolver, 2)
    assert evolver.step(progress=0.45).removed_blocks == ()


def test_without_depth_blocks_stay() -> None:
    model = network()
    evolver = run(evolvenet.Threshold(), model)
    train(model, evolver, 2)
    assert evolver.step(progress=0.4).removed_blocks == ()
    assert len(model.layers) == 3


def test_what_is_fixed_or_not_trained_stays() -> None:
    model = network()
    evolver = run(evolvenet.Threshold(depth=True), model, fixed=["layers.1.up"])
    train(model, evolver, 1)
    assert evolver.step(progress=0.4).removed_blocks == ()
    model = network()
    model.layers[1].requires_grad_(False)
    evolver = run(evolvenet.Threshold(depth=True), model)
    train(model, evolver, 1)
    assert evolver.step(progress=0.4).removed_blocks == ()


def test_layers_that_move_up_keep_their_first_sizes_their_past_and_what_was_fixed() -> None:
    model = network()
    evolver = run(evolvenet.Threshold(depth=True, largest_step=0.2, prune=0.05), model)
    assert evolver.history.initial.sizes == {"enter": 6, "layers.0.up": 8, "layers.1.up": 9, "layers.2.up": 10}
    train(model, evolver, 1)
    assert evolver.step(progress=0.4).removed_blocks == ("layers.1",)
    assert evolver.history.initial.sizes == {"enter": 6, "layers.0.up": 8, "layers.1.up": 10}
    assert evolver.original.sizes["layers.1.up"] == 10
    fixed = run(evolvenet.Threshold(depth=True), moved := network(), fixed=["layers.2.*", "layers.0.down"])
    train(moved, fixed, 1)
    assert fixed.step(progress=0.4).removed_blocks == ("layers.1",)
    assert set(fixed.graph.sizes) == {"layers.0.up"}
    again = run(evolvenet.Threshold(depth=True), copy.deepcopy(moved), fixed=["layers.0.up"])
    again.load_state_dict(fixed.state_dict())
    assert set(again.graph.sizes) == {"layers.0.up"}


class Judge:
    """Removes what moves the outputs by little; judged."""

    metric, depth = "metric", True

    def propose(self, context: Any) -> dict[str, Any]:
        return {}

    def block_loss(self, context: Any, path: str, saved: Any, accepted: Any) -> float:
        return 0.01

    def record(self, state: Any, widths: Any) -> Any:
        return [*(state or []), list(widths)]

    def judge(self, state: Any, value: float) -> Any:
        return evolvenet.policies.base.Judgement("keep" if value > 0 else "undo", state, "no good")


@pytest.mark.parametrize("kind", [Stack, Places])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_removal_that_is_judged_badly_is_taken_back_to_the_last_bit(
    kind: type[Stack], resumed: bool, tmp_path: Path
) -> None:
    model = network(kind)
    evolver = run(Judge(), model, copies=[average := copy.deepcopy(model)])
    train(model, evolver, 2)
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(evolver.optimizers[0].state_dict())
    sizes, names = dict(evolver.graph.sizes), dict(evolver.history.initial.sizes)
    assert evolver.step().removed_blocks == ("layers.1",)
    assert evolver.step().removed_blocks == ()
    train(model, evolver, 2)
    if resumed:
        evolvenet.save(model, tmp_path / "net.pt")
        torch.save([evolver.state_dict(), evolver.optimizers[0].state_dict()], tmp_path / "state.pt")
        own, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
        model = evolvenet.load(network(kind), tmp_path / "net.pt")
        evolver = run(Judge(), model, copies=[average])
        evolver.load_state_dict(own)
        evolver.optimizers[0].load_state_dict(optimizer)
    event = evolver.judge(-1.0)
    assert event is not None
    assert event.skipped is None
    assert event.restored_blocks == ("layers.1",)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    now = evolver.optimizers[0].state_dict()
    assert now["param_groups"][0]["params"] == moments["param_groups"][0]["params"]
    for place, entries in moments["state"].items():
        assert all(torch.equal(value, now["state"][place][key]) for key, value in entries.items())
    assert (evolver.graph.sizes, evolver.history.initial.sizes) == (sizes, names)
    assert [each.shape for each in average.parameters()] == [each.shape for each in model.parameters()]
    train(model, evolver, 2)
    assert evolver.step().removed_blocks == ("layers.1",)
    assert evolver.judge(1.0) is None


def test_tolerance_takes_a_block_back_and_leaves_it_for_a_while() -> None:
    policy = evolvenet.Tolerance(metric="acc", drop=0.0, validations=1, patience=2, share=0.02, depth=True)
    model = network()
    evolver = run(policy, model)
    train(model, evolver, 1)
    assert evolver.step().removed_blocks == ()
    evolver.judge(0.9)
    train(model, evolver, 1)
    assert evolver.step().removed_blocks == ("layers.1",)
    event = evolver.judge(0.8)
    assert event is not None
    assert event.restored_blocks == ("layers.1",)
    assert len(model.layers) == 3
    train(model, evolver, 1)
    assert evolver.step().removed_blocks == ()


def test_a_removal_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    evolver = run(evolvenet.Threshold(depth=True), model)
    train(model, evolver, 1)
    weights, names = copy.deepcopy(model.state_dict()), dict(evolver.history.initial.sizes)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no trace")

    monkeypatch.setattr("evolvenet.engine.evolver_cuts.trace_for_training", fail)
    assert evolver.step(progress=0.4).removed_blocks == ()
    assert len(model.layers) == 3
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2]
    assert list(model.state_dict()) == list(weights)
    assert evolver.history.initial.sizes == names
    held = {id(each) for each in evolver.optimizers[0].param_groups[0]["params"]}
    assert held == {id(each) for each in model.parameters()}


def test_a_list_without_layers_is_recorded_with_factors_inside_of_it(tmp_path: Path) -> None:
    model = network(scale=0.0)
    evolvenet.factorize(model, {"layers.2.up": 2, "layers.1.up": 2})
    assert evolvenet.remove_blocks(model, X) == {"layers.1": 0.0}
    assert isinstance(model.layers, RemainingLayers)
    evolvenet.save(model, tmp_path / "net.pt")
    again: Any = evolvenet.load(network(), tmp_path / "net.pt")
    assert torch.equal(again(X), model(X))
    assert [layer.layer_idx for layer in again.layers] == [0, 1]
    evolvenet.save(network(), tmp_path / "whole.pt")
    evolvenet.load(again, tmp_path / "whole.pt")
    assert len(again.layers) == 3
    assert torch.equal(again(X), network()(X))
