"""Which reads end in a sum: the branch of a residual block may make up for what its shortcut gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from evolvenet.execution.weight_ops import WeightOp, WeightOpMode

aten = torch.ops.aten

SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})
NORMS = frozenset({aten.native_batch_norm.default})


@dataclass(frozen=True, eq=False)
class Trail:
    """What came out of a read, and what has happened to it since: each output unit scaled and shifted.

    Args:
        read: the product.
        again: makes it once more, with the weight as it then is.
        scale: `[out]`.
        shift: `[out]`.
    """

    read: WeightOp
    again: Callable[[], Tensor]
    scale: Tensor
    shift: Tensor

    def at(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """A tensor laid out as what is followed, at some output places of the read: `[len(rows), out]`."""
        laid = tensor if self.read.geometry else tensor.reshape(-1, tensor.shape[-1])
        return self.read.answers(laid, rows).movedim(0, 1).flatten(1)

    def value(self, like: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """What is followed, made once more, `offset` `[out]` added to what came out of the read."""
        made = self.again()
        shape = [1, -1] + [1] * (made.dim() - 2)
        shift = self.shift + self.scale * offset
        return (made * self.scale.reshape(shape) + shift.reshape(shape)).reshape(like.shape)


class OnSum(Protocol):
    """Called before a sum is made, with the operand that ends a read and the other one."""

    def __call__(self, trail: Trail, own: Tensor, other: Tensor) -> None:
        """`own` may be written to."""
        ...


class Following(WeightOpMode):
    """Reads, and tells of sums of two equal shapes where an operand is a read's output, at most scaled and shifted.

    Where both are, the one with more columns is told of: it can make up for more.

    Args:
        model: see `WeightOpMode`.
        before: see `WeightOpMode`.
        after: see `WeightOpMode`.
        on_sum: called before each sum.
        on_bias: called with a read without a bias, the name of the whole vector that an op after it adds to what it made
            (1) or takes off (−1, a batch norm's running mean), and that sign.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[WeightOp], None] | None = None,
        after: Callable[[WeightOp, Tensor], None] | None = None,
        on_sum: OnSum | None = None,
        on_bias: Callable[[WeightOp, str, int], None] | None = None,
    ) -> None:
        super().__init__(model, before, after)
        self.on_sum, self.on_bias = on_sum, on_bias
        self.trails = WeakTensorKeyDictionary()

    def came_out(self, read: WeightOp, out: Tensor, again: Callable[[], Tensor]) -> None:
        """Begin to follow what a read made."""
        ones = torch.ones(len(read.weight), dtype=out.dtype, device=out.device)
        self.trails[out] = Trail(read, again, ones, torch.zeros_like(ones))

    def pass_by(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op; follow what it makes if it only scales, shifts or lays out anew."""
        biased = func in SUMS and not kwargs and self._add(*args)
        follow = FOLLOWED.get(func)
        trail = self.trails.get(args[0]) if follow and isinstance(args[0], Tensor) else None
        out = func(*args) if biased else super().pass_by(func, args, kwargs)
        made = follow(trail, out, *args) if follow and trail else None
        if made is not None:
            self._mean(func, made, args)
            self.trails[out[0] if isinstance(out, tuple) else out] = made
        if func._schema.is_mutable:
            for tensor in args:
                if isinstance(tensor, Tensor):
                    self.trails.pop(tensor, None)
        return out

    def _mean(self, func: Any, trail: Trail, args: Any) -> None:
        """Tell of a batch norm right after a read without a bias: its running mean can take what a bias would."""
        mean = self.owner(args[3]) if func in NORMS and trail.read.bias is None else None
        if mean is not None and mean[1].shape == trail.scale.shape and self.on_bias is not None:
            self.on_bias(trail.read, mean[0], -1)

    def _add(self, one: Any, two: Any) -> bool:
        """Tell of a sum; whether it was a read and its bias."""
        if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one is two:
            return False
        ends = [(self.trails.get(own), own, other) for own, other in ((one, two), (two, one))]
        known = [(trail, own, other) for trail, own, other in ends if trail is not None]
        for trail, _, other in known:
            added = self.owner(other)
            if added is not None and trail.read.bias is None and other.shape == added[1].shape == trail.scale.shape:
                if self.on_bias is not None:
                    self.on_bias(trail.read, added[0], 1)
                return True
        if known and one.shape == two.shape and self.on_sum is not None:
            self.on_sum(*max(known, key=lambda end: end[0].read.matrix().shape[-1]))
        return False


def _normed(trail: Trail, out: Any, x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> Any:
    training, _, epsilon = rest[:3]
    if training or mean is None:
        return None
    scale = (variance + epsilon).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return replace(trail, scale=trail.scale * scale, shift=trail.shift * scale + shift)


def _laid_out(trail: Trail, out: Tensor, x: Tensor, *rest: Any) -> Trail | None:
    """A dense output's rows may be laid out anew, each one staying whole."""
    whole = out.dim() > 0 and out.shape[-1] == x.shape[-1] and trail.read.geometry is None
    return trail if whole and out.shape[-1] == len(trail.read.weight) else None


FOLLOWED: dict[Any, Callable[..., Trail | None]] = {
    aten.native_batch_norm.default: _normed,
    aten.view.default: _laid_out,
    aten._unsafe_view.default: _laid_out,
}
"""Ops that a read's output is followed through, unit by unit."""
