"""What a tensor holds for each unit of a width, as the rows of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evolvenet.graph.naming import tensor_named
from evolvenet.graph.width_graph import Tie, Width
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.spectrum import matricize


def unit_rows(model: nn.Module, width: Width, tie: Tie) -> Tensor:
    """What one tensor holds for each unit of the width, one row a unit: `[width.size, places]`, float64, on the CPU.

    A complex entry counts as two places, its real and its imaginary part.

    For a producer the rows of the unit, for a consumer its columns; a unit with `repeat` places on the axis has them one
    after the other. A weight that is a buffer (a fixed basis, random features) counts like one that is trained.

    Raises:
        SpectrumError: for NaN or infinite entries.

    >>> width = Width("0", size=3)
    >>> unit_rows(nn.Sequential(nn.Conv2d(3, 8, 5)), width, Tie("0.weight", 1, 0, 1, "consumes")).shape
    torch.Size([3, 200])
    """
    rows = native_rows(model, width, tie)
    return in_float64(torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows, "cpu")


def native_rows(model: nn.Module, width: Width, tie: Tie) -> Tensor:
    """The same in the type and on the device of the tensor."""
    tensor = matricize(tensor_named(model, tie.tensor), tie.dim, tie.tensor)
    return tensor[tie.start : tie.start + width.size * tie.repeat].reshape(width.size, -1)
