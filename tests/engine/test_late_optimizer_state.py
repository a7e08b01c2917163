"""Optimizer state that first appears in a step and could not follow: refused right then, and the run goes on."""

# nn.Module types its children and attributes loosely, and optimizers are written here as people write them.
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import evolvenet
from tests.helpers.policies import Fixed

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))


class Blocks(Optimizer):
    """Momenta in blocks of 16 numbers, rounded to bytes, each with its largest value, as 8-bit optimizers have them."""

    key = "blocks"

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            count = -(-p.numel() // 16)
            state = self.state[p]
            if not state:
                state.update(blocks=torch.zeros(count, 16, dtype=torch.int8), largest=torch.ones(count))
            momentum = (state["blocks"] * state["largest"][:, None] / 127).flatten()[: p.numel()].view_as(p)
            momentum = momentum * 0.9 + p.grad
            padded = nn.functional.pad(momentum.flatten(), (0, count * 16 - p.numel())).view(count, 16)
            state["largest"] = padded.abs().amax(1).clamp_min(1e-12)
            state["blocks"] = (padded / state["largest"][:, None] * 127).round().to(torch.int8)
            p.sub_(momentum, alpha=self.defaults["lr"])


class Preconditioned(Optimizer):
    """One matrix for each axis of a weight, as Shampoo has them."""

    key = "factors"

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            factors = self.state[p].setdefault("factors", [torch.eye(size) for size in p.shape])
            gradient = p.grad
            for dim, factor in enumerate(factors):
                rows = p.grad.movedim(dim, 0).reshape(len(factor), -1)
                factor.add_(rows @ rows.T)
                turned = gradient.movedim(dim, 0)
                solved = torch.linalg.solve(factor, turned.reshape(len(factor), -1))
                gradient = solved.view_as(turned).movedim(0, dim)
            p.sub_(gradient, alpha=self.defaults["lr"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))


def train(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    (model(X) - X[:, :2].sin()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [Blocks, Preconditioned])
def test_it_is_refused_by_name_once_after_the_first_step_and_training_goes_on(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def run(evolves: bool) -> list[torch.Tensor]:
        model = network()
        optimizer = make(model.parameters())
        evolver = evolvenet.Evolver(model, optimizer, Fixed({"0": 5}), X[:2]) if evolves else None
        assert evolver is None or evolver.off is None
        for step in range(6):
            if evolver is not None:
                evolver.observe(X)
                assert (evolver.off is not None) == (step > 0)
            train(model, optimizer)
            if evolver is not None and step % 2:
                assert evolver.step().skipped == evolver.off
        return list(model.parameters())

    with caplog.at_level("WARNING", logger="evolvenet"):
        evolved = run(True)
    (warning,) = [record.message for record in caplog.records]
    assert make.__name__ in warning
    assert repr(make.key) in warning
    assert all(torch.equal(one, two) for one, two in zip(evolved, run(False), strict=True))


@pytest.mark.parametrize("make", [Blocks, Preconditioned])
def test_state_made_after_the_last_batch_that_was_observed_skips_the_event(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = make(model.parameters())
    evolver = evolvenet.Evolver(model, optimizer, Fixed({"0": 5}), X[:2])
    evolver.observe(X)
    train(model, optimizer)
    with caplog.at_level("WARNING", logger="evolvenet"):
        event = evolver.step()
    (warning,) = [record.message for record in caplog.records]
    assert make.__name__ in warning
    assert repr(make.key) in warning
    assert event.skipped == evolver.off is not None
    assert model[0].out_features == 12
    train(model, optimizer)
