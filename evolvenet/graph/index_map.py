"""`IndexMap`: one width change, from `n` units to `m`, as one immutable vector of old indices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from evolvenet.errors import IndexMapError
from evolvenet.linalg.host_transfers import index_tensor

NEW_UNIT = -1


@dataclass(frozen=True)
class IndexMap:
    """For each new unit the old index that it comes from, or −1 for a new unit.

    Pruning is a subset, growing the identity followed by −1s, splitting a unit names its index twice.
    Build one with `keep`, `grow`, `of`, `of_parts` or `identity`; `indices` is stored as a tuple, so that maps can be
    compared, hashed and kept in a checkpoint.

    Args:
        indices: old index of each new unit, −1 for a new unit; at least one entry.
        size: number of old units.
        parts: of a width with parts (see `Width`) in which the units differ, the indices of each; `indices` is the first of
            them. () where all parts have the same.

    Raises:
        IndexMapError: for an index outside −1 … size − 1, an empty map, or parts with other numbers of units.

    >>> shrink = IndexMap.keep([0, 2, 5], size=8)
    >>> shrink.size, shrink.new_size
    (8, 3)
    >>> shrink.then(IndexMap.grow(3, 1)).indices
    (0, 2, 5, -1)
    """

    indices: tuple[int, ...]
    size: int
    parts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise IndexMapError(f"IndexMap: expected an old size of 1 or more, got {self.size}.")
        if not self.indices:
            raise IndexMapError(
                f"IndexMap: expected at least one unit to remain of {self.size}, got an empty map. Keep one unit or more."
            )
        self._check_parts()
        every = [index for indices in self.parts or (self.indices,) for index in indices]
        low, high = min(every), max(every)
        if low < NEW_UNIT or high >= self.size:
            raise IndexMapError(
                f"IndexMap: expected old indices in 0 … {self.size - 1}, or −1 for a new unit, "
                f"got {low if low < NEW_UNIT else high}."
            )

    def _check_parts(self) -> None:
        counts = [len(indices) for indices in self.parts]
        if self.parts and (len(set(counts)) > 1 or self.parts[0] != self.indices):
            raise IndexMapError(
                f"IndexMap: expected as many units in every part, and those of the first one first, got {counts} units. "
                "Use IndexMap.of_parts."
            )
        if self.parts and set(self.parts) == {self.indices}:
            object.__setattr__(self, "parts", ())

    @classmethod
    def of(cls, indices: Iterable[int] | Tensor, size: int) -> IndexMap:
        """Any vector of old indices; −1 stands for a new unit.

        >>> IndexMap.of([1, 0, -1], size=2).new_size
        3
        """
        if isinstance(indices, Tensor):
            indices = cast("list[int]", indices.tolist())  # pyright: ignore[reportUnknownMemberType]
        return cls(tuple(int(index) for index in indices), int(size))

    @classmethod
    def of_parts(cls, parts: Sequence[Sequence[int]], size: int) -> IndexMap:
        """The indices of each part of a width with parts (the layers and directions of an LSTM), −1 for a new unit.

        >>> IndexMap.of_parts([[0, 2], [1, 2]], size=3).part(1).indices
        (1, 2)
        """
        made = tuple(tuple(part) for part in parts)
        return cls(made[0] if made else (), size, made)

    @classmethod
    def keep(cls, indices: Iterable[int] | Tensor, size: int) -> IndexMap:
        """Keep only the named units, in the given order.

        Raises:
            IndexMapError: for a negative or repeated index.

        >>> IndexMap.keep([0, 2, 5], size=8).indices
        (0, 2, 5)
        """
        made = cls.of(indices, size)
        if NEW_UNIT in made.indices or len(set(made.indices)) != len(made.indices):
            raise IndexMapError(
                f"IndexMap.keep: expected distinct indices in 0 … {size - 1}, got {list(made.indices)}. "
                "For new units or split units use IndexMap.of."
            )
        return made

    @classmethod
    def grow(cls, size: int, count: int) -> IndexMap:
        """Keep all `size` units and append `count` new units.

        >>> IndexMap.grow(2, 2).indices
        (0, 1, -1, -1)
        """
        if count < 0:
            raise IndexMapError(
                f"IndexMap.grow: expected a count of 0 or more, got {count}. To shrink, use IndexMap.keep."
            )
        return cls((*range(size), *[NEW_UNIT] * count), size)

    @classmethod
    def identity(cls, size: int) -> IndexMap:
        """The map that changes nothing."""
        return cls(tuple(range(size)), size)

    @classmethod
    def concat(cls, maps: Sequence[IndexMap]) -> IndexMap:
        """One map for an axis that holds several widths one after the other.

        >>> IndexMap.concat([IndexMap.keep([1], 2), IndexMap.grow(2, 1)]).indices
        (1, 2, 3, -1)
        """
        indices: list[int] = []
        offset = 0
        for part in maps:
            part._check_alone()
            indices.extend(index if index == NEW_UNIT else index + offset for index in part.indices)
            offset += part.size
        return cls(tuple(indices), offset)

    def copying(self) -> IndexMap:
        """The same with a present unit in the place of each new one: its entries are copied from it.

        The kept units take turns, in steps of about 0.618 of their number, so that a few new units are as different from
        each other as the kept ones, whether these are sorted or repeat in a cycle.

        >>> IndexMap.grow(4, 3).copying().indices, IndexMap.of([3, 1, -1], 4).copying().indices
        ((0, 1, 2, 3, 0, 3, 2), (3, 1, 3))
        """
        if self.parts:
            return IndexMap.of_parts([each.copying().indices for each in self.each], self.size)
        kept = [index for index in self.indices if index != NEW_UNIT] or list(range(self.size))
        step = next(
            step for step in range(math.ceil(0.618 * len(kept)), 2 * len(kept) + 1) if math.gcd(step, len(kept)) == 1
        )
        turns = (kept[turn * step % len(kept)] for turn in range(len(self.indices)))
        return IndexMap(tuple(next(turns) if index == NEW_UNIT else index for index in self.indices), self.size)

    @property
    def each(self) -> tuple[IndexMap, ...]:
        """The map of every part that differs; of most maps itself alone."""
        return tuple(IndexMap(indices, self.size) for indices in self.parts) if self.parts else (self,)

    def inverse(self) -> IndexMap:
        """The map back: every old unit, −1 for one that has gone; new units go.

        >>> IndexMap.of([2, -1, 0], size=3).inverse()
        IndexMap(indices=(2, -1, 0), size=3, parts=())
        """
        places = [{old: now for now, old in enumerate(each.indices) if old != NEW_UNIT} for each in self.each]
        return IndexMap.of_parts([[at.get(old, NEW_UNIT) for old in range(self.size)] for at in places], self.new_size)

    def part(self, number: int) -> IndexMap:
        """The map of one part of a width: the same for all, unless they differ."""
        return IndexMap(self.parts[number], self.size) if self.parts else self

    def turned(self, parts: int) -> IndexMap:
        """The same change with other units in each of so many parts: where the first has unit i, part k has i + k.

        >>> IndexMap.keep([0, 1], size=3).turned(2).parts
        ((0, 1), (1, 2))
        """
        turned = [[i if i == NEW_UNIT else (i + k) % self.size for i in self.indices] for k in range(parts)]
        return IndexMap.of_parts(turned, self.size)

    def _check_alone(self) -> None:
        if self.parts:
            raise IndexMapError(
                f"IndexMap: expected the map of one part of a width, got one of {len(self.parts)} parts. Take map.part(number)."
            )

    @property
    def new_size(self) -> int:
        """Number of units after the change."""
        return len(self.indices)

    @property
    def new_units(self) -> tuple[int, ...]:
        """Positions of the new units, in the new order.

        Raises:
            IndexMapError: if they differ from part to part.
        """
        every = self.parts or (self.indices,)
        found = {tuple(place for place, index in enumerate(part) if index == NEW_UNIT) for part in every}
        if len(found) > 1:
            raise IndexMapError("IndexMap: expected new units in the same places of all parts, got others in some.")
        return found.pop()

    @property
    def removed(self) -> tuple[int, ...]:
        """Old indices that no new unit comes from."""
        self._check_alone()
        kept = set(self.indices)
        return tuple(index for index in range(self.size) if index not in kept)

    @property
    def removes_units(self) -> bool:
        """Whether no new unit comes from some old one, in any part."""
        return any(each.removed for each in self.each)

    @property
    def adds_units(self) -> bool:
        """Whether there is a new unit, in any part."""
        return any(NEW_UNIT in each.indices for each in self.each)

    @property
    def is_identity(self) -> bool:
        """Whether the map changes nothing."""
        return not self.parts and self.indices == tuple(range(self.size))

    def then(self, later: IndexMap) -> IndexMap:
        """The composition: this change and `later` after it as one map.

        Raises:
            IndexMapError: if `later` does not start at this map's `new_size`.
        """
        if later.size != self.new_size:
            raise IndexMapError(
                f"IndexMap.then: expected a map from {self.new_size} units, got one from {later.size}. "
                "The second map starts where the first one ends."
            )
        if self.parts or later.parts:
            if self.parts and later.parts and len(self.parts) != len(later.parts):
                raise IndexMapError(
                    f"IndexMap.then: expected a map of {len(self.parts)} parts, got one of {len(later.parts)}. "
                    "Take two maps of one width."
                )
            pairs = ((self.part(k), later.part(k)) for k in range(len(self.parts or later.parts)))
            return IndexMap.of_parts([first.then(second).indices for first, second in pairs], self.size)
        return IndexMap(tuple(NEW_UNIT if i == NEW_UNIT else self.indices[i] for i in later.indices), self.size)

    def repeat(self, inner: int) -> IndexMap:
        """The map for an axis on which every unit occupies `inner` consecutive places (a flattened channel).

        >>> IndexMap.of([1, -1], size=2).repeat(2).indices
        (2, 3, -1, -1)
        """
        self._check_alone()
        if inner == 1:
            return self
        indices = (
            NEW_UNIT if index == NEW_UNIT else index * inner + place for index in self.indices for place in range(inner)
        )
        return IndexMap(tuple(indices), self.size * inner)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The vector as an int64 tensor `[new_size]`; the host does not wait for the device."""
        self._check_alone()
        return index_tensor(self.indices, device)

    def apply(self, tensor: Tensor, dim: int, new_unit: float = 0.0) -> Tensor:
        """Rewrite axis `dim` of a tensor; new units' entries are filled with `new_unit`.

        Args:
            tensor: any shape with `tensor.shape[dim] == size`.
            dim: the axis.
            new_unit: value of the new units' entries.

        Returns:
            A new tensor, in the memory format of the old one; never a view.

        Raises:
            IndexMapError: if the axis is not `size` long.

        >>> IndexMap.of([1, -1], size=2).apply(torch.tensor([3., 4.]), 0)
        tensor([4., 0.])
        """
        self._check_alone()
        if tensor.shape[dim] != self.size:
            raise IndexMapError(
                f"IndexMap.apply: expected axis {dim} to have {self.size} entries, got a tensor of shape {tuple(tensor.shape)}."
            )
        if tensor.is_meta:
            # Trials use the shape alone, and index ops on tensors without data would take a third of their time.
            out = tensor.new_empty(
                [self.new_size if d == dim % tensor.dim() else n for d, n in enumerate(tensor.shape)]
            )
            return laid_out_as(tensor, out)
        index = self.tensor(tensor.device)
        out = tensor.index_select(dim, index.clamp(min=0))
        if self.new_units:
            out.index_fill_(dim, index_tensor(self.new_units, tensor.device), new_unit)
        return laid_out_as(tensor, out)


def laid_out_as(tensor: Tensor, out: Tensor) -> Tensor:
    """`out` in the memory format of `tensor`.

    Strides are compared: with one channel, or one place, `is_contiguous` is true of both formats, and convolutions use strides.

    >>> depthwise = torch.zeros(6, 1, 3, 3).to(memory_format=torch.channels_last)
    >>> laid_out_as(depthwise, torch.zeros(4, 1, 3, 3)).stride()
    (9, 1, 3, 1)
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is None:
        return out
    outer, channels, *places = range(tensor.dim())
    plain, there = _strides(tensor, range(tensor.dim())), _strides(tensor, (outer, *places, channels))
    return out.to(memory_format=last) if tensor.stride() == there != plain else out


def _strides(tensor: Tensor, axes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor of this shape whose axes are stored in this order, the outermost first."""
    found: dict[int, int] = {}
    step = 1
    for axis in reversed(axes):
        found[axis] = step
        step *= tensor.shape[axis]
    return tuple(found[axis] for axis in range(tensor.dim()))
