"""Penalties for training at low rank: orthogonal singular vectors and few large singular values, without an SVD a step.

From Yang, Tang, Wen, Yan, Hu, Li, Li and Chen, "Learning low-rank deep neural networks via singular vector orthogonality
regularization and singular value sparsification", CVPR Workshops 2020 (SVD training). There a layer is trained as
U·diag(s)·Vᵀ, with three factors. A `FactoredLayer` has two, B and A, between which the singular values are split: its left
vectors are the normalized columns of B, its right vectors the normalized rows of A, and its values the products of their
norms, s_i = ‖b_i‖·‖a_i‖. These are the singular values of B·A where both sets of vectors are orthonormal.
"""

# Tensor.norm has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from evolvenet.errors import FactorizationError
from evolvenet.lowrank.factor_state import TWO_FACTORS
from evolvenet.lowrank.layers import FactoredLayer

Measure = Literal["hoyer", "l1"]


def orthogonality(model: nn.Module) -> Tensor:
    """How far the singular vectors of the factorized layers are from orthonormal ones.

    The sum over layers and channel groups of (‖UᵀU − I‖² + ‖VᵀV − I‖²) / r² with Frobenius norms, as in the paper.
    Since U and V are normalized, the diagonals are 0: what is left are the cosines between different vectors, which the norms
    of the factors do not change. A rank above the number of outputs or inputs cannot reach 0.

    Args:
        model: with layers of the kinds "svd" or "spatial"; all others are passed over.

    Returns:
        A differentiable scalar, to be added to the loss with a factor.

    Raises:
        FactorizationError: if there is no such layer.

    >>> from evolvenet import factorize
    >>> model = nn.Sequential(nn.Linear(20, 20))
    >>> report = factorize(model, {"0": 4})
    >>> penalty = orthogonality(model)  # the factors of an SVD are orthogonal
    >>> bool(penalty < 1e-6), penalty.requires_grad
    (True, True)
    """
    return _total(model, _orthogonality)


def sparsity(model: nn.Module, measure: Measure = "hoyer") -> Tensor:
    """How many singular values of the factorized layers are large.

    The sum over layers and channel groups of a measure of their values s, the two of the paper. "hoyer" is
    Σs / √(Σs²), from 1 for a single value to √r for r equal ones, the same for any scale of the weights. "l1" is Σs, which also
    makes the weights smaller.

    Args:
        model: as for `orthogonality`.
        measure: "hoyer" or "l1".

    Returns:
        A differentiable scalar, to be added to the loss with a factor. Add `orthogonality` too: the products of norms are
        singular values only for orthogonal vectors.

    Raises:
        FactorizationError: if there is no such layer, or no such measure.

    >>> from evolvenet import factorize
    >>> layer = nn.Linear(4, 4)
    >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    >>> model = nn.Sequential(layer)
    >>> report = factorize(model, {"0": 1})
    >>> round(float(sparsity(model, "l1")), 4), round(float(sparsity(model)), 4)
    (3.0, 1.0)
    """
    if measure not in _MEASURES:
        raise FactorizationError(f"Sparsity: expected a measure of {', '.join(_MEASURES)}, got {measure!r}.")
    return _total(model, lambda left, right: _MEASURES[measure](left.norm(dim=0) * right.norm(dim=1)))


def _total(model: nn.Module, penalty: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    found = [penalty(left, right) for left, right in _matrices(model)]
    if not found:
        raise FactorizationError(
            f"Penalty: expected a model with factorized layers of the kinds {' or '.join(TWO_FACTORS)}, got a "
            f"{type(model).__name__} without any. Call evolvenet.factorize first."
        )
    return torch.stack(found).sum()


def _matrices(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """B `[m, r]` and A `[r, n]` of each channel group of each layer; shared factors once."""
    seen: set[Tensor] = set()
    for layer in model.modules():
        if not isinstance(layer, FactoredLayer) or layer.kind not in TWO_FACTORS:
            continue
        if layer.factors[0].get_parameter("weight") in seen:
            continue
        seen.add(layer.factors[0].get_parameter("weight"))
        for first, last in zip(*layer.canonical_factors(), strict=True):
            yield last.transpose(0, 1).flatten(1).mT, first.flatten(1)


def _orthogonality(left: Tensor, right: Tensor) -> Tensor:
    sides = nn.functional.normalize(left, dim=0), nn.functional.normalize(right, dim=1).mT
    return torch.stack([_off_diagonal(side.mT @ side) for side in sides]).sum()


def _off_diagonal(gram: Tensor) -> Tensor:
    # The diagonal is 1, or 0 for a vector of zeros, whose value of 0 is not to be undone.
    return (gram - gram.diagonal().diag()).square().mean()


def _hoyer(values: Tensor) -> Tensor:
    return values.sum() / values.norm().clamp_min(torch.finfo(values.dtype).tiny)


_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"hoyer": _hoyer, "l1": torch.sum}
