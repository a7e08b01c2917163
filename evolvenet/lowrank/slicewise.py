"""Slice-wise spatial SVD: every k×k slice of a kernel, one for each pair of channels, alone."""

# torch.linalg has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolvenet.lowrank.base import Kind, LayerShape, Ranks, Step, spatial_weight


class Slicewise(Kind):
    """Truncated SVD of each slice `[k₀, k₁]` of a kernel: k×1 for each pair of channels, then 1×k and the sum over the inputs.

    `in·out·r` channels lie between the two layers, both grouped, with a channel shuffle before the second. It has more
    parameters and far more activations than "spatial" at the same error and serves comparisons. A second moment has no
    effect on it: of one slice's output only the error of the slice counts.

    >>> Slicewise().parameters(LayerShape(8, 4, (5, 5)), (1,))
    320
    """

    name = "slicewise"

    def refusal(self, shape: LayerShape) -> str | None:
        """See `Kind`."""
        if len(shape.kernel) != 2:
            return f"expected slices of 2 spatial axes, got a kernel of {len(shape.kernel)}: take 'svd' or 'spatial'"
        if shape.groups > 1:
            return "its channel shuffle has no grouped form: take 'spatial'"
        return None

    def full_rank(self, shape: LayerShape) -> Ranks:
        """See `Kind`."""
        return (min(shape.kernel),)

    def steps(self, shape: LayerShape, ranks: Ranks) -> tuple[Step, ...]:
        """See `Kind`."""
        many = shape.inputs * shape.outputs * ranks[0]
        return (
            Step(shape.inputs, many, (0,), groups=shape.inputs),
            Step(many, shape.outputs, (1,), groups=shape.outputs, shuffle=shape.inputs),
        )

    def decompose(self, weight: Tensor, ranks: Ranks, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`."""
        (rank,) = ranks
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        half = values[..., :rank].sqrt()
        # [out, in, rank, k] each; the first layer's channels lie in the order (in, out, rank), the second's in (out, rank, in).
        first = (left[..., :rank] * half.unsqueeze(-2)).mT.transpose(0, 1).flatten(0, 2).unsqueeze(1)
        last = (right[..., :rank, :] * half.unsqueeze(-1)).transpose(1, 2).flatten(1, 2)
        return [spatial_weight(first, (0,), 2), spatial_weight(last, (1,), 2)]

    def merged(self, factors: Sequence[Tensor], inputs: int) -> Tensor:
        """See `Kind`."""
        first, last = factors
        outputs, rank = len(last), last.shape[1] // inputs
        columns = first.reshape(inputs, outputs, rank, first.shape[2])
        rows = last.reshape(outputs, rank, inputs, last.shape[3])
        return torch.einsum("iorp,oriq->oipq", columns, rows)

    def unfoldings(self, weight: Tensor, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`; a diagonal matrix with the singular values of all slices, added up by their squares."""
        values = torch.linalg.svdvals(weight).flatten(0, 1)
        return [values.square().sum(0).sqrt().diag()]

    def ranks_of(self, factors: Sequence[Tensor], inputs: int) -> Ranks:
        """See `Kind`."""
        return (factors[1].shape[1] // inputs,)
