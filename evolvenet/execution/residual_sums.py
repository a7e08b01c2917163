"""Weight ops whose outputs are added to another tensor of the same shape, as at the end of a residual branch.

`ResidualSumMode` follows the output of every weight op through biases that are added to it, batch norms in eval mode and
views, keeping the scale and shift that each output unit has had, and calls back before each sum in which such an output is an
operand. A layer that is refitted at that sum can also correct the errors of the other operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from evolvenet._compat.torch import UNSAFE_VIEW, schema_of, tree_leaves
from evolvenet.execution.weight_ops import WeightOp, WeightOpMode

aten = torch.ops.aten

SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})
DIFFERENCES = frozenset({aten.sub.Tensor, aten.sub_.Tensor, aten.rsub.Tensor})
NORMS = frozenset({aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default})
"""What a batch norm is on the CPU and others, on NVIDIA's GPUs, on AMD's; their first eight arguments are the same."""

RECTIFIERS = frozenset({aten.relu.default, aten.relu_.default})
"""Ops of whose argument nothing counts where it is negative."""

OnUse = Callable[[WeightOp, "TrackedOutput | None", bool], None]
"""Takes a weight op whose followed output another op takes, that output, or None for the sum that it ends in, and whether the
other op is a rectifier."""

OnBias = Callable[[WeightOp, str, Tensor | None, int], None]
"""Takes a weight op, the name of the vector with which its output is shifted, by how much `[out]`, and the sign.

With the sign s, the vector plus s·d shifts the op's product by d more: 1 where it is added (y + b), −1 where it is subtracted
or the product is subtracted from it (y − b, b − y), and for the running mean of a batch norm, by which nothing is shifted yet
(None).
"""


@dataclass(frozen=True, eq=False)
class TrackedOutput:
    """The output of a weight op, each unit of which has been scaled and shifted since.

    Args:
        op: the weight op.
        recompute: runs it again on the same inputs, with the weight's present values.
        scale: `[out]`.
        shift: `[out]`.
        normed: whether a batch norm has scaled it: a vector added after that is no bias of the weight op.
        sign: −1 if the output has been subtracted from something.
    """

    op: WeightOp
    recompute: Callable[[], Tensor]
    scale: Tensor
    shift: Tensor
    normed: bool = False
    sign: int = 1

    def values_at(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """Entries of a tensor with the layout of the output at some output positions of the op: `[len(rows), out]`."""
        flat = tensor if self.op.geometry else tensor.reshape(-1, len(self.scale))
        return self.op.outputs_at(flat, rows).movedim(0, 1).flatten(1)

    def recomputed(self, like: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """The op's output computed again, plus `offset` `[out]`, then scaled and shifted, in the shape of `like`."""
        out = self.recompute()
        shape = [1, -1] + [1] * (out.dim() - 2) if self.op.geometry else [-1]
        shift = self.shift + self.scale * offset
        return (out * self.scale.reshape(shape) + shift.reshape(shape)).reshape(like.shape)


class SumCallback(Protocol):
    """Called before a sum is computed, with the operand that is a weight op's output and the other operand."""

    def __call__(self, output: TrackedOutput, own: Tensor, other: Tensor) -> None:
        """`own` may be written to."""
        ...


class ResidualSumMode(WeightOpMode):
    """A `WeightOpMode` that also reports sums of two equal shapes with a weight op's output as an operand.

    If both operands are outputs of weight ops, the one whose weight has more columns is reported: it has more degrees of
    freedom to be refitted.

    Args:
        model: see `WeightOpMode`.
        before: see `WeightOpMode`.
        after: see `WeightOpMode`.
        on_sum: called before each such sum.
        on_bias: called for a weight op without a bias whose output has a vector added or subtracted by a later op. Gets
            what `OnBias` says.
        on_use: called before each op that takes an output that is followed or a reported sum, if it is not followed through it.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[WeightOp], None] | None = None,
        after: Callable[[WeightOp, Tensor], None] | None = None,
        on_sum: SumCallback | None = None,
        on_bias: OnBias | None = None,
        on_use: OnUse | None = None,
    ) -> None:
        super().__init__(model, before, after)
        self.on_sum, self.on_bias, self.on_use = on_sum, on_bias, on_use
        self._tracked, self._sums = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._summed: WeightOp | None = None

    def on_output(self, op: WeightOp, out: Tensor, recompute: partial[Tensor]) -> None:
        """Start to track the output of a weight op."""
        self.report_uses(recompute.args, rectified=False)
        if op.weight_first:
            return
        ones = torch.ones(len(op.weight), dtype=out.dtype, device=out.device)
        self._tracked[out] = TrackedOutput(op, recompute, ones, torch.zeros_like(ones))

    def run_other_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op; its result is tracked if it adds a bias, or the op is in `TRACKED_OPS` and its argument is tracked."""
        self._summed = None
        biased = self._report_sum(*args) if func in SUMS and not kwargs else None
        if func in DIFFERENCES and not kwargs:
            # rsub(a, b) is b − a.
            biased = self._report_difference(*(args if func != aten.rsub.Tensor else args[::-1]))
        transform = TRACKED_OPS.get(func)
        before = self._tracked.get(args[0]) if transform and isinstance(args[0], Tensor) else None
        if before is None and biased is None:
            self.report_uses((args, kwargs), rectified=func in RECTIFIERS)
        out = func(*args) if biased else super().run_other_op(func, args, kwargs)
        after = transform(before, out, *args) if transform and before else biased
        if before is not None and after is None:
            self.report_uses(args, rectified=False)
        if schema_of(func).is_mutable:
            for tensor in args:
                if isinstance(tensor, Tensor):
                    self._tracked.pop(tensor, None)
                    self._sums.pop(tensor, None)
        if self._summed is not None:
            self._sums[out] = self._summed
        if after is not None:
            self._report_running_mean(func, after, args)
            self._tracked[out[0] if isinstance(out, tuple) else out] = after
        return out

    def report_uses(self, args: Any, *, rectified: bool) -> None:
        """Call `on_use` for the followed outputs among an op's arguments, but for the one that it reports as summed."""
        if self.on_use is None:
            return
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor):
                output, summed = self._tracked.get(leaf), self._sums.get(leaf)
                if output is not None and output.op is not self._summed:
                    self.on_use(output.op, output, rectified)
                elif summed is not None:
                    self.on_use(summed, None, rectified)

    def _report_running_mean(self, func: Any, output: TrackedOutput, args: Any) -> None:
        """Call `on_bias` for a batch norm directly after a weight op without a bias."""
        mean = self.named_tensor(args[3]) if func in NORMS and output.op.bias is None else None
        if mean is not None and mean[1].shape == output.scale.shape and self.on_bias is not None:
            self.on_bias(output.op, mean[0], None, -1)

    def _report_sum(self, one: Any, two: Any) -> TrackedOutput | None:
        """Call `on_bias` or `on_sum` for a sum; returns the sum if it is a weight op's output with a bias, else None."""
        if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one is two:
            return None
        operands = [(self._tracked.get(own), own, other) for own, other in ((one, two), (two, one))]
        known = [(output, own, other) for output, own, other in operands if output is not None]
        for output, own, other in known:
            bias = self._bias_of(output, own, other)
            if bias is not None:
                return self._with_bias(output, bias, other.reshape(-1), 1)
        if known and one.shape == two.shape and self.on_sum is not None:
            chosen = max(known, key=lambda entry: entry[0].op.matrix().shape[-1])
            self._summed = chosen[0].op
            self.on_sum(*chosen)
        return None

    def _report_difference(self, minuend: Any, subtrahend: Any) -> TrackedOutput | None:
        """Call `on_bias` for a weight op's output from which a bias is subtracted, or that is subtracted from one."""
        if not isinstance(minuend, Tensor) or not isinstance(subtrahend, Tensor):
            return None
        output = self._tracked.get(minuend)
        if output is not None and (bias := self._bias_of(output, minuend, subtrahend)) is not None:
            return self._with_bias(output, bias, subtrahend.reshape(-1), -1)
        output = self._tracked.get(subtrahend)
        if output is not None and (bias := self._bias_of(output, subtrahend, minuend)) is not None:
            negative = replace(output, scale=-output.scale, shift=-output.shift, sign=-output.sign)
            return self._with_bias(negative, bias, minuend.reshape(-1), 1)
        return None

    def _with_bias(self, output: TrackedOutput, name: str, values: Tensor, sign: int) -> TrackedOutput:
        """The output after a bias has been added with a sign; calls `on_bias`."""
        if self.on_bias is not None:
            self.on_bias(output.op, name, values * (sign * output.sign), sign * output.sign)
        return replace(output, shift=output.shift + values * sign)

    def _bias_of(self, output: TrackedOutput, own: Tensor, other: Tensor) -> str | None:
        """Name of the parameter that is added to a weight op's output, if it has one number for each unit, and no other."""
        added = self.named_tensor(other)
        count, units = len(output.scale), _unit_axis(output, own)
        if added is None or added[0] not in self.parameters or output.normed or output.op.bias is not None:
            return None
        aligned = (1,) * (own.dim() - other.dim()) + tuple(other.shape)
        whole = other.numel() == added[1].numel() == count and len(aligned) == own.dim() and aligned[units] == count
        return added[0] if whole else None


def _unit_axis(output: TrackedOutput, tensor: Tensor) -> int:
    """The axis of the units of a tracked tensor: the second of a convolution's, the last of any length of a dense product's."""
    if output.op.geometry:
        return 1
    return max((axis for axis, length in enumerate(tensor.shape) if length > 1), default=tensor.dim() - 1)


def _through_batch_norm(output: TrackedOutput, out: Any, *args: Any) -> TrackedOutput | None:
    """Scale and shift after a batch norm with running statistics; None for one that takes them from the batch."""
    _, weight, bias, mean, variance, training, _, epsilon = args
    if training or mean is None:
        return None
    scale = (variance + epsilon).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return replace(output, scale=output.scale * scale, shift=output.shift * scale + shift, normed=True)


def _through_view(output: TrackedOutput, out: Tensor, x: Tensor, *rest: Any) -> TrackedOutput | None:
    """Unchanged after a view of a dense product's output, all units of a position side by side; None for any other view."""
    count = len(output.op.weight)
    if output.op.geometry or out.dim() == 0:
        return None
    return output if count in (1, out.shape[_unit_axis(output, out)]) else None


def _through_permutation(output: TrackedOutput, out: Tensor, x: Tensor, order: Sequence[int]) -> TrackedOutput | None:
    """Unchanged if only axes of length 1 change their places, as in einsum."""
    moved = [axis % x.dim() for axis in order if x.shape[axis] > 1]
    return _through_view(output, out, x) if moved == sorted(moved) else None


TRACKED_OPS: dict[Any, Callable[..., TrackedOutput | None]] = {
    **dict.fromkeys(NORMS, _through_batch_norm),
    aten.view.default: _through_view,
    aten.unsqueeze.default: _through_view,
    aten.squeeze.dim: _through_view,
    UNSAFE_VIEW: _through_view,
    aten.permute.default: _through_permutation,
}
"""Ops through which the output of a weight op is tracked, and how scale and shift change in each."""
