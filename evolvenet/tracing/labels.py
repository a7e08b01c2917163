"""Label layers: which unit every element of a tensor belongs to, and the ledger of what was found tied to what.

A *unit* is one place of one axis of one parameter or buffer; it has an id. A *layer* is an int64 tensor that says, for
each element of some tensor, the unit it belongs to; it is stored at size 1 along the dimensions in which it is constant.
A weight `[out, in]` has two layers, its activations usually one. Id −1 means "no unit here" (padding, data).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from evolvenet.graph.width_graph import CONSUMES, PRODUCES

DATA = "data"
CONSTANT = "constant"
LABELLED = "labelled"
KERNEL = "counts positions of a kernel, not units"


@dataclass(frozen=True)
class Label:
    """What is known of one tensor.

    Args:
        layers: its label layers, each with the tensor's number of dimensions.
        kind: "labelled"; "data" (comes from outside or has lost its labels: it will not follow a resize);
            "constant" (made by the model's own code during the run from current shapes: it may well follow).
        origin: the parameter or buffer that the tensor is a rearrangement of, or that it was made from together with
            other parameters alone; None for what depends on data.
    """

    layers: tuple[Tensor, ...] = ()
    kind: str = DATA
    origin: str | None = None


@dataclass(frozen=True)
class AxisIds:
    """Ids `start … start + size − 1` belong to the places of axis `dim` of a tensor."""

    tensor: str
    dim: int
    start: int
    size: int


@dataclass
class Ledger:
    """What one or several runs of the model have shown. Filled by the rules, read once by `components`."""

    axes: list[AxisIds] = field(default_factory=list)
    units: int = 0
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    mixed: list[tuple[Tensor, str]] = field(default_factory=list)
    whole_groups: list[Tensor] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    equals: list[tuple[tuple[str, int], tuple[str, int]]] = field(default_factory=list)
    lent: set[tuple[str, int]] = field(default_factory=set)
    order: dict[str, int] = field(default_factory=dict)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    grids: dict[bytes, Tensor] = field(default_factory=dict)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    row_ids: set[int] = field(default_factory=set)
    treated: dict[bytes, str] = field(default_factory=dict)
    modes: list[bool] = field(default_factory=list)

    def enroll(self, name: str, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Give ids to every axis longer than 1 of a parameter or buffer; a size-1 axis is a broadcast, not a width."""
        layers = []
        for dim, size in enumerate(shape):
            if size > 1:
                ids = torch.arange(self.units, self.units + size)
                layers.append(ids.view([size if d == dim else 1 for d in range(len(shape))]))
                self.axes.append(AxisIds(name, dim, self.units, size))
                self.units += size
        return tuple(layers)

    def union(self, first: Tensor, second: Tensor) -> None:
        """Corresponding elements (after broadcasting) are one unit; a partner without a unit freezes the other."""
        if first.shape == second.shape and torch.equal(first, second):
            return
        one, two = (part.reshape(-1) for part in torch.broadcast_tensors(first, second))
        real = (one >= 0) & (two >= 0)
        if not bool(real.all()):
            lonely = torch.cat([one[(two < 0) & (one >= 0)], two[(one < 0) & (two >= 0)]])
            self.freeze(lonely, "tied to places that belong to no unit (padding or data)")
            one, two = one[real], two[real]
        if len(one) > 4096:
            pairs = torch.unique(one * self.units + two)
            one, two = pairs // self.units, pairs % self.units
        if len(one):
            self.edges.append((one, two))

    def grid(self, layer: Tensor) -> None:
        """Remember a layer whose units vary along two dimensions: the model's code sees them as rows × columns."""
        if len(varying(layer)) == 2 and layer.numel() <= self.units:
            rows = layer.squeeze()
            first = dict.fromkeys(map(tuple, rows.tolist()))
            kept = torch.tensor(list(first))
            self.grids.setdefault(kept.numpy().tobytes(), kept)

    def pieces(self, parts: Sequence[Tensor]) -> None:
        """Remember equal pieces that the model's code has cut units into, as a grid of pieces × places."""
        rows = [part.reshape(-1) for part in parts]
        if len(rows) > 1 and len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            self.grids.setdefault(torch.stack(rows).numpy().tobytes(), torch.stack(rows))

    def row_units(self, layer: Tensor, dims: set[int]) -> Tensor:
        """A stand-in for what is left of a grid of units once an op has summed over some of its dimensions.

        A norm over every head leaves one number a head, which need not tie the head's units to each other: they do so
        only where something else turns out to be tied to that number (`components` finds out).
        """
        shape = [1 if dim in dims else size for dim, size in enumerate(layer.shape)]
        stand_in = torch.arange(self.units, self.units + math.prod(shape)).view(shape)
        self.units += stand_in.numel()
        self.row_ids.update(stand_in.reshape(-1).tolist())
        self.follow_rows(layer, stand_in)
        return stand_in

    def follow_rows(self, layer: Tensor, stand_in: Tensor) -> None:
        """The rows of a grid go together if their stand-in turns out to be tied to something."""
        one, two = torch.broadcast_tensors(layer, stand_in)
        self.rows.append((one.reshape(-1), two.reshape(-1)))

    def stands_in(self, layer: Tensor) -> bool:
        """Whether a layer holds stand-ins for rows alone."""
        return bool(self.row_ids) and int(layer.reshape(-1)[0]) in self.row_ids

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These units keep their number; the first reason given is the one reported."""
        self._note(self.frozen, labels, reason)

    def treat(self, labels: Tensor, reason: str) -> None:
        """These units are changed by an op: if others of their width are not, they differ and must stay."""
        found = torch.unique(labels)
        self.treated.setdefault(found[found >= 0].numpy().tobytes(), reason)

    def mix(self, labels: Tensor, reason: str) -> None:
        """These units influence each other there: growing cannot keep the function exactly."""
        self._note(self.mixed, labels, reason)

    @staticmethod
    def _note(book: list[tuple[Tensor, str]], labels: Tensor, reason: str) -> None:
        found = torch.unique(labels)
        found = found[found >= 0]
        if len(found):
            book.append((found, reason))

    def role(self, origin: str | None, layer: Tensor, consumed: bool) -> None:
        """Remember whether an axis of a weight makes units or reads them; a consumer stays one."""
        axis = None if origin is None or layer.numel() == 0 else self._axis(int(layer.reshape(-1)[0]))
        if axis is not None and (consumed or axis not in self.roles):
            self.roles[axis] = CONSUMES if consumed else PRODUCES

    def alike(self, layers: Sequence[Tensor]) -> None:
        """Axes of weights that are added to each other make units or read them alike."""
        axes = dict.fromkeys(self._axis(int(layer.reshape(-1)[0])) for layer in layers)
        self.equals += permutations([axis for axis in axes if axis is not None], 2)

    def spread_roles(self) -> None:
        """Give the axes that are alike the role of the one that a use has shown."""
        for _ in self.equals:
            found = {two: self.roles[one] for one, two in self.equals if one in self.roles and two not in self.roles}
            if not found:
                break
            self.roles.update(found)
            self.lent.update(found)

    def _axis(self, label: int) -> tuple[str, int] | None:
        """(tensor, axis) of a unit's id; None for a stand-in, which has none."""
        found = bisect_right(self.axes, label, key=lambda axis: axis.start) - 1
        if found < 0 or label >= self.axes[found].start + self.axes[found].size:
            return None
        return self.axes[found].tensor, self.axes[found].dim

    def components(self) -> np.ndarray:
        """Component of every id, int array `[units]`.

        A row of a grid becomes one unit as soon as its stand-in is tied to a place of a tensor, or must not change.
        """
        component = _connected(self.units, self.edges)
        held = np.concatenate([np.arange(axis.start, axis.start + axis.size) for axis in self.axes] or [[]]).astype(int)
        held = np.concatenate([held, *(labels.numpy() for labels, _ in (*self.frozen, *self.mixed))])
        whole = [pair for pair in self.rows if bool((pair[0] >= 0).all())]
        joined: list[tuple[Tensor, Tensor]] = []
        # Each pass joins one pair or more that the passes before it made due, or is the last.
        for _ in whole:
            real = set(component[held].tolist())
            due = [pair for pair in whole if not real.isdisjoint(component[pair[1].numpy()].tolist())]
            if len(due) == len(joined):
                break
            joined = due
            component = _connected(self.units, [*self.edges, *joined])
        return component


def _connected(units: int, edges: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
    # Imported here because it is most of what importing this package would cost.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not edges:
        return np.arange(units)
    rows = torch.cat([first for first, _ in edges]).numpy()
    columns = torch.cat([second for _, second in edges]).numpy()
    matrix = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(units, units))
    return connected_components(matrix, directed=False)[1]


def varying(layer: Tensor) -> tuple[int, ...]:
    """Dimensions along which a layer's unit changes."""
    return tuple(dim for dim, size in enumerate(layer.shape) if size > 1)


def compress(labels: Tensor) -> Tensor:
    """Store a layer at size 1 along every dimension in which it is constant."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            # Two corners tell most layers that vary without looking at all of them.
            if labels.stride(dim) == 0 or (
                _corner(first) == _corner(labels.narrow(dim, size - 1, 1)) and bool((labels == first).all())
            ):
                labels = first
    return labels.contiguous()


def _corner(labels: Tensor) -> int:
    return int(labels[(0,) * labels.dim()])


def reshaped(layer: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The layer of a tensor of shape `old` after a view as `new`, without spreading it over where it is constant.

    Old and new dimensions fall into runs of equal products; where a layer is constant over a run, it stays so.
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


def useful(layers: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Layers that still tell units apart; one without any variation or any unit is dropped."""
    return tuple(layer for layer in layers if layer.numel() > 1 and bool((layer >= 0).any()))


def align(layer: Tensor, dims: int) -> Tensor:
    """Prepend axes of size 1, as broadcasting does."""
    return layer.view((1,) * (dims - layer.dim()) + tuple(layer.shape))


def merge(ledger: Ledger, groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Join the layers of several aligned tensors that are combined element by element.

    Layers that vary along a common dimension describe the same units and are united; the smaller one stays.
    """
    merged: list[Tensor] = []
    # Stand-ins come last: they follow the finer layers that they stand in for.
    for layer in sorted((layer for layers in groups for layer in layers), key=ledger.stands_in):
        axes = set(varying(layer))
        finer = [other for other in merged if axes < set(varying(other))] if ledger.stands_in(layer) else []
        if finer:
            for other in finer:
                ledger.follow_rows(other, layer)
            continue
        shared = [k for k, other in enumerate(merged) if set(varying(other)) & axes]
        for k in shared:
            ledger.union(merged[k], layer)
        smallest = min([layer, *(merged[k] for k in shared)], key=lambda each: each.numel())
        merged = [other for k, other in enumerate(merged) if k not in shared] + [smallest]
    return tuple(merged)


def place(layer: Tensor, names: Sequence[str], target: Mapping[str, int]) -> Tensor:
    """Rearrange a layer whose dimensions are `names` onto a grid in which name `n` is dimension `target[n]`."""
    grid = [1] * len(target)
    order = sorted(range(len(names)), key=lambda dim: target[names[dim]])
    for dim in order:
        grid[target[names[dim]]] = layer.shape[dim]
    return layer.permute(order).reshape(grid)
