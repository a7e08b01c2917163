"""Tensor train: 1×1, then one spatial axis after the other, then 1×1, with a rank between each two."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolvenet.linalg.decompositions import roots, tensor_train, train_ranks
from evolvenet.lowrank.base import Kind, LayerShape, Ranks, Step, partial_moment, shape_of, spatial_weight


class TensorTrain(Kind):
    """Tensor train over (inputs, k₀, k₁, …, outputs): 1×1 to r₀ channels, k×1 to r₁, 1×k to r₂, 1×1 to the outputs.

    From Oseledets, "Tensor-train decomposition", SIAM Journal on Scientific Computing 33(5), 2011.

    >>> TensorTrain().parameters(LayerShape(64, 64, (3, 3)), (16, 16, 16))
    3584
    """

    name = "tensor_train"

    def refusal(self, shape: LayerShape) -> str | None:
        """See `Kind`."""
        return None if shape.kernel else "a dense layer's tensor train is its SVD: take 'svd'"

    def full_rank(self, shape: LayerShape) -> Ranks:
        """See `Kind`."""
        return self.capped(shape, (shape.parameters,) * (len(shape.kernel) + 1))

    def capped(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """See `Kind`."""
        return train_ranks((shape.inputs, *shape.kernel, shape.outputs), ranks)

    def steps(self, shape: LayerShape, ranks: Ranks) -> tuple[Step, ...]:
        """See `Kind`."""
        along = (Step(ranks[axis], ranks[axis + 1], (axis,)) for axis in range(len(shape.kernel)))
        return (Step(shape.inputs, ranks[0]), *along, Step(ranks[-1], shape.outputs))

    def decompose(self, weight: Tensor, ranks: Ranks, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`."""
        root, inverse = _roots(weight, second_moment)
        cores = tensor_train(_in_order(weight, root), ranks)
        inputs = cores[0][0] if inverse is None else inverse @ cores[0][0]
        spatial = weight.dim() - 2
        along = [
            spatial_weight(core.movedim(2, 0).movedim(1, 1), (axis,), spatial) for axis, core in enumerate(cores[1:-1])
        ]
        return [spatial_weight(inputs.mT, (), spatial), *along, spatial_weight(cores[-1][..., 0].mT, (), spatial)]

    def unfoldings(self, weight: Tensor, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`; one between each two layers."""
        ordered = _in_order(weight, _roots(weight, second_moment)[0])
        return [ordered.flatten(0, cut).flatten(1) for cut in range(ordered.dim() - 1)]

    def ranks_of(self, factors: Sequence[Tensor], inputs: int) -> Ranks:
        """See `Kind`."""
        return tuple(len(factor) for factor in factors[:-1])


def _roots(weight: Tensor, second_moment: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if second_moment is None else roots(partial_moment(second_moment, shape_of(weight)))


def _in_order(weight: Tensor, root: Tensor | None) -> Tensor:
    """`[in, k…, out]`, the inputs weighted by a root."""
    ordered = weight.movedim(0, -1)
    return ordered if root is None else torch.einsum("i...,ij->j...", ordered, root)
