"""A change of the basis of a width's units: of a rank, between two factors, any invertible one keeps the function."""

# torch.einsum and Tensor.movedim have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evolvenet.graph.index_map import laid_out_as
from evolvenet.linalg.precision import in_float64


@dataclass(frozen=True, eq=False)
class BasisChange:
    """What multiplies values along an axis of units, and what multiplies their gradients.

    Args:
        values: R, `[n, n]` float64, on the CPU.
        gradients: R⁻ᵀ: gradients change such that their scalar product with values stays.

    >>> change = BasisChange(torch.tensor([[2.0]]).double(), torch.tensor([[0.5]]).double())
    >>> along(torch.ones(1, 3), change.values, 0), along(torch.ones(1, 3), change.gradients, 0)
    (tensor([[2., 2., 2.]]), tensor([[0.5000, 0.5000, 0.5000]]))
    """

    values: Tensor
    gradients: Tensor

    @property
    def dual(self) -> BasisChange:
        """The change of a consumer's columns, which have the units that the producer's rows make."""
        return BasisChange(self.gradients, self.values)


def along(tensor: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """A tensor multiplied with a matrix `[m, n]` along an axis of n entries; computed in float64 on the CPU.

    Returns:
        A new tensor of the same type, device and memory format.

    >>> along(torch.ones(3, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(), 1)
    tensor([[3., 1.],
            [3., 1.],
            [3., 1.]])
    """
    made = torch.einsum("mn,n...->m...", matrix, in_float64(tensor.detach(), "cpu").movedim(dim, 0))
    return laid_out_as(tensor, made.movedim(0, dim).contiguous().to(tensor.device, tensor.dtype))
