"""`WeightOp`: one product of a weight with data, as matrices, whatever module or function ran it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from evolvenet.linalg.host_transfers import index_tensor


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution; a transposed one is given as a plain one over an input with zeros between its entries.

    Args:
        kernel: size of the kernel on each spatial axis; the next five also have one entry for each spatial axis.
        stride: of the kernel over the input.
        before: zeros padded in front of the input; negative values crop it.
        after: zeros padded behind the input.
        dilation: of the kernel.
        spread: distance of neighbouring input entries, with zeros between them; above 1 only for transposed convolutions.
        groups: of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    spread: tuple[int, ...]
    groups: int = 1

    @property
    def is_pointwise(self) -> bool:
        """Whether each output place takes one input place, and none is padded."""
        return {*self.kernel, *self.spread} <= {1} and not any((*self.before, *self.after))


@dataclass(frozen=True, eq=False)
class WeightOp:
    """One product of a weight with data.

    Args:
        tensor: name of the parameter.
        axis: the parameter's input axis: 1; 0 for transposed convolutions and for weights stored as `[in, out]`; see `stacked`.
        start: first output row of the parameter that is used; attention may use one third of it at a time.
        weight: the used part of the parameter, a writable view `[out, in / groups, k…]`.
        bias: the bias added by the same op, a writable view `[out]`, or None.
        bias_name: name of the bias.
        inputs: `[rows, in]`, for a convolution `[N, in, space…]`.
        geometry: of a convolution; None for a dense product.
        addend: what the op adds to the product where that is no bias: no vector of parameters, but computed, a buffer or data.
        weight_first: whether a dense product is weight · data, so that its outputs are columns.
        stacked: whether the parameter holds several weights along its first axis, of which this is one: `[groups, out, in]` or
            `[groups, in, out]`, with `axis` 2 or 1.
        group: which of these weights it is.
    """

    tensor: str
    axis: int
    start: int
    weight: Tensor
    bias: Tensor | None
    bias_name: str | None
    inputs: Tensor
    geometry: Geometry | None
    addend: Tensor | None = None
    weight_first: bool = False
    stacked: bool = False
    group: int = 0

    @property
    def output_axis(self) -> int:
        """The parameter's axis of output units."""
        return (3 if self.stacked else 1) - self.axis

    @property
    def groups(self) -> int:
        """Number of channel groups; 1 for a dense product."""
        return self.geometry.groups if self.geometry else 1

    def input_rows(self, rows: Tensor) -> Tensor:
        """The inputs at some positions: `[len(rows) · groups, in / groups]`.

        Args:
            rows: indices of input positions (see `input_positions`).
        """
        if self.geometry is None:
            return self.inputs[rows]
        space = self.inputs.shape[2:].numel()
        chosen = self.inputs.flatten(2)[rows // space, :, rows % space]
        return chosen.reshape(len(rows) * self.groups, chosen.shape[1] // self.groups)

    @property
    def input_positions(self) -> int:
        """Number of input positions: rows of a dense input, samples × spatial positions of a convolution's."""
        return self.inputs.shape[0] if self.geometry is None else self.inputs[:, :1].numel()

    @property
    def uses_per_entry(self) -> int:
        """Multiplications of each weight entry: one per output position; per input position for transposed products."""
        if self.geometry is None or self.axis == 0:
            return self.input_positions
        return len(self.inputs) * math.prod(_output_space(self.inputs, self.geometry))

    def columns(self, rows: Tensor) -> Tensor:
        """The unfolded input (im2col) at some output positions: `[groups, len(rows), columns]`.

        Args:
            rows: indices of output positions (see `output_positions`).
        """
        if self.geometry is None:
            return self.inputs[rows][None]
        geometry, space = self.geometry, _output_space(self.inputs, self.geometry)
        places = math.prod(space)
        at = _coordinates(rows % places, space)
        if geometry.is_pointwise:
            within = _place(at, geometry.stride, self.inputs.shape[2:])
            chosen = self.inputs.flatten(2)[rows // places, :, within]
            return chosen.reshape(len(rows), self.groups, chosen.shape[1] // self.groups).movedim(1, 0)
        # Channels last, so that those of a place are copied at once.
        padded = _padded(self.inputs, geometry)
        extents = padded.shape[1:-1]
        first = rows // places * math.prod(extents) + _place(at, geometry.stride, extents)
        offsets = [0]
        for size, dilation, kernel in zip(extents, geometry.dilation, geometry.kernel, strict=True):
            offsets = [offset * size + k * dilation for offset in offsets for k in range(kernel)]
        wanted = first.unsqueeze(1) + index_tensor(offsets, rows.device)
        chosen = (
            padded.flatten(0, -2).index_select(0, wanted.flatten()).reshape(len(rows), len(offsets), padded.shape[-1])
        )
        columns = len(offsets) * padded.shape[-1] // self.groups
        return chosen.movedim(-1, 1).reshape(len(rows), self.groups, columns).movedim(1, 0)

    @property
    def flipped_dims(self) -> tuple[int, ...]:
        """The axes along which the kernel is flipped: the spatial ones of a transposed convolution."""
        return tuple(range(2, self.weight.dim())) if self.axis == 0 else ()

    def matrix(self) -> Tensor:
        """The weight as a matrix, `[groups, out / groups, columns]`; its product with `columns` is the output without bias."""
        return self.weight.flip(self.flipped_dims).reshape(self.groups, self.weight.shape[0] // self.groups, -1)

    def write_matrix(self, matrix: Tensor) -> None:
        """Write a matrix `[groups, out / groups, columns]` into the weight."""
        self.weight.copy_(matrix.reshape(self.weight.shape).flip(self.flipped_dims))

    def outputs_at(self, out: Tensor, rows: Tensor) -> Tensor:
        """The entries of the output `out` at some output positions: `[groups, len(rows), out / groups]`."""
        if self.geometry is None:
            return self._output_rows(out)[rows][None]
        space = out.shape[2:].numel()
        chosen = out.flatten(2)[rows // space, :, rows % space]
        return chosen.reshape(len(rows), self.groups, chosen.shape[1] // self.groups).movedim(1, 0)

    def products_at(self, out: Tensor, rows: Tensor) -> Tensor:
        """`outputs_at` without the `addend`: the products with the weight, plus the bias."""
        found = self.outputs_at(out, rows)
        return found if self.addend is None else found - self.outputs_at(self.addend.expand_as(out), rows)

    def _output_rows(self, out: Tensor) -> Tensor:
        """The output of a dense product, of one matrix or of a batch of them, as `[rows, out]`."""
        turned = out.mT if self.weight_first else out
        return turned.reshape(-1, turned.shape[-1])


def output_positions(op: WeightOp, out: Tensor) -> int:
    """Number of output positions: rows of a dense output, samples × spatial positions of a convolution's."""
    return out[:, :1].numel() if op.geometry else out.numel() // len(op.weight)


def _coordinates(places: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """As `torch.unravel_index`, which copies the shape to the device and waits for that.

    >>> from torch import tensor
    >>> [axis.tolist() for axis in _coordinates(tensor([0, 5]), (2, 3))]
    [[0, 1], [0, 2]]
    """
    found: list[Tensor] = []
    for size in reversed(shape):
        found.append(places % size)
        places = places // size
    return tuple(reversed(found))


def _place(at: Sequence[Tensor], stride: Sequence[int], extents: Sequence[int]) -> Tensor:
    """The number of the place at `stride` times some coordinates in a grid of these extents."""
    found = at[0] * stride[0]
    for axis in range(1, len(extents)):
        found = found * extents[axis] + at[axis] * stride[axis]
    return found


def _padded(x: Tensor, geometry: Geometry) -> Tensor:
    """The input with what a convolution adds to it, `[N, space…, channels]`."""
    if any(step > 1 for step in geometry.spread):
        extents = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], geometry.spread, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *extents)
        wide[(slice(None), slice(None), *(slice(None, None, step) for step in geometry.spread))] = x
        x = wide
    sides = zip(reversed(geometry.before), reversed(geometry.after), strict=True)
    return functional.pad(x.movedim(1, -1), [0, 0, *(amount for side in sides for amount in side)]).contiguous()


def _output_space(x: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Places of the output of a convolution along each spatial axis."""
    found: list[int] = []
    for axis, size in enumerate(x.shape[2:]):
        padded = (size - 1) * geometry.spread[axis] + 1 + geometry.before[axis] + geometry.after[axis]
        covered = geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1
        found.append((padded - covered) // geometry.stride[axis] + 1)
    return tuple(found)


class NormedWeight(NamedTuple):
    """A weight that weight norm has computed: W = length · direction / ‖direction‖, norms over all axes but one.

    Args:
        weight: W; it lives as long as the mode, so that nothing else is at its place in memory.
        length: name of the tensor of lengths.
        dim: the axis that has a length for each entry.
    """

    weight: Tensor
    length: str
    dim: int
