"""Every product of a weight with data in a run of a model, as `WeightOp`s.

`WeightOpMode` is a dispatch mode: it runs the model unchanged and compares the storage of every operand of a matrix
product or convolution with the model's parameters. A product with a parameter is passed to a callback as a `WeightOp`,
which gives the inputs, outputs and the weight as matrices, whatever module or function ran it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet._compat.torch import TorchDispatchMode, in_backward, tree_leaves
from evolvenet.graph.naming import named_tensors

aten = torch.ops.aten


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


@dataclass(frozen=True, eq=False)
class WeightOp:
    """One product of a weight with data.

    Args:
        tensor: name of the parameter.
        axis: the parameter's input axis: 1; 0 for transposed convolutions and for weights stored as `[in, out]`.
        start: first output row of the parameter that is used; attention may use one third of it at a time.
        weight: the used part of the parameter, a writable view `[out, in / groups, k…]`.
        bias: the bias added by the same op, a writable view `[out]`, or None.
        bias_name: name of the bias.
        inputs: `[rows, in]`, for a convolution `[N, in, space…]`.
        geometry: of a convolution; None for a dense product.
    """

    tensor: str
    axis: int
    start: int
    weight: Tensor
    bias: Tensor | None
    bias_name: str | None
    inputs: Tensor
    geometry: Geometry | None

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
        at = torch.unravel_index(rows % space, self.inputs.shape[2:])
        chosen = self.inputs.movedim(1, -1)[(rows // space, *at)]
        return chosen.reshape(len(rows) * self.groups, -1)

    @property
    def input_positions(self) -> int:
        """Number of input positions: rows of a dense input, samples × spatial positions of a convolution's."""
        return self.inputs.shape[0] if self.geometry is None else self.inputs[:, :1].numel()

    @property
    def uses_per_entry(self) -> int:
        """Multiplications of each weight entry: one per output position; per input position for transposed products."""
        if self.geometry is None or self.axis == 0:
            return self.input_positions
        patches = _patches(self.inputs, self.geometry)
        return patches.shape[0] * patches.shape[2 : 2 + len(self.geometry.kernel)].numel()

    def columns(self, rows: Tensor) -> Tensor:
        """The unfolded input (im2col) at some output positions: `[groups, len(rows), columns]`.

        Args:
            rows: indices of output positions (see `output_positions`).
        """
        if self.geometry is None:
            return self.inputs[rows][None]
        patches = _patches(self.inputs, self.geometry)
        space = patches.shape[2 : 2 + len(self.geometry.kernel)]
        at = torch.unravel_index(rows % space.numel(), space)
        chosen = patches.movedim(1, 1 + len(space))[(rows // space.numel(), *at)]
        return chosen.reshape(len(rows), self.groups, -1).movedim(1, 0)

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
            return out[rows][None]
        space = out.shape[2:].numel()
        chosen = out.flatten(2)[rows // space, :, rows % space]
        return chosen.reshape(len(rows), self.groups, -1).movedim(1, 0)


def output_positions(op: WeightOp, out: Tensor) -> int:
    """Number of output positions: rows of a dense output, samples × spatial positions of a convolution's."""
    return len(out) if op.geometry is None else out[:, :1].numel()


def _patches(x: Tensor, geometry: Geometry) -> Tensor:
    """`[N, channels, output space…, kernel…]`, a view of the padded input, so that only selected positions are copied."""
    if any(step > 1 for step in geometry.spread):
        extents = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], geometry.spread, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *extents)
        wide[(slice(None), slice(None), *(slice(None, None, step) for step in geometry.spread))] = x
        x = wide
    sides = zip(reversed(geometry.before), reversed(geometry.after), strict=True)
    padded = functional.pad(x, [amount for side in sides for amount in side]).contiguous()
    axes = list(zip(padded.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True))
    counts = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in axes]
    steps = padded.stride()
    return padded.as_strided(
        (*x.shape[:2], *counts, *geometry.kernel),
        (
            *steps[:2],
            *(step * stride for step, (_, _, stride, _) in zip(steps[2:], axes, strict=True)),
            *(step * dilation for step, (_, _, _, dilation) in zip(steps[2:], axes, strict=True)),
        ),
    )


class WeightOpMode(TorchDispatchMode):
    """Runs a model unchanged and passes every product of one of its weights with data to callbacks.

    To be entered by `op_by_op(mode)`. Autocast is off while the mode is active.

    Args:
        model: the model, uncompiled.
        before: called with each weight op before it runs; may write into its weight and bias.
        after: called with each weight op and its output.

    Attributes:
        other_uses: names of the tensors that took part in any op that is no weight op.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[WeightOp], None] | None = None,
        after: Callable[[WeightOp, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.other_uses: set[str] = set()
        self._autocast_off = ExitStack()
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        tensors = named_tensors(model)[0]
        self._devices = {tensor.device.type for tensor in tensors.values()}
        for name, tensor in tensors.items():
            self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))

    def __enter__(self) -> WeightOpMode:
        # Autocast would multiply with a copy of the weight, which could not be attributed to a parameter.
        for device in self._devices:
            self._autocast_off.enter_context(torch.autocast(device, enabled=False))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._autocast_off.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        kwargs = kwargs or {}
        if in_backward():
            return func(*args, **kwargs)
        op = WEIGHT_OPS[func](self, *args) if func in WEIGHT_OPS and not kwargs else None
        if op is None:
            return self.run_other_op(func, args, kwargs)
        if self.before is not None:
            self.before(op)
        out = func(*args)
        if self.after is not None:
            self.after(op, out)
        self.on_output(op, out, lambda: func(*args))
        return out

    def run_other_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that is no weight op and add the model's tensors among its arguments to `other_uses`."""
        if not func.is_view:
            self.other_uses |= {hit[0] for leaf in tree_leaves((args, kwargs)) if (hit := self.named_tensor(leaf))}
        return func(*args, **kwargs)

    def on_output(self, op: WeightOp, out: Tensor, recompute: Callable[[], Tensor]) -> None:
        """Called after each weight op with its output and a function that runs it again; subclasses override it."""

    def named_tensor(self, tensor: Any) -> tuple[str, Tensor] | None:
        """Name and whole of the parameter or buffer that a tensor is a view of, or None."""
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return None
        for name, whole in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            if 0 <= tensor.storage_offset() - whole.storage_offset() < whole.numel():
                return name, whole
        return None


def _dense(mode: WeightOpMode, bias: Tensor | None, x: Tensor, right: Tensor) -> WeightOp | None:
    """X · right, `[rows, in]` by `[in, out]`, where right is (a part of) a weight `[out, in]` transposed, or one `[in, out]`."""
    found = mode.named_tensor(right)
    if found is None or found[1].dim() != 2 or mode.named_tensor(x) is not None:
        return None
    name, whole = found
    if right.stride() == whole.stride() and right.shape == whole.shape and right.stride(0) != right.stride(1):
        return _weight_op(mode, name, 0, 0, right.T, bias, x, None)
    first, rest = divmod(int(right.storage_offset() - whole.storage_offset()), whole.stride(0))
    if right.stride() == whole.stride()[::-1] and right.shape[0] == whole.shape[1] and not rest:
        return _weight_op(mode, name, 1, first, right.T, bias, x, None)
    return None


def _convolution(mode: WeightOpMode, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> WeightOp | None:
    """A convolution with the settings stride, padding, dilation, transposed, output_padding, groups of ATen's op."""
    stride, padding, dilation, transposed, output_padding, groups = settings
    found = mode.named_tensor(weight)
    if found is None or weight.shape != found[1].shape or weight.stride() != found[1].stride():
        return None
    space = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    strides, sides, dilations, extra = (
        tuple(values) * space if len(values) == 1 else tuple(values)
        for values in (stride, padding, dilation, output_padding)
    )
    ones = (1,) * space
    if not transposed:
        return _weight_op(
            mode, found[0], 1, 0, weight, bias, x, Geometry(kernel, strides, sides, sides, dilations, ones, groups)
        )
    if groups != 1:
        return None
    # From Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, section 4.
    before = tuple(gap * (size - 1) - side for gap, size, side in zip(dilations, kernel, sides, strict=True))
    after = tuple(start + more for start, more in zip(before, extra, strict=True))
    geometry = Geometry(kernel, ones, before, after, dilations, strides)
    return _weight_op(mode, found[0], 0, 0, weight.transpose(0, 1), bias, x, geometry)


def _weight_op(
    mode: WeightOpMode,
    name: str,
    axis: int,
    start: int,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    geometry: Geometry | None,
) -> WeightOp:
    """A weight op; its bias counts only if it is a whole vector `[out]`, or a part of one, of the model's."""
    added = None if bias is None else mode.named_tensor(bias)
    usable = added is not None and bias is not None and bias.dim() == 1 and len(bias) == len(weight)
    if added is not None and not usable:
        mode.other_uses.add(added[0])
    return WeightOp(
        name, axis, start, weight, bias if usable else None, added[0] if usable and added else None, x, geometry
    )


WEIGHT_OPS: Mapping[Any, Callable[..., WeightOp | None]] = {
    aten.mm.default: lambda mode, x, right: _dense(mode, None, x, right),
    aten.addmm.default: _dense,
    aten.convolution.default: _convolution,
}
"""The ops that multiply a weight with data, and how a `WeightOp` is made from their arguments."""
