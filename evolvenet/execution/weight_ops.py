"""What every weight multiplies, seen op by op: the types of the modules and the ways to call a layer do not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evolvenet.execution.shadow_tensors import op_by_op
from evolvenet.graph.naming import named_tensors

aten = torch.ops.aten


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; a transposed one comes as the plain one over a spread input.

    Args:
        kernel: extents of the kernel, one an axis of space; as the next ones.
        stride: between output places.
        before: zeros added before the input, negative to leave places out.
        after: the same behind it.
        dilation: between kernel places.
        spread: the input's places lie this far apart, zeros between them; 1 but for transposed convolutions.
        groups: independent parts that the channels fall into.
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
    """One product of a weight with data, as it happens.

    Args:
        tensor: name of the weight.
        axis: the weight's axis along which it reads: 1, but 0 for transposed convolutions and weights `[in, out]`.
        start: the first row of the weight's other axis that takes part: an attention layer may use a third at a time.
        weight: the entries that take part, a view that can be written to: `[out, in / groups, k…]`.
        bias: the bias that is added in the same op, a view `[out]`, or None.
        bias_name: its name.
        inputs: `[rows, in]`, for a convolution `[N, in, space…]`.
        geometry: None for a dense product.
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
        """Independent parts of the product."""
        return self.geometry.groups if self.geometry else 1

    def units(self, rows: Tensor) -> Tensor:
        """What the weight's `in / groups` columns read at some places: `[len(rows) · groups, in / groups]`.

        Args:
            rows: numbers of places of the input: rows, or samples × space.
        """
        if self.geometry is None:
            return self.inputs[rows]
        space = self.inputs.shape[2:].numel()
        at = torch.unravel_index(rows % space, self.inputs.shape[2:])
        chosen = self.inputs.movedim(1, -1)[(rows // space, *at)]
        return chosen.reshape(len(rows) * self.groups, -1)

    @property
    def places(self) -> int:
        """Number of places of the input: rows, or samples × space."""
        return self.inputs.shape[0] if self.geometry is None else self.inputs[:, :1].numel()

    @property
    def products(self) -> int:
        """How often each entry of the weight is multiplied: once an output place, transposed ones once an input place."""
        if self.geometry is None or self.axis == 0:
            return self.places
        patches = _patches(self.inputs, self.geometry)
        return patches.shape[0] * patches.shape[2 : 2 + len(self.geometry.kernel)].numel()

    def columns(self, rows: Tensor) -> Tensor:
        """The matrix that the weight multiplies at some output places: `[groups, len(rows), columns]`.

        Args:
            rows: numbers of output places: rows, or samples × output space.
        """
        if self.geometry is None:
            return self.inputs[rows][None]
        patches = _patches(self.inputs, self.geometry)
        space = patches.shape[2 : 2 + len(self.geometry.kernel)]
        at = torch.unravel_index(rows % space.numel(), space)
        chosen = patches.movedim(1, 1 + len(space))[(rows // space.numel(), *at)]
        return chosen.reshape(len(rows), self.groups, -1).movedim(1, 0)

    @property
    def turned(self) -> tuple[int, ...]:
        """The axes along which the kernel is turned round: those of a transposed convolution."""
        return tuple(range(2, self.weight.dim())) if self.axis == 0 else ()

    def matrix(self) -> Tensor:
        """The weight as it multiplies `columns`: `[groups, out / groups, columns]`."""
        return self.weight.flip(self.turned).reshape(self.groups, self.weight.shape[0] // self.groups, -1)

    def put(self, matrix: Tensor) -> None:
        """Write a matrix as `matrix` gives it into the weight."""
        self.weight.copy_(matrix.reshape(self.weight.shape).flip(self.turned))

    def answers(self, out: Tensor, rows: Tensor) -> Tensor:
        """What came out at the same output places as in `columns`: `[groups, len(rows), out / groups]`."""
        if self.geometry is None:
            return out[rows][None]
        space = out.shape[2:].numel()
        chosen = out.flatten(2)[rows // space, :, rows % space]
        return chosen.reshape(len(rows), self.groups, -1).movedim(1, 0)


def out_places(read: WeightOp, out: Tensor) -> int:
    """Number of output places: rows, or samples × output space."""
    return len(out) if read.geometry is None else out[:, :1].numel()


def _patches(x: Tensor, geometry: Geometry) -> Tensor:
    """`[N, channels, output space…, kernel…]`, a view of the padded input: only what is chosen is ever copied."""
    if any(step > 1 for step in geometry.spread):
        extents = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], geometry.spread, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *extents)
        wide[(slice(None), slice(None), *(slice(None, None, step) for step in geometry.spread))] = x
        x = wide
    sides = zip(reversed(geometry.before), reversed(geometry.after), strict=True)
    padded = functional.pad(x, [amount for side in sides for amount in side]).contiguous()
    walks = list(zip(padded.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True))
    counts = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in walks]
    steps = padded.stride()
    return padded.as_strided(
        (*x.shape[:2], *counts, *geometry.kernel),
        (
            *steps[:2],
            *(step * stride for step, (_, _, stride, _) in zip(steps[2:], walks, strict=True)),
            *(step * dilation for step, (_, _, _, dilation) in zip(steps[2:], walks, strict=True)),
        ),
    )


class WeightOpMode(TorchDispatchMode):
    """Lets a model run as it is and tells of every product of one of its weights with data.

    Args:
        model: the model, uncompiled.
        before: called with each read before it happens; it may write into the read's weight and bias.
        after: called with each read and what came out.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[WeightOp], None] | None = None,
        after: Callable[[WeightOp, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.others: set[str] = set()
        """Names of the tensors that took part in anything but reads: a fit of one's reads would be wrong for it."""
        self._owners: dict[int, list[tuple[str, Tensor]]] = {}
        tensors = named_tensors(model)[0]
        self.devices = {tensor.device.type for tensor in tensors.values()}
        for name, tensor in tensors.items():
            self._owners.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        kwargs = kwargs or {}
        made = KINDS[func](self, *args) if func in KINDS and not kwargs else None
        if made is None:
            return self.pass_by(func, args, kwargs)
        if self.before is not None:
            self.before(made)
        out = func(*args)
        if self.after is not None:
            self.after(made, out)
        self.came_out(made, out, lambda: func(*args))
        return out

    def pass_by(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that is no read, and note which weights it uses."""
        if not func.is_view:
            self.others |= {hit[0] for leaf in tree_leaves((args, kwargs)) if (hit := self.owner(leaf))}
        return func(*args, **kwargs)

    def came_out(self, read: WeightOp, out: Tensor, again: Callable[[], Tensor]) -> None:
        """Called with what a read made, and how to make it once more."""

    def owner(self, tensor: Any) -> tuple[str, Tensor] | None:
        """Name and whole of the model's tensor that this one is a part of."""
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return None
        for name, whole in self._owners.get(tensor.untyped_storage().data_ptr(), ()):
            if 0 <= tensor.storage_offset() - whole.storage_offset() < whole.numel():
                return name, whole
        return None


def _dense(mode: WeightOpMode, bias: Tensor | None, x: Tensor, right: Tensor) -> WeightOp | None:
    """X · right, `[rows, in]` by `[in, out]`: right is a part of a weight, or of one on its side."""
    found = mode.owner(right)
    if found is None or found[1].dim() != 2 or mode.owner(x) is not None:
        return None
    name, whole = found
    if right.stride() == whole.stride() and right.shape == whole.shape and right.stride(0) != right.stride(1):
        return _made(mode, name, 0, 0, right.T, bias, x, None)
    first, rest = divmod(int(right.storage_offset() - whole.storage_offset()), whole.stride(0))
    if right.stride() == whole.stride()[::-1] and right.shape[0] == whole.shape[1] and not rest:
        return _made(mode, name, 1, first, right.T, bias, x, None)
    return None


def _convolution(
    mode: WeightOpMode,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> WeightOp | None:
    found = mode.owner(weight)
    if found is None or weight.shape != found[1].shape or weight.stride() != found[1].stride():
        return None
    space = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    steps, sides, apart, extra = (
        tuple(values) * space if len(values) == 1 else tuple(values)
        for values in (stride, padding, dilation, output_padding)
    )
    ones = (1,) * space
    if not transposed:
        return _made(mode, found[0], 1, 0, weight, bias, x, Geometry(kernel, steps, sides, sides, apart, ones, groups))
    if groups != 1:
        return None
    # From Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, section 4.
    before = tuple(gap * (size - 1) - side for gap, size, side in zip(apart, kernel, sides, strict=True))
    after = tuple(start + more for start, more in zip(before, extra, strict=True))
    turned = Geometry(kernel, ones, before, after, apart, steps)
    return _made(mode, found[0], 0, 0, weight.transpose(0, 1), bias, x, turned)


def _made(
    mode: WeightOpMode,
    name: str,
    axis: int,
    start: int,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    geometry: Geometry | None,
) -> WeightOp:
    added = None if bias is None else mode.owner(bias)
    usable = added is not None and bias is not None and bias.dim() == 1 and len(bias) == len(weight)
    if added is not None and not usable:
        mode.others.add(added[0])
    return WeightOp(
        name, axis, start, weight, bias if usable else None, added[0] if usable and added else None, x, geometry
    )


KINDS: Mapping[Any, Callable[..., WeightOp | None]] = {
    aten.mm.default: lambda mode, x, right: _dense(mode, None, x, right),
    aten.addmm.default: _dense,
    aten.convolution.default: _convolution,
}
"""The ops that multiply a weight with data; other uses of a weight are kept in `WeightOpMode.others`."""


@contextmanager
def watched(reading: WeightOpMode) -> Iterator[None]:
    """Every op of the model goes through `reading`: no compiled code, no autocast, no attention that hides its products."""
    with ExitStack() as stack:
        stack.enter_context(op_by_op())
        # Autocast multiplies with a copy of the weight: one could not tell which weight it is.
        for kind in reading.devices:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(reading)
        yield
