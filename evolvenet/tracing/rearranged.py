"""Label layers of a tensor after a view, as a matrix, and of a tensor without elements, such as 0 register tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from evolvenet._compat.torch import tree_leaves


def moved_without_elements(
    op: Callable[..., Any], layer: Tensor, args: Sequence[Any], outputs: Sequence[Tensor]
) -> list[Tensor]:
    """The layers of the outputs of an op that rearranges a tensor of no elements; one element takes the place of none.

    The axes that have a size still have their units, which `cat` ties to those of the other tensors.

    Args:
        op: the op.
        layer: of the tensor, with size 1 where it is constant.
        args: of the op; the first is the tensor.
        outputs: of the op.

    >>> tokens = torch.zeros(1, 0, 3)
    >>> units = torch.tensor([[[5, 6, 7]]])
    >>> moved_without_elements(torch.Tensor.expand, units, (tokens, 2, -1, -1), [tokens.expand(2, -1, -1)])[0].shape
    torch.Size([2, 1, 3])
    """
    filled = layer.expand([max(size, 1) for size in args[0].shape])
    unknown = [torch.full((1,) * out.dim(), -1) for out in outputs]
    try:
        moved = tree_leaves(op(filled, *args[1:]))
    except RuntimeError:  # a view with a size of 0 in it
        return unknown
    shapes = [tuple(max(size, 1) for size in out.shape) for out in outputs]
    return moved if [tuple(part.shape) for part in moved] == shapes else unknown


def reshaped(layer: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The layer of a tensor of shape `old` after a view as `new`, still of size 1 where it is constant.

    Old and new dimensions are divided into runs of equal products; a layer that is constant over a run stays so.
    """
    before: list[int] = []
    after: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, one, two = (i, j), 1, 1
        while True:
            if one <= two and i < len(old) and (one < two or i == first[0]):
                one, i = one * old[i], i + 1
            elif j < len(new) and (two < one or j == first[1]):
                two, j = two * new[j], j + 1
            else:
                break
        run = layer.shape[first[0] : i]
        varies = any(size > 1 for size in run)
        before += old[first[0] : i] if varies else [1] * (i - first[0])
        after += new[first[1] : j] if varies else [1] * (j - first[1])
    return layer.expand(before).reshape(after)


def rows_along(layer: Tensor, dims: set[int]) -> Tensor:
    """A layer as a matrix whose columns go along `dims`, and its rows along the other dimensions.

    >>> rows_along(torch.tensor([[[7, 8]], [[5, 6]]]), {0})
    tensor([[7, 5],
            [8, 6]])
    """
    rows = layer.permute(*(dim for dim in range(layer.dim()) if dim not in dims), *sorted(dims))
    return rows.reshape(-1, math.prod(layer.shape[dim] for dim in dims))
