"""SVD of a weight as the matrix from inputs to outputs: W → B·A; of a convolution, k×k and then 1×1 (channel SVD)."""

# Tensor.norm has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evolvenet.linalg.decompositions import principal_outputs, truncated_svd
from evolvenet.linalg.spectrum import output_values
from evolvenet.lowrank.base import Kind, LayerShape, Ranks, Step, spatial_weight


class Svd(Kind):
    """Truncated SVD of `[out, in·k…]`: a layer to r channels with the whole kernel, then one of kernel 1.

    With a second moment the factors are the best ones of their rank for the outputs: these are projected onto their
    principal directions. Without it they are the best ones for the weight (Eckart and Young 1936).

    >>> kind = Svd()
    >>> kind.parameters(LayerShape(10, 10), (2,))
    40
    """

    name = "svd"

    def refusal(self, shape: LayerShape) -> str | None:
        """See `Kind`: none is refused."""
        return None

    def full_rank(self, shape: LayerShape) -> Ranks:
        """See `Kind`."""
        return (min(shape.outputs, shape.inputs * shape.places),)

    def steps(self, shape: LayerShape, ranks: Ranks) -> tuple[Step, ...]:
        """See `Kind`."""
        (rank,) = ranks
        return (Step(shape.inputs, rank, tuple(range(len(shape.kernel)))), Step(rank, shape.outputs))

    def decompose(self, weight: Tensor, ranks: Ranks, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`."""
        (rank,) = ranks
        matrix = weight.flatten(1)
        if second_moment is None:
            last, first = truncated_svd(matrix, rank)
        else:
            last = principal_outputs(matrix, second_moment)[:, :rank]
            first = last.mT @ matrix
            # As large as the last factor: gradients of both are then of the same size.
            scale = first.norm(dim=1).clamp_min(1e-12).sqrt()
            last, first = last * scale, first / scale[:, None]
        return [first.reshape(rank, *weight.shape[1:]), spatial_weight(last, (), weight.dim() - 2)]

    def unfoldings(self, weight: Tensor, second_moment: Tensor | None = None) -> list[Tensor]:
        """See `Kind`; with a second moment a diagonal matrix with the singular values of the outputs."""
        matrix = weight.flatten(1)
        if second_moment is None:
            return [matrix]
        values = output_values(matrix, second_moment)
        return [values[: min(matrix.shape)].diag()]

    def ranks_of(self, factors: Sequence[Tensor], inputs: int) -> Ranks:
        """See `Kind`."""
        return (len(factors[0]),)
