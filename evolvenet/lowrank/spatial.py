"""Spatial SVD: a kernel along the first spatial axis, then one along the others (k×1 → 1×k)."""

# torch.linalg has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from evolvenet.linalg.decompositions import roots, truncated_svd
from evolvenet.lowrank.base import Kind, LayerShape, Ranks, Step, partial_moment, shape_of, spatial_weight


class Spatial(Kind):
    """Truncated SVD of `[in·k₀, out·k₁…]`: k₀×1 to r channels, then 1×k₁ to the outputs; k×1×1 and 1×k×k in three dimensions.

    From Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural networks with low rank expansions", BMVC 2014,
    scheme 2, in the closed form of Tai et al., "Convolutional neural networks with low-rank regularization", ICLR 2016.
    With a second moment, rows are weighted by the root of that of the inputs of the first layer.

    >>> Spatial().parameters(LayerShape(64, 64, (3, 3)), (32,))
    12288
    """

    name = "spatial"

    def refusal(self, shape: LayerShape) -> str | None:
        """See `Kind`."""
        if len(shape.kernel) < 2:
            return f"a kernel of {len(shape.kernel)} spatial axes cannot be split between axes: take 'svd'"
        return None

    def full_rank(self, shape: LayerShape) -> Ranks:
        """See `Kind`."""
        return (min(shape.inputs * shape.kernel[0], shape.outputs * math.prod(shape.kernel[1:])),)

    def steps(self, shape: LayerShape, ranks: Ranks) -> tuple[Step, ...]:
        """See `Kind`."""
        (rank,) = ranks
        return (Step(shape.inputs, rank, (0,)), Step(rank, shape.outputs, tuple(range(1, len(shape.kernel)))))

    def decompose(self, weight: Tensor, ranks: Ranks, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`."""
        (rank,), shape = ranks, shape_of(weight)
        matrix = _unfolded(weight)
        if second_moment is None:
            left, right = truncated_svd(matrix, rank)
        else:
            root, inverse = roots(partial_moment(second_moment, shape, (0,)))
            left, right = truncated_svd(root @ matrix, rank)
            left = inverse @ left
        first = left.mT.reshape(rank, shape.inputs, shape.kernel[0])
        last = right.reshape(rank, shape.outputs, *shape.kernel[1:]).transpose(0, 1)
        spatial = len(shape.kernel)
        return [spatial_weight(first, (0,), spatial), spatial_weight(last, range(1, spatial), spatial)]

    def unfoldings(self, weight: Tensor, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`."""
        matrix = _unfolded(weight)
        if second_moment is None:
            return [matrix]
        return [roots(partial_moment(second_moment, shape_of(weight), (0,)))[0] @ matrix]

    def ranks_of(self, factors: Sequence[Tensor], inputs: int) -> Ranks:
        """See `Kind`."""
        return (len(factors[0]),)


def _unfolded(weight: Tensor) -> Tensor:
    """`[in·k₀, out·k₁…]`."""
    return weight.movedim(0, 2).reshape(weight.shape[1] * weight.shape[2], -1)
