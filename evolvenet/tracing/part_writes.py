"""What is written into a view of a tensor belongs to the tensor: from the labels of the view to those of the tensor.

`out = x.new_zeros(...); out[:, :, :4] = h` copies into a slice. Packed sequences, circular padding, neural operators and
recurrent networks that collect their steps are written in this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolvenet.tracing.labels import places_of_constant, varying


@dataclass(frozen=True)
class Places:
    """The places that a dimension of a view takes along a dimension of the tensor that it is a view of.

    Args:
        dim: the tensor's dimension.
        size: its size.
        at: the places, as many as the view has.
    """

    dim: int
    size: int
    at: range

    @property
    def all(self) -> bool:
        """Whether they are all places, in order."""
        return self.at == range(self.size)


def places_of_view(base: Tensor, view: Tensor) -> dict[int, Places] | None:
    """For each dimension of a view longer than 1 its places in the tensor; None for other views than slices and permutations.

    >>> base = torch.zeros(4, 6)
    >>> places_of_view(base, base[1, 2:6:2])
    {0: Places(dim=1, size=6, at=range(2, 6, 2))}
    >>> places_of_view(base, base.view(-1)) is None
    True
    """
    if not base.is_contiguous() or base.numel() == 0:
        return None
    offset = int(view.storage_offset()) - int(base.storage_offset())
    start = _coordinates(base, offset)
    found: dict[int, Places] = {}
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            continue
        second = _coordinates(base, offset + stride)
        last = _coordinates(base, offset + stride * (size - 1))
        moved = [k for k in range(base.dim()) if second[k] != start[k]]
        step = second[moved[0]] - start[moved[0]] if len(moved) == 1 else 0
        if step <= 0 or any(
            last[k] != start[k] + (step * (size - 1) if k == moved[0] else 0) for k in range(base.dim())
        ):
            return None
        at = range(start[moved[0]], start[moved[0]] + step * size, step)
        found[dim] = Places(moved[0], base.shape[moved[0]], at[:size])
    return found if len({places.dim for places in found.values()}) == len(found) else None


def _coordinates(base: Tensor, offset: int) -> list[int]:
    coordinates = []
    for stride in base.stride():
        place, offset = divmod(offset, stride) if stride else (0, offset)
        coordinates.append(place)
    return coordinates


def in_base(base: Tensor, places: Mapping[int, Places], layer: Tensor) -> Tensor | None:
    """A layer of a view as one of the tensor; None if it varies along several dimensions that are written in part.

    What is not written are places of a constant.
    """
    moved = {dim: places[dim] for dim in varying(layer)}
    partial = [dim for dim, each in moved.items() if not each.all]
    if partial and len(moved) > 1:
        return None
    shape = [1] * base.dim()
    for each in moved.values():
        shape[each.dim] = each.size
    if partial:
        (each,) = moved.values()
        whole = places_of_constant(each.size, 0, 1)
        whole[torch.tensor(each.at)] = layer.reshape(-1)
        return whole.view(shape)
    order = sorted(moved, key=lambda dim: moved[dim].dim)
    kept = layer.reshape([layer.shape[dim] for dim in sorted(moved)])
    return kept.permute([sorted(moved).index(dim) for dim in order]).reshape(shape)


def data_in_base(base: Tensor, places: Mapping[int, Places]) -> Sequence[Tensor]:
    """The layer of a tensor of constants after data have been written into places of one dimension: they are no constants."""
    partial = [(dim, each) for dim, each in places.items() if not each.all]
    if len(partial) != 1:
        return ()
    ((dim, each),) = partial
    shape = [len(each.at) if k == dim else 1 for k in range(max(places) + 1)]
    layer = in_base(base, {dim: each}, torch.full(shape, -1))
    return () if layer is None else (layer,)
