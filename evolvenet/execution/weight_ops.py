"""Every product of a weight with data in a run of a model, as `WeightOp`s.

`WeightOpMode` is a dispatch mode: it runs the model unchanged and compares the storage of every operand of a matrix
product or convolution with the model's parameters. A product with a parameter is passed to a callback as a `WeightOp`,
which gives the inputs, outputs and the weight as matrices, whatever module or function ran it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import TorchDispatchMode, in_backward, schema_of, tree_leaves
from evolvenet.execution.choices import SELECTING, Choices
from evolvenet.execution.product import Geometry as Geometry
from evolvenet.execution.product import NormedWeight as NormedWeight
from evolvenet.execution.product import WeightOp as WeightOp
from evolvenet.execution.product import output_positions as output_positions
from evolvenet.graph.naming import named_tensors

aten = torch.ops.aten
WEIGHT_NORM = "aten::_weight_norm_interface"


class WeightOpMode(TorchDispatchMode):
    """Runs a model unchanged and passes every product of one of its weights with data to callbacks.

    To be entered by `op_by_op(mode)`. Autocast is off while the mode is active.

    Args:
        model: the model, uncompiled.
        before: called with each weight op before it runs; may write into its weight and bias.
        after: called with each weight op and its output.

    Attributes:
        other_uses: names of the tensors that took part in any op that is no weight op.
        parameters: names of the model's parameters; its other tensors are buffers.
        normed: {name of the direction: the weight} of weights that weight norm has computed in this run. Products with
            them are weight ops of the direction if `follows_norms` is set.
        choices: which entries `topk` selects, to be recorded or selected again; None where nobody needs them.
        follows_norms: False by default: the weight is not what the direction is.
    """

    follows_norms = False
    choices: Choices | None = None

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[WeightOp], None] | None = None,
        after: Callable[[WeightOp, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.other_uses: set[str] = set()
        self.normed: dict[str, NormedWeight] = {}
        self._autocast_off = ExitStack()
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        tensors, _, self.parameters = named_tensors(model)
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
        if func is GROUPED and not kwargs and (ops := grouped_ops(self, *args)):
            return self._run_groups(ops, func, args)
        op = WEIGHT_OPS[func](self, *args) if func in WEIGHT_OPS and not kwargs else None
        if op is None:
            return self.run_other_op(func, args, kwargs)
        if self.before is not None:
            self.before(op)
        out = func(*args)
        if self.after is not None:
            self.after(op, out)
        self.on_output(op, out, partial(func, *args))
        return out

    def _run_groups(self, ops: Sequence[tuple[slice, WeightOp]], func: Any, args: Any) -> Tensor:
        """Run a product with one weight for each group of rows: a weight op for each."""
        for _, op in ops:
            if self.before is not None:
                self.before(op)
        out = func(*args)
        for rows, op in ops:
            if self.after is not None:
                self.after(op, out[rows])
        return out

    def run_other_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that is no weight op and add the model's tensors among its arguments to `other_uses`."""
        if self.follows_norms and schema_of(func).name == WEIGHT_NORM and self._is_normed(*args):
            return self._normed(func, *args)
        if self.choices is not None and func in SELECTING:
            return self.choices.run(func, args, kwargs)
        if not func.is_view:
            self.other_uses |= {hit[0] for leaf in tree_leaves((args, kwargs)) if (hit := self.named_tensor(leaf))}
        return func(*args, **kwargs)

    def _is_normed(self, direction: Tensor, length: Tensor, dim: int = 0) -> bool:
        """Whether both are whole tensors of the model."""
        found = [(self.named_tensor(each), each) for each in (direction, length)]
        return all(hit is not None and hit[1].shape == each.shape for hit, each in found)

    def _normed(self, func: Any, direction: Tensor, length: Tensor, dim: int = 0) -> Any:
        """Run weight norm; products with its result are weight ops of the direction from here on."""
        found = self.named_tensor(direction), self.named_tensor(length)
        assert found[0] is not None
        assert found[1] is not None
        out = func(direction, length, dim)
        self.normed[found[0][0]] = NormedWeight(out[0], found[1][0], dim)
        self._by_storage[out[0].untyped_storage().data_ptr()] = [(found[0][0], out[0])]
        return out

    def on_output(self, op: WeightOp, out: Tensor, recompute: partial[Tensor]) -> None:
        """Called after each weight op with its output and a function that runs it again; subclasses override it."""

    def named_tensor(self, tensor: Any) -> tuple[str, Tensor] | None:
        """Name and whole of the parameter or buffer that a tensor is a view of, or None."""
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return None
        for name, whole in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            if 0 <= tensor.storage_offset() - whole.storage_offset() < whole.numel():
                return name, whole
        return None


def grouped_ops(
    mode: WeightOpMode, x: Tensor, right: Tensor, ends: Tensor | None, *others: Any
) -> list[tuple[slice, WeightOp]]:
    """The weight ops of `_grouped_mm`, of the groups that have rows: each with one matrix of `[groups, in, out]`, the experts'.

    Args:
        mode: which knows the model's tensors.
        x: `[rows, in]`, sorted by group.
        right: `[groups, in, out]`, a whole parameter, or one with its last two axes exchanged.
        ends: `[groups]`, the end of each group's rows.
        others: further arguments of the op, which are not known here.
    """
    found = mode.named_tensor(right)
    if found is None or ends is None or ends.is_meta or others or (x.dim(), right.dim()) != (2, 3):
        return []
    name, whole = found
    axes = [
        axis
        for axis, view in ((1, whole), (2, whole.mT))
        if right.shape == view.shape and right.stride() == view.stride()
    ]
    if not axes:
        return []
    bounds = [slice(start, stop) for start, stop in pairwise([0, *ends.tolist()])]
    return [
        (rows, WeightOp(name, axes[0], 0, matrix.T, None, None, x[rows], None, stacked=True, group=group))
        for group, (rows, matrix) in enumerate(zip(bounds, right, strict=True))
        if rows.stop > rows.start
    ]


def _dense(mode: WeightOpMode, bias: Tensor | None, x: Tensor, right: Tensor) -> WeightOp | None:
    """X · right, `[rows, in]` by `[in, out]`, one of them data, the other (a part of) a weight `[out, in]` or `[in, out]`."""
    if mode.named_tensor(x) is None:
        return _product(mode, bias, x, right)
    return None if mode.named_tensor(right) is not None else _weight_first(mode, bias, right.T, x.T)


def _batched(mode: WeightOpMode, bias: Tensor | None, x: Tensor, right: Tensor) -> WeightOp | None:
    """`_dense` for a batch of matrices, all of which are multiplied with one weight: einsum's is a batch of one."""
    known = mode.named_tensor(x), mode.named_tensor(right)
    weight = right if known[0] is None else x
    if None not in known or (len(weight) > 1 and weight.stride(0)):
        return None
    if known[0] is None:
        return _product(mode, bias, x.reshape(-1, x.shape[-1]), right[0])
    return _weight_first(mode, bias, right.mT.reshape(-1, right.shape[-2]), x[0].T)


def _product(mode: WeightOpMode, bias: Tensor | None, x: Tensor, right: Tensor) -> WeightOp | None:
    """The weight op of x · right; None where right is not a block of outputs of one of the model's matrices."""
    found = mode.named_tensor(right)
    if found is None or found[1].dim() != 2 or right.is_complex():
        return None
    name, whole = found
    offset = int(right.storage_offset() - whole.storage_offset())
    # Strides alone do not tell the two layouts apart where an axis has one entry.
    for axis, strides in ((0, whole.stride()), (1, whole.stride()[::-1])):
        start, rest = divmod(offset, strides[1])
        if right.stride() == strides and len(right) == whole.shape[axis] and not rest:
            return _weight_op(mode, name, axis, start, right.T, bias, x, None)
    return None


def _weight_first(mode: WeightOpMode, bias: Tensor | None, x: Tensor, right: Tensor) -> WeightOp | None:
    """The weight op of (x · right)ᵀ; what is added to that is no bias, as it has its numbers along the rows of x."""
    added = None if bias is None else mode.named_tensor(bias)
    op = _product(mode, None, x, right)
    if op is not None and added is not None:
        mode.other_uses.add(added[0])
    return op and replace(op, addend=bias, weight_first=True)


def _convolution(mode: WeightOpMode, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> WeightOp | None:
    """A convolution with the settings stride, padding, dilation, transposed, output_padding, groups of ATen's op."""
    stride, padding, dilation, transposed, output_padding, groups = settings
    found = mode.named_tensor(weight)
    if found is None or weight.shape != found[1].shape or weight.stride() != found[1].stride() or weight.is_complex():
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
    """A weight op; its bias counts only if it is a whole vector `[out]` of parameters, or a part of one."""
    added = None if bias is None else mode.named_tensor(bias)
    if bias is None or added is None:
        return WeightOp(name, axis, start, weight, None, None, x, geometry, bias)
    if bias.dim() == 1 and len(bias) == len(weight) and added[0] in mode.parameters:
        return WeightOp(name, axis, start, weight, bias, added[0], x, geometry)
    mode.other_uses.add(added[0])
    return WeightOp(name, axis, start, weight, None, None, x, geometry, bias)


GROUPED = getattr(getattr(aten, "_grouped_mm", None), "default", None)
"""The op that multiplies groups of rows with one weight each."""
WEIGHT_OPS: Mapping[Any, Callable[..., WeightOp | None]] = {
    aten.mm.default: lambda mode, x, right: _dense(mode, None, x, right),
    aten.addmm.default: _dense,
    aten.bmm.default: lambda mode, x, right: _batched(mode, None, x, right),
    aten.baddbmm.default: _batched,
    aten.convolution.default: _convolution,
}
"""The ops that multiply a weight with data, and how a `WeightOp` is made from their arguments."""
