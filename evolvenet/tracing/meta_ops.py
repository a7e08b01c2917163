"""Ops on meta tensors, and in a precision that they do not have: shortcuts to what they return, and checks of shapes.

PyTorch finds these shapes by decomposing an op into others in Python, which takes up to a millisecond: most of the time of
a deep model's trials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from evolvenet._compat.torch import SAFE_SOFTMAX

aten = torch.ops.aten
FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def _batch_norm(source: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    if not source.is_meta:
        return None
    channels = source.shape[1]
    for tensor in others[:4]:
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise RuntimeError(f"batch norm of {channels} channels with a parameter of shape {tuple(tensor.shape)}")
    return torch.empty_like(source), source.new_empty(channels), source.new_empty(channels)


def _layer_norm(
    source: Tensor, over: Sequence[int], weight: Tensor | None, bias: Tensor | None, *eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As on the CPU, where the result is contiguous."""
    size, same = tuple(over), {source.dtype}
    affine = [tensor for tensor in (weight, bias) if tensor is not None]
    if not _is_plain(source) or source.dtype not in (torch.float32, torch.float64):
        return None
    if not size or tuple(source.shape[-len(size) :]) != size or any(tuple(t.shape) != size for t in affine):
        return None
    if any(tensor.dtype not in same for tensor in affine):
        return None
    statistics = (*source.shape[: -len(size)], *([1] * len(size)))
    return source.new_empty(source.shape), source.new_empty(statistics), source.new_empty(statistics)


def _addmm(bias: Tensor, one: Tensor, two: Tensor) -> Tensor | None:
    fits = one.dim() == two.dim() == 2 and one.shape[1] == two.shape[0] and tuple(bias.shape) == (two.shape[1],)
    if not fits or not _is_plain(one) or not one.dtype == two.dtype == bias.dtype:
        return None
    return one.new_empty((one.shape[0], two.shape[1]))


def _mm(one: Tensor, two: Tensor) -> Tensor | None:
    fits = one.dim() == two.dim() == 2 and one.shape[1] == two.shape[0]
    return one.new_empty((one.shape[0], two.shape[1])) if fits and _is_plain(one) and one.dtype == two.dtype else None


def _softmax(source: Tensor, dim: int, *dtype: Any) -> Tensor | None:
    known = not dtype and _is_plain(source) and source.is_contiguous()
    return torch.empty_like(source) if known and -source.dim() <= dim < source.dim() else None


def _power(source: Tensor, exponent: Any) -> Tensor | None:
    return torch.empty_like(source) if _is_plain(source) and isinstance(exponent, (int, float)) else None


def _mean(source: Tensor, over: Sequence[int] | None, keeps: bool = False) -> Tensor | None:
    """Along the last dimension, which stays with size 1."""
    last = over is not None and len(over) == 1 and source.dim() > 1 and over[0] in (-1, source.dim() - 1)
    known = last and keeps and _is_plain(source) and source.is_contiguous()
    return source.new_empty((*source.shape[:-1], 1)) if known else None


def _triangle(source: Tensor, *diagonal: int) -> Tensor | None:
    return torch.empty_like(source) if source.is_meta and source.is_contiguous() and source.dim() > 1 else None


def _pointwise(source: Tensor, *others: Any) -> Tensor | None:
    """Of one tensor; other arguments are settings."""
    return torch.empty_like(source) if _is_plain(source) else None


def _pointwise_in_place(source: Tensor, *others: Any) -> Tensor | None:
    return source if _is_plain(source) else None


def _pair(one: Any, two: Any) -> Tensor | None:
    """Of two tensors, of which the second broadcasts to the first, or of a tensor and a number."""
    if not isinstance(one, Tensor) or not _is_plain(one):
        return None
    if isinstance(two, Tensor):
        if two.dtype != one.dtype or not two.is_meta or two.dim() > one.dim():
            return None
        behind = one.shape[one.dim() - two.dim() :]
        if any(size not in (1, other) for size, other in zip(two.shape, behind, strict=True)):
            return None
    elif not isinstance(two, (int, float)):
        return None
    return torch.empty_like(one)


def _is_plain(tensor: Tensor) -> bool:
    """Whether `empty_like` gives a result's strides: it does unless several entries lie in one place."""
    return tensor.is_meta and tensor.dtype in FLOATS and (tensor.is_contiguous() or 0 not in tensor.stride())


def _grouped_mm(source: Tensor, weight: Tensor, ends: Tensor | None = None, *others: Any) -> Tensor | None:
    """As on the CPU; PyTorch takes half precision alone on meta tensors, and no double precision, which goes group by group."""
    known = source.is_meta or source.dtype == torch.float64
    if others or ends is None or not known or (source.dim(), weight.dim()) != (2, 3):
        return None
    if source.shape[1] != weight.shape[1] or ends.shape[0] != weight.shape[0]:
        raise RuntimeError(
            f"rows of {source.shape[1]} in {ends.shape[0]} groups multiplied by {list(weight.shape)} in _grouped_mm"
        )
    if source.is_meta:
        if any(max(each.stride()[-2:]) * each.element_size() % 16 for each in (source, weight)):
            raise RuntimeError("strides should be multiple of 16 bytes")
        return source.new_empty((source.shape[0], weight.shape[2]))
    out = source.new_zeros((source.shape[0], weight.shape[2]))
    starts = [0, *ends.tolist()]
    for group, (start, stop) in enumerate(pairwise(starts)):
        out[start:stop] = source[start:stop] @ weight[group]
    return out


_OF_ONE = (
    *(aten.sigmoid, aten.tanh, aten.relu, aten.silu, aten.hardswish, aten.hardsigmoid, aten.exp, aten.rsqrt, aten.sqrt),
    *(aten.neg, aten.gelu),
)
_IN_PLACE = (aten.sigmoid_, aten.tanh_, aten.relu_, aten.silu_, aten.hardswish_)
META_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.addmm.default: _addmm,
    **({aten._grouped_mm.default: _grouped_mm} if hasattr(aten, "_grouped_mm") else {}),
    aten.mm.default: _mm,
    SAFE_SOFTMAX: _softmax,
    aten.pow.Tensor_Scalar: _power,
    aten.mul.Scalar: _power,
    aten.mean.dim: _mean,
    aten.tril.default: _triangle,
    **{op.default: _pointwise for op in _OF_ONE},
    **{op.default: _pointwise_in_place for op in _IN_PLACE},
    **{op.Tensor: _pair for op in (aten.add, aten.sub, aten.mul, aten.div)},
}
"""Op → a function of its positional arguments that returns what the op does; None for arguments that are left to the op."""


def _check_slices(target: Tensor, dim: int, index: Tensor, source: Tensor, *others: Any) -> None:
    """The source of `index_add` has the target's shape, but for as many slices as the index has entries."""
    expected = list(target.shape)
    expected[dim] = index.numel()
    if list(source.shape) != expected:
        raise RuntimeError(f"slices of {list(source.shape)} written to {list(target.shape)}: expected {expected}")


def _check_values(target: Tensor, indices: Sequence[Tensor | None], values: Tensor, *others: Any) -> None:
    """The values of `index_put` broadcast to what the indices pick; of a mask alone, to any number of slices."""
    mask = indices[0]
    if len(indices) == 1 and mask is not None and mask.is_meta and mask.dtype == torch.bool:
        slices = target.shape[mask.dim() :]
        counted = max(0, values.dim() - len(slices))
        if mask.shape != target.shape[: mask.dim()] or counted > 1:
            raise RuntimeError(
                f"a mask of {list(mask.shape)} and values of {list(values.shape)} on {list(target.shape)}"
            )
        values.expand((*values.shape[:counted], *slices))
        return
    values.expand(torch.ops.aten.index.Tensor(target, indices).shape)


META_CHECKS = {
    torch.ops.aten.index_add.default: _check_slices,
    torch.ops.aten.index_add_.default: _check_slices,
    torch.ops.aten.index_reduce.default: _check_slices,
    torch.ops.aten.index_reduce_.default: _check_slices,
    torch.ops.aten.index_put.default: _check_values,
    torch.ops.aten.index_put_.default: _check_values,
}
"""Ops that take any shapes on meta tensors, with what they check on others."""
