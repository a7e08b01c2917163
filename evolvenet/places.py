"""Where a layer's inputs and outputs are sampled, by its type: for passes with gradients, which ops cannot be seen in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Places:
    """Where a reader's outputs are compared.

    Args:
        sample: `[rows]` number of the sample of each row.
        position: `[rows]` number of its place among the sample's output places.
    """

    sample: Tensor
    position: Tensor


@singledispatch
def channel_axis(module: nn.Module) -> int | None:
    """The axis of the module's input, counted from the end, along which its weight's axis 1 reads; None if not known.

    >>> channel_axis(nn.Conv2d(3, 8, 3)), channel_axis(nn.Conv2d(4, 8, 3, groups=2))
    (-3, None)
    """
    return None


@channel_axis.register
def _(module: nn.Linear) -> int | None:
    return -1


@channel_axis.register(nn.Conv1d)
@channel_axis.register(nn.Conv2d)
@channel_axis.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int | None:
    return -1 - len(module.kernel_size) if module.groups == 1 else None


@singledispatch
def reads(module: nn.Module, x: Tensor, places: Places) -> Tensor | None:
    """The rows `[rows, columns]` of the matrix that the module multiplies its weight with, at the places asked for.

    None for a type that is not registered, or an input or a setting that is not understood: leave that module alone.
    """
    return None


@reads.register
def _(module: nn.Linear, x: Tensor, places: Places) -> Tensor | None:
    if x.dim() < 2:
        return None
    return x.flatten(1, -2)[places.sample, places.position] if x.dim() > 2 else x[places.sample]


@reads.register(nn.Conv1d)
@reads.register(nn.Conv2d)
@reads.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, places: Places) -> Tensor | None:
    space = len(module.kernel_size)
    if module.groups != 1 or x.dim() != space + 2 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    padded = nn.functional.pad(x, [amount for side in reversed(module.padding) for amount in (side, side)]).contiguous()
    extents = list(zip(padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True))
    counts = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in extents]
    steps = padded.stride()
    # A view with the kernel's places as axes of their own: only the chosen patches are ever copied.
    patches = padded.as_strided(
        (len(x), x.shape[1], *counts, *module.kernel_size),
        (
            *steps[:2],
            *(step * stride for step, (_, _, stride, _) in zip(steps[2:], extents, strict=True)),
            *(step * dilation for step, (_, _, _, dilation) in zip(steps[2:], extents, strict=True)),
        ),
    )
    at = torch.unravel_index(places.position, counts)
    return patches.movedim(1, 1 + space)[(places.sample, *at)].flatten(1)


def outputs_first(module: nn.Module, y: Tensor) -> Tensor:
    """The output of a module that `reads` knows as `[samples, positions, out]`."""
    axis = channel_axis(module)
    assert axis is not None, f"{type(module).__name__} has no channel axis"
    last = y.movedim(axis, -1)
    return last.flatten(1, -2) if last.dim() > 2 else last[:, None]
