"""Optimizer state across W → B·A: what the moments of a weight's gradient say about those of its factors' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from evolvenet.errors import FactorizationError
from evolvenet.lowrank.layers import FactoredLayer

State = Literal["fresh", "projected", "kronecker"]
"""How the optimizer state of factors starts, see `factor_states`."""

TWO_FACTORS = ("svd", "spatial")
"""Kinds whose weight is linear in each factor, with single entries of the other factor as coefficients."""

Moments = Mapping[str, int]
"""{key of `optimizer.state[parameter]`: 1 for an average of gradients, 2 for one of squared gradients, 0 for a step count}."""


@singledispatch
def moments_of(optimizer: Optimizer) -> Moments | None:
    """What the keys of an optimizer's state are; None, for every type that is not registered, gives factors fresh state.

    Add an optimizer with `moments_of.register(TheClass)`. State with any other key also gives fresh state.
    """
    return None


@moments_of.register(Adam)
@moments_of.register(AdamW)
def _(optimizer: Adam) -> Moments:
    return {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@moments_of.register
def _(optimizer: SGD) -> Moments:
    return {"momentum_buffer": 1}


def check_state(state: str) -> None:
    """Raise a `FactorizationError` for a name that is not one of `State`."""
    if state not in get_args(State):
        raise FactorizationError(f"Factorize: expected `state` to be one of {get_args(State)}, got {state!r}.")


def factor_states(
    chain: FactoredLayer, state: State
) -> Callable[[Optimizer, Mapping[str, Any]], list[dict[str, Any]] | None]:
    """The state of a chain's factors from that of the weight which they replace, for `replace_parameters`.

    The gradients of the factors of W = B·A are ∂L/∂B = ∂L/∂W·Aᵀ and ∂L/∂A = Bᵀ·∂L/∂W. Averages of gradients are mapped in
    the same way, exactly, but for the change of W itself by the truncation. Averages V of squared gradients are mapped by
    the squared entries, V·(A²)ᵀ and (B²)ᵀ·V, as if the gradients of different entries of W were uncorrelated.
    "kronecker" first replaces V by R·Cᵀ / total, from its sums over rows R and columns C (as Adafactor does, Shazeer and
    Stern 2018). A convolution's rows are its first axis, its columns all others. The step count stays.

    Args:
        chain: the factors, with their values.
        state: "projected" or "kronecker"; anything else is fresh state.

    Returns:
        (optimizer, the weight's state) → a state for each factor; None for fresh state: for other kinds than
        `TWO_FACTORS`, and for optimizers that `moments_of` does not know.
    """

    def states(optimizer: Optimizer, old: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        moments = moments_of(optimizer)
        known = moments is not None and all(key in moments and isinstance(old[key], Tensor) for key in old)
        if not old or not known or moments is None or chain.kind not in TWO_FACTORS:
            return None
        made: list[dict[str, Any]] = [{} for _ in chain.factors]
        for key, entry in old.items():
            for factor, value in zip(made, _mapped(chain, state, moments[key], entry), strict=True):
                factor[key] = value
        return made

    return states if state != "fresh" else lambda optimizer, old: None


@torch.no_grad()
def _mapped(chain: FactoredLayer, state: State, moment: int, entry: Tensor) -> list[Tensor]:
    """One entry of the weight's state, for each factor."""
    weights = [factor.get_parameter("weight").detach() for factor in chain.factors]
    if moment == 0:
        # Apart: optimizers count in place.
        return [entry.clone() for _ in weights]
    if moment == 2:
        entry = _rank_one(entry) if state == "kronecker" else entry
    found = through_factors(chain, [weight**moment for weight in weights], entry)
    # In the layout of the factors: fused kernels go through parameter and state in memory order.
    return [
        torch.empty_like(weight, dtype=entry.dtype).copy_(value) for weight, value in zip(weights, found, strict=True)
    ]


def through_factors(chain: FactoredLayer, weights: Sequence[Tensor], gradient: Tensor) -> Sequence[Tensor]:
    """The gradients of factors with these values, from that of the weight to which they multiply."""
    _, pull_back = cast(
        "tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]",
        torch.func.vjp(lambda *values: chain.merged(values), *weights),  # pyright: ignore[reportUnknownLambdaType, reportUnknownMemberType, reportUnknownArgumentType]
    )
    return pull_back(gradient.to(weights[0].dtype))


def _rank_one(squares: Tensor) -> Tensor:
    """The outer product of an entry's sums over rows and columns, with the same total."""
    matrix = squares.flatten(1)
    total = matrix.sum().clamp_min(torch.finfo(matrix.dtype).tiny)
    return (matrix.sum(1, keepdim=True) / total * matrix.sum(0)).reshape(squares.shape)
