"""Optimizer state across W → B·A: the mapped moments are those of the factors' own gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import evolvenet
from evolvenet.errors import FactorizationError
from evolvenet.lowrank.factor_state import moments_of

LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(7, 9), 3, (4, 7)),
    "svd": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), ("svd", 2), (2, 4, 5, 5)),
    "spatial": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2), ("spatial", 3), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), ("svd", 2), (2, 4, 5, 5)),
}


def trained(name: str, make: Any, seed: int = 0) -> tuple[nn.Sequential, Any, torch.Tensor]:
    """A network of one layer in float64, an optimizer with state, and the exact gradient at the weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(LAYERS[name][0]()).double()
    optimizer = make(model.parameters())
    model(torch.randn(LAYERS[name][2], dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    return model, optimizer, gradient.clone()


@pytest.mark.parametrize("name", LAYERS)
def test_first_moments_are_those_of_the_gradients_that_autograd_gives_the_factors(name: str) -> None:
    model, optimizer, gradient = trained(name, lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
    evolvenet.factorize(model, {"0": LAYERS[name][1]}, optimizers=[optimizer], state="projected")
    chain = model[0]
    (chain.merged_weight * gradient).sum().backward()  # pyright: ignore
    for factor in chain.factors:  # pyright: ignore
        torch.testing.assert_close(optimizer.state[factor.weight]["momentum_buffer"], factor.weight.grad)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 6), st.integers(0, 99))
def test_second_moments_are_variances_for_independent_entries_of_the_gradient(
    rank: int, rows: int, columns: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(8 * columns, 8 * rows, bias=False).double()
    model, weight = nn.Sequential(layer), layer.weight
    optimizer = torch.optim.AdamW([weight])
    scale = torch.rand_like(weight) + 0.1
    optimizer.state[weight] = {
        "step": torch.tensor(7.0),
        "exp_avg": scale.detach().clone(),
        "exp_avg_sq": scale.detach(),
    }
    evolvenet.factorize(model, {"0": rank}, optimizers=[optimizer], state="projected")
    first, last = (factor.weight.detach() for factor in model[0].factors)  # pyright: ignore
    # Var(Σᵢ bᵢᵣ·gᵢⱼ) = Σᵢ bᵢᵣ²·Var(gᵢⱼ), in loops.
    slow = torch.stack([sum(last[i, r] ** 2 * scale[i] for i in range(len(scale))) for r in range(rank)])  # pyright: ignore
    torch.testing.assert_close(optimizer.state[model[0].factors[0].weight]["exp_avg_sq"], slow)  # pyright: ignore
    slow = torch.stack([(first[r] ** 2 * scale).sum(1) for r in range(rank)], 1)
    torch.testing.assert_close(optimizer.state[model[0].factors[1].weight]["exp_avg_sq"], slow)  # pyright: ignore


def factored_moments(state: Any, squares: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(2)
    layer = nn.Linear(8, 12, bias=False).double()
    model, weight = nn.Sequential(layer), layer.weight
    optimizer = torch.optim.Adam([weight])
    optimizer.state[weight] = {"step": torch.tensor(7.0), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": squares}
    evolvenet.factorize(model, {"0": 2}, optimizers=[optimizer], state=state)
    factors = [factor.weight for factor in model[0].factors]  # pyright: ignore
    return [optimizer.state[factor]["exp_avg_sq"] for factor in factors], [factor.detach() for factor in factors]


def test_kronecker_takes_the_rows_and_columns_sums_alone() -> None:
    rows, columns = torch.rand(12, 1, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    for one, other in zip(
        *(factored_moments(state, rows * columns)[0] for state in ("projected", "kronecker")), strict=True
    ):
        torch.testing.assert_close(one, other)
    squares = torch.rand(12, 8, dtype=torch.float64)
    (of_first, of_last), (first, last) = factored_moments("kronecker", squares)
    rows, columns, total = squares.sum(1), squares.sum(0), squares.sum()
    torch.testing.assert_close(of_first, torch.outer(last.square().mT @ rows, columns) / total)
    torch.testing.assert_close(of_last, torch.outer(rows, first.square() @ columns) / total)


@pytest.mark.parametrize("state", ["projected", "kronecker"])
def test_steps_are_kept_apart_and_training_goes_on(state: Any) -> None:
    model, optimizer, _ = trained("spatial", lambda parameters: torch.optim.AdamW(parameters, amsgrad=True))
    evolvenet.factorize(model, {"0": ("spatial", 3)}, optimizers=[optimizer], state=state)
    model(torch.randn(2, 4, 5, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    for factor in model[0].factors:  # pyright: ignore
        assert float(optimizer.state[factor.weight]["step"]) == 2
        assert bool((optimizer.state[factor.weight]["max_exp_avg_sq"] >= 0).all())


def test_state_is_fresh_by_default_for_other_kinds_and_for_unknown_optimizers() -> None:
    adam: Any = torch.optim.Adam
    cases: list[tuple[str, Any, Any, Any]] = [
        ("dense", adam, 3, "fresh"),
        ("svd", adam, ("tucker", (1, 1)), "projected"),
        ("dense", torch.optim.RMSprop, 3, "projected"),
        ("dense", lambda parameters: torch.optim.SGD(parameters, lr=0.1), 3, "projected"),
    ]
    for name, make, rank, state in cases:
        model, optimizer, _ = trained(name, make)
        evolvenet.factorize(model, {"0": rank}, optimizers=[optimizer], state=state)
        assert all(factor.weight not in optimizer.state for factor in model[0].factors)  # pyright: ignore
    assert moments_of(torch.optim.RMSprop([nn.Parameter(torch.ones(1))])) is None


def test_another_name_is_refused_and_nothing_has_changed() -> None:
    model, optimizer, _ = trained("dense", torch.optim.Adam)
    with pytest.raises(FactorizationError, match="expected `state` to be one of"):
        evolvenet.factorize(model, {"0": 3}, optimizers=[optimizer], state="kept")  # pyright: ignore
    assert isinstance(model[0], nn.Linear)
    assert float(optimizer.state[model[0].weight]["step"]) == 1
