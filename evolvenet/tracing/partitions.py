"""Partitions of an axis by several label layers.

The axis that `h[:, :, None] * g[:, None, :]` has after a `flatten` is divided twice, by the units of `h` and by those of
`g`: it has two label layers of different partitions. What meets it with the same two partitions, a weight `[h, g, out]`
flattened in the same way, is tied layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def partition(layer: Tensor) -> Tensor:
    """For every place the first place (counted over the whole layer) with the same unit.

    >>> partition(torch.tensor([7, 7, 4, 7, 4]))
    tensor([0, 0, 2, 0, 2])
    """
    flat = layer.reshape(-1)
    _, units = torch.unique(flat, return_inverse=True)
    first = torch.full((int(units.max()) + 1,), len(flat)).scatter_reduce(0, units, torch.arange(len(flat)), "amin")
    return first[units].view(layer.shape)


def same_partition(one: Tensor, two: Tensor) -> bool:
    """Whether two layers of equal dimensions vary along the same ones and divide them into the same parts."""
    return one.shape == two.shape and torch.equal(partition(one), partition(two))


def partners(layer: Tensor, own: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Those of another tensor's layers along an axis that one layer is tied to.

    They are the layers of the same partition if there are any. Otherwise they are all that are not taken by another one
    of the tensor's own layers.

    Args:
        layer: of one tensor.
        own: all layers of this tensor that vary along the axis, `layer` among them.
        others: those of the other tensor, in equal dimensions.
    """
    if len(own) == 1 and len(others) == 1:
        return list(others)
    same = [other for other in others if same_partition(layer, other)]
    return same or [other for other in others if not any(same_partition(each, other) for each in own)]
