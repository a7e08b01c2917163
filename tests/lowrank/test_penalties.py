"""Penalties of SVD training: 0 for orthonormal vectors, the singular values' measure there, and gradients that reduce both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import FactorizationError
from evolvenet.lowrank.penalties import orthogonality, sparsity

MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dense": (lambda: nn.Linear(12, 10), 5),
    "svd": (lambda: nn.Conv2d(6, 8, 3, groups=2), ("svd", 3)),
    "spatial": (lambda: nn.Conv2d(6, 8, (3, 2)), ("spatial", 4)),
}


def factorized(name: str) -> nn.Sequential:
    """A factorized layer, whose factors are those of an SVD."""
    torch.manual_seed(0)
    model = nn.Sequential(MODELS[name][0]()).double()
    evolvenet.factorize(model, {"0": MODELS[name][1]})
    return model


def mixed(name: str) -> nn.Sequential:
    """One with other factors."""
    model = factorized(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def singular_values(model: nn.Sequential) -> list[Tensor]:
    """Of each channel group, of the matrix that the kind unfolds the weight to."""
    chain: Any = model[0]
    weight, rank = chain.merged_weight.detach(), chain.ranks[0]
    if chain.kind == "spatial":
        return [torch.linalg.svdvals(weight.movedim(0, 2).flatten(2).flatten(0, 1))[:rank]]
    groups = weight.unflatten(0, (chain.factors[0].groups, -1)) if weight.dim() > 2 else weight[None]
    return [torch.linalg.svdvals(each.flatten(1))[:rank] for each in groups]


@pytest.mark.parametrize("name", MODELS)
def test_orthogonal_factors_have_no_penalty_and_their_norms_are_the_singular_values(name: str) -> None:
    model = factorized(name)
    assert bool(orthogonality(model) < 1e-24)
    values = singular_values(model)
    assert math.isclose(float(sparsity(model, "l1")), sum(float(each.sum()) for each in values), rel_tol=1e-9)
    hoyer = sum(float(each.sum() / each.square().sum().sqrt()) for each in values)
    assert math.isclose(float(sparsity(model)), hoyer, rel_tol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("penalty", [orthogonality, sparsity, lambda model: sparsity(model, "l1")])
def test_its_gradient_reduces_a_penalty(name: str, penalty: Callable[[nn.Module], Tensor]) -> None:
    model = mixed(name)
    before = penalty(model)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    assert float(penalty(model)) < float(before)


def test_the_orthogonality_reached_by_descent_makes_the_norms_singular_values() -> None:
    model = mixed("dense")
    assert not math.isclose(float(sparsity(model, "l1")), float(singular_values(model)[0].sum()), rel_tol=1e-2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = orthogonality(model)
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore
    assert bool(orthogonality(model) < 1e-8)
    assert math.isclose(float(sparsity(model, "l1")), float(singular_values(model)[0].sum()), rel_tol=1e-3)


def test_the_norms_of_factors_leave_orthogonality_and_a_scale_leaves_hoyers_measure() -> None:
    model = mixed("dense")
    before = float(orthogonality(model)), float(sparsity(model))
    with torch.no_grad():
        model[0].factors[0].weight.mul_(3)  # pyright: ignore
    assert (float(orthogonality(model)), float(sparsity(model))) == pytest.approx(before)


def test_a_direction_of_zeros_has_finite_gradients() -> None:
    model = factorized("dense")
    with torch.no_grad():
        model[0].factors[0].weight[1] = 0  # pyright: ignore
    (orthogonality(model) + sparsity(model)).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)


def test_a_model_without_factors_and_another_measure_are_refused() -> None:
    with pytest.raises(FactorizationError, match=r"Call evolvenet\.factorize first"):
        orthogonality(nn.Linear(2, 2))
    with pytest.raises(FactorizationError, match="expected a measure of hoyer, l1, got 'l2'"):
        sparsity(factorized("dense"), "l2")  # pyright: ignore
