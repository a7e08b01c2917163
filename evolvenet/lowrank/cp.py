"""CP decomposition: 1×1, then each channel alone along one spatial axis after the other, then 1×1."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evolvenet.linalg.decompositions import cp, roots
from evolvenet.lowrank.base import Kind, LayerShape, Ranks, Step, partial_moment, shape_of, spatial_weight


class Cp(Kind):
    """Sum of r outer products: 1×1 to r channels, depthwise k×1, depthwise 1×k, 1×1 to the outputs.

    From Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015. The rank of
    a tensor has no closed form: rules take the larger of its inputs' and its outputs' rank, a lower bound. At the same
    error it has the fewest parameters and the slowest layers: depthwise ones use little of a processor.

    >>> Cp().parameters(LayerShape(64, 64, (3, 3)), (32,))
    4288
    """

    name = "cp"

    def refusal(self, shape: LayerShape) -> str | None:
        """See `Kind`."""
        return None if shape.kernel else "a dense layer's CP decomposition is its SVD: take 'svd'"

    def full_rank(self, shape: LayerShape) -> Ranks:
        """See `Kind`; a rank that is certainly enough, often more than the tensor has."""
        sizes = (shape.outputs, shape.inputs, *shape.kernel)
        return (math.prod(sizes) // max(sizes),)

    def steps(self, shape: LayerShape, ranks: Ranks) -> tuple[Step, ...]:
        """See `Kind`."""
        (rank,) = ranks
        alone = (Step(rank, rank, (axis,), groups=rank) for axis in range(len(shape.kernel)))
        return (Step(shape.inputs, rank), *alone, Step(rank, shape.outputs))

    def decompose(self, weight: Tensor, ranks: Ranks, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`."""
        inverse = None
        if second_moment is not None:
            root, inverse = roots(partial_moment(second_moment, shape_of(weight)))
            weight = torch.einsum("oi...,ij->oj...", weight, root)
        outputs, inputs, *kernels = cp(weight, ranks[0])
        if inverse is not None:
            inputs = inverse @ inputs
        spatial = weight.dim() - 2
        alone = [spatial_weight(kernel.mT[:, None], (axis,), spatial) for axis, kernel in enumerate(kernels)]
        return [spatial_weight(inputs.mT, (), spatial), *alone, spatial_weight(outputs, (), spatial)]

    def unfoldings(self, weight: Tensor, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`; of the inputs and of the outputs."""
        if second_moment is not None:
            root, _ = roots(partial_moment(second_moment, shape_of(weight)))
            weight = torch.einsum("oi...,ij->oj...", weight, root)
        return [weight.transpose(0, 1).flatten(1), weight.flatten(1)]

    def combined(self, ranks: Sequence[int]) -> Ranks:
        """See `Kind`."""
        return (max(ranks),)

    def ranks_of(self, factors: Sequence[Tensor], inputs: int) -> Ranks:
        """See `Kind`."""
        return (len(factors[0]),)
