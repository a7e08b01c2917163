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


def places_of_view(base: Tensor, view: Tensor) -> dict[int, Places]:
    """For each dimension of a view that goes along one dimension of the tensor its places there.

    Dimensions of size 1 are left out, and those that go along several dimensions, as after `view(-1)` or `diagonal`.

    >>> base = torch.zeros(4, 6)
    >>> places_of_view(base, base[1, 2:6:2])
    {0: Places(dim=1, size=6, at=range(2, 6, 2))}
    >>> places_of_view(base, base.view(-1))
    {}
    """
    if not base.is_contiguous() or view.numel() == 0:
        return {}
    offset = int(view.storage_offset()) - int(base.storage_offset())
    start = _coordinates(base, offset)
    moved: dict[int, set[int]] = {}
    found: dict[int, Places] = {}
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            continue
        second, last = (_coordinates(base, offset + stride * steps) for steps in (1, size - 1))
        moved[dim] = {k for k in range(base.dim()) if second[k] != start[k] or last[k] != start[k]}
        along = min(moved[dim], default=0)
        step = second[along] - start[along]
        if len(moved[dim]) == 1 and step > 0 and last[along] == start[along] + step * (size - 1):
            at = range(start[along], start[along] + step * size, step)
            found[dim] = Places(along, base.shape[along], at)
    others = {dim: {k for other, each in moved.items() if other != dim for k in each} for dim in found}
    return {dim: places for dim, places in found.items() if places.dim not in others[dim]}


def _coordinates(base: Tensor, offset: int) -> list[int]:
    coordinates = []
    for stride in base.stride():
        place, offset = divmod(offset, stride) if stride else (0, offset)
        coordinates.append(place)
    return coordinates


def in_base(base: Tensor, places: Mapping[int, Places], layer: Tensor) -> Tensor | None:
    """A layer of a view as one of the tensor; None if that is not known, or it is written in part along two dimensions.

    What is not written are places of a constant, of heads × places the same ones in each head.
    """
    if not places.keys() >= set(varying(layer)):
        return None
    moved = {dim: places[dim] for dim in varying(layer)}
    partial = [each for each in moved.values() if not each.all]
    if len(partial) > 1:
        return None
    shape = [1] * base.dim()
    for each in moved.values():
        shape[each.dim] = len(each.at)
    order = sorted(moved, key=lambda dim: moved[dim].dim)
    kept = layer.reshape([layer.shape[dim] for dim in sorted(moved)])
    kept = kept.permute([sorted(moved).index(dim) for dim in order]).reshape(shape)
    for each in partial:
        shape[each.dim] = each.size
        whole = places_of_constant(each.size, each.dim, base.dim()).expand(shape).clone()
        kept = whole.index_copy_(each.dim, torch.tensor(each.at), kept)
    return kept


def data_in_base(base: Tensor, places: Mapping[int, Places], layers: Sequence[Tensor] = ()) -> Sequence[Tensor]:
    """The layers of a tensor of constants after data have been written into places of one dimension: they are no constants.

    Args:
        base: the tensor.
        places: of the view that is written.
        layers: of the tensor before; none for constants alone.
    """
    partial = [each for each in places.values() if not each.all]
    if len(partial) != 1:
        return ()
    (each,) = partial
    found = []
    for layer in layers or (places_of_constant(each.size, each.dim, base.dim()),):
        if each.dim in varying(layer):
            at = torch.tensor(each.at)
            written = layer.index_select(each.dim, at)
            layer = layer.index_copy(each.dim, at, torch.where(written < -1, -1, written))
        found.append(layer)
    return found
