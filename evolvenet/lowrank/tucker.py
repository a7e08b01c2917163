"""Tucker-2: 1×1, then the kernel between fewer channels, then 1×1."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolvenet.linalg.decompositions import roots, tucker2
from evolvenet.linalg.spectrum import output_values
from evolvenet.lowrank.base import Kind, LayerShape, Ranks, Step, partial_moment, shape_of, spatial_weight


class Tucker(Kind):
    """Tucker decomposition along the channels: 1×1 to r₀ channels, k×k from r₀ to r₁, 1×1 to the outputs.

    From Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications", ICLR
    2016, by higher-order orthogonal iteration. With a second moment, inputs are weighted by the root of that of a single
    position, so that the iteration minimises the error of the outputs as if the positions of a patch were uncorrelated.

    >>> Tucker().parameters(LayerShape(64, 64, (3, 3)), (16, 16))
    4352
    """

    name = "tucker"

    def refusal(self, shape: LayerShape) -> str | None:
        """See `Kind`."""
        return None if shape.places > 1 else "without a kernel wider than 1 it has a core too much: take 'svd'"

    def full_rank(self, shape: LayerShape) -> Ranks:
        """See `Kind`."""
        return self._bounded(shape, shape.inputs, shape.outputs)

    def capped(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """See `Kind`."""
        return self._bounded(shape, *ranks)

    def _bounded(self, shape: LayerShape, inputs: int, outputs: int) -> Ranks:
        inputs = min(inputs, shape.inputs, shape.places * shape.outputs)
        outputs = min(outputs, shape.outputs, shape.places * inputs)
        return min(inputs, shape.places * outputs), outputs

    def steps(self, shape: LayerShape, ranks: Ranks) -> tuple[Step, ...]:
        """See `Kind`."""
        one, two = ranks
        axes = tuple(range(len(shape.kernel)))
        return (Step(shape.inputs, one), Step(one, two, axes), Step(two, shape.outputs))

    def decompose(self, weight: Tensor, ranks: Ranks, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`."""
        inverse = None
        if second_moment is not None:
            root, inverse = roots(partial_moment(second_moment, shape_of(weight)))
            weight = torch.einsum("oi...,ij->oj...", weight, root)
        core, outputs, inputs = tucker2(weight, (ranks[1], ranks[0]))
        if inverse is not None:
            inputs = inverse @ inputs
        spatial = weight.dim() - 2
        return [spatial_weight(inputs.mT, (), spatial), core, spatial_weight(outputs, (), spatial)]

    def unfoldings(self, weight: Tensor, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`; of the inputs and of the outputs."""
        if second_moment is None:
            return [weight.transpose(0, 1).flatten(1), weight.flatten(1)]
        root, _ = roots(partial_moment(second_moment, shape_of(weight)))
        outputs = output_values(weight.flatten(1), second_moment).diag()
        return [torch.einsum("oi...,ij->oj...", weight, root).transpose(0, 1).flatten(1), outputs]

    def ranks_of(self, factors: Sequence[Tensor], inputs: int) -> Ranks:
        """See `Kind`."""
        return len(factors[0]), len(factors[1])
