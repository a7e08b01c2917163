"""Label layers, which say to which unit each element of a tensor belongs, and the graph of units that are tied together.

A *unit* is one index of one axis of one parameter or buffer; it has an integer id. A *label layer* of a tensor is an
int64 tensor that holds the id of the unit of each element; it is stored at size 1 along dimensions in which it is
constant. A weight `[out, in]` has two label layers, its activations usually one. Id −1 means "no unit" (padding, data).
Ids below −1 are places of a constant that the model's code made, such as the zeros that a hidden state begins with: they
are no units either, but their number may change with a width's, so they tie nothing and freeze nothing.

The rules of `rules` pass label layers through the ops of a model and add an edge to the `LabelGraph` for every two units
that an op ties together. Connected components of that graph are units that can only be resized together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from evolvenet.graph.width_graph import CONSUMES, MASKS, PRODUCES
from evolvenet.tracing.connected import connected
from evolvenet.tracing.rearranged import rows_along
from evolvenet.tracing.reasons import running_line

DATA = "data"
CONSTANT = "constant"
LABELLED = "labelled"
KERNEL = "counts positions of a kernel, not units"
"""Why the spatial axes of a convolution's weight are frozen."""
MET_DATA = "combines it with data that has a fixed size"
"""Why units are frozen that an op combines with data along their axis, after the op and its module."""


@dataclass(frozen=True)
class Label:
    """The label layers of one tensor and where it comes from.

    Args:
        layers: label layers, each with the tensor's number of dimensions.
        kind: "labelled"; "data" (an input, or computed without labels: its size does not change with a width's);
            "constant" (made during the run from the shapes of other tensors: its size may change with a width's).
        origin: name of the parameter or buffer that the tensor is a rearrangement of, or that it was computed from
            together with other parameters only; None for what depends on data.
        value: the number that fills a constant from end to end; None where it is not known.
        single: the id of the only unit of a width that the tensor holds, `h[:, :1]`; None for any other tensor.
        places: ids `[n]` of the units of which the tensor's numbers are places, 0 … n − 1; see `routing_rules`.
    """

    layers: tuple[Tensor, ...] = ()
    kind: str = DATA
    origin: str | None = None
    value: float | None = None
    single: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class AxisIds:
    """The units of axis `dim` of a tensor: the ids `start … start + size − 1`."""

    tensor: str
    dim: int
    start: int
    size: int


@dataclass
class LabelGraph:
    """Units as nodes, ties between them as edges, from one or several runs of the model.

    Args:
        axes: the axes of parameters and buffers in the order of their ids.
        units: number of ids given so far.
        edges: pairs of equally long id tensors that are tied element by element.
        frozen: ids that must keep their number, with the reason.
        lines: reason that names an op → the line of the model's code that ran it first.
        op: the op whose rule is applied, with its module.
        mixed: ids that influence each other in an op as the rows of a matrix, with the op; see `mark_mixed`.
        normalised: ids over which an op computes a statistic, with the path of its module; see `exact_growth`.
        multiples: layers with the number of which an op needs a multiple of places along them, and the op.
        fewest: ids of an axis with the number of its units that an op needs at least.
        competing: ids that compete in an op, with the reason why they are frozen unless they are `routed`.
        routed: ids of units by whose places something is picked or counted.
        whole_groups: ids of the channels of grouped ops, of which at least two groups must remain.
        roles: (tensor, axis) → whether the weight produces or consumes the axis's units.
        trainable: names of the parameters.
        same_roles: pairs of axes of weights that are added to each other.
        inherited_roles: the axes whose role is that of another axis in `same_roles`.
        masks: names of buffers that weights are multiplied with, see `masks`.
        gates: names of tensors that scale, gate or bound the units of what depends on data, see `addends`.
        lengths: (weight, axis, op) of weights of which the op scales each slice along the axis to a length, see `mark_lengths`.
        first_use: tensor → rank of its first use in the run.
        only_added: tensor → whether all ops that combine it with data add it, see `addends`.
        output_shapes: of the model's outputs.
        grids: id grids `[rows, columns]` that the model's code has laid units out as, by their bytes.
        blocks: the same for `[groups, rows · columns]` of what it has laid out as groups × rows × columns.
        sized_pieces: the same for equal pieces of a split to which the code gives a size for every piece.
        placeholder_ties: (layer, placeholders) as flat, equally long id tensors; see `add_placeholders`.
        placeholder_ids: the ids of all placeholders.
        changed: sets of ids (their bytes) that an op changes, with the op; see `mark_changed`.
        modes_with_new_tensors: for each run, whether it used a tensor that no earlier run had used.
        kinds: ids that are those of a residual stream, of attention, of a table or of experts, see `block_kinds`.
        equal_sizes: axes of which all have as many units as the others, by their ids, see `recurrent_layers`.
        recurrent: paths of the modules of these axes.
        differentiates: whether the runs had autograd on, for gradients that the model's own code computes.
        keeps_heads: whether a product that sums over the places of each head results in a placeholder for the head.
        one_key: ids `[heads, places]` of queries that have met the keys of a single head, see `shared_heads`.
    """

    axes: list[AxisIds] = field(default_factory=list)
    units: int = 0
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)
    op: str = ""
    mixed: list[tuple[Tensor, str]] = field(default_factory=list)
    normalised: list[tuple[Tensor, str]] = field(default_factory=list)
    multiples: list[tuple[Tensor, int, str]] = field(default_factory=list)
    fewest: list[tuple[Tensor, int]] = field(default_factory=list)
    competing: list[tuple[Tensor, str]] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)
    whole_groups: list[Tensor] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    same_roles: list[tuple[tuple[str, int], tuple[str, int]]] = field(default_factory=list)
    inherited_roles: set[tuple[str, int]] = field(default_factory=set)
    masks: set[str] = field(default_factory=set)
    gates: set[str] = field(default_factory=set)
    lengths: list[tuple[str, int, str]] = field(default_factory=list)
    first_use: dict[str, int] = field(default_factory=dict)
    only_added: dict[str, bool] = field(default_factory=dict)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)
    grids: dict[bytes, Tensor] = field(default_factory=dict)
    blocks: dict[bytes, Tensor] = field(default_factory=dict)
    sized_pieces: dict[bytes, Tensor] = field(default_factory=dict)
    placeholder_ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    placeholder_ids: set[int] = field(default_factory=set)
    changed: dict[bytes, str] = field(default_factory=dict)
    modes_with_new_tensors: list[bool] = field(default_factory=list)
    differentiates: bool = False
    keeps_heads: bool = False
    one_key: list[Tensor] = field(default_factory=list)
    kinds: list[tuple[Tensor, str]] = field(default_factory=list)
    equal_sizes: list[tuple[Tensor, ...]] = field(default_factory=list)
    recurrent: set[str] = field(default_factory=set)
    _marked: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """The layers given to `mark_changed`, by their `id`, which is theirs as long as they are kept here."""

    def add_tensor(self, name: str, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Give ids to each axis longer than 1 of a parameter or buffer (one of size 1 broadcasts); its label layers."""
        layers = []
        for dim, size in enumerate(shape):
            if size > 1:
                ids = torch.arange(self.units, self.units + size)
                layers.append(ids.view([size if d == dim else 1 for d in range(len(shape))]))
                self.axes.append(AxisIds(name, dim, self.units, size))
                self.units += size
        return tuple(layers)

    def union(self, first: Tensor, second: Tensor) -> None:
        """Tie corresponding elements (after broadcasting); one whose partner is padding or data is frozen."""
        if first.shape == second.shape and torch.equal(first, second):
            return
        one, two = (part.reshape(-1) for part in torch.broadcast_tensors(first, second))
        real = (one >= 0) & (two >= 0)
        if not bool(real.all()):
            unpaired = torch.cat([one[(two == -1) & (one >= 0)], two[(one == -1) & (two >= 0)]])
            self.freeze(unpaired, f"{self.op} ties them to places that belong to no unit (padding or data)".strip())
            one, two = one[real], two[real]
        if len(one) > 4096:
            pairs = torch.unique(one * self.units + two)
            one, two = pairs // self.units, pairs % self.units
        if len(one):
            self.edges.append((one, two))

    def add_grid(self, layer: Tensor) -> None:
        """Keep a layer whose units vary along two or three dimensions: the model's code has laid them out as a grid."""
        dims = len(varying(layer))
        if dims in (2, 3) and layer.numel() <= self.units and bool((layer >= 0).all()):
            kept = torch.tensor(list(dict.fromkeys(map(tuple, layer.squeeze().flatten(1).tolist()))))
            (self.grids if dims == 2 else self.blocks).setdefault(kept.numpy().tobytes(), kept)

    def add_pieces(self, parts: Sequence[Tensor], sizes_given: bool) -> None:
        """Keep equal pieces that the model's code has split units into, as a grid of pieces × units of a piece.

        Args:
            parts: label layers of the pieces.
            sizes_given: whether the code gives a size for every piece, so that they could be of different sizes.
        """
        rows = [part.reshape(-1) for part in parts]
        whole = all(bool((row >= 0).all()) for row in rows)
        if whole and len(rows) > 1 and len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            kept = self.sized_pieces if sizes_given else self.grids
            kept.setdefault(torch.stack(rows).numpy().tobytes(), torch.stack(rows))

    def add_placeholders(self, layer: Tensor, dims: set[int]) -> Tensor:
        """New ids for the rows of a grid of units that an op has reduced over `dims`: the layer of its result.

        A norm over each head results in one number per head, which alone does not tie the units of a head to each other.
        `components` ties them if their placeholder is tied to a unit of a tensor, frozen or mixed.
        """
        shape = [1 if dim in dims else size for dim, size in enumerate(layer.shape)]
        _, numbers = torch.unique(rows_along(layer, dims), dim=0, return_inverse=True)
        placeholders = (self.units + numbers).view(shape)
        self.units += int(numbers.max()) + 1
        self.placeholder_ids.update(placeholders.reshape(-1).tolist())
        self.tie_to_placeholders(layer, placeholders)
        return placeholders

    def tie_to_placeholders(self, layer: Tensor, placeholders: Tensor) -> None:
        """Tie the units of each row of a grid to the row's placeholder, under the condition in `add_placeholders`."""
        one, two = torch.broadcast_tensors(layer, placeholders)
        self.placeholder_ties.append((one.reshape(-1), two.reshape(-1)))

    def tie_rows(self, layer: Tensor, dims: set[int]) -> None:
        """Tie the units of a grid that differ along `dims` alone."""
        first = layer
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.union(layer, first)

    def is_placeholder(self, layer: Tensor) -> bool:
        """Whether a layer holds placeholders."""
        return bool(self.placeholder_ids) and int(layer.reshape(-1)[0]) in self.placeholder_ids

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Freeze units; of several reasons for a unit the first one is reported, with the line of code if it names an op."""
        self._append(self.frozen, labels, reason)
        self._add_line(reason)

    def mark_changed(self, labels: Tensor, reason: str) -> None:
        """Keep which units an op changes: a width of which an op changes some units and not others is frozen."""
        if id(labels) in self._marked:
            return
        self._marked[id(labels)] = labels
        found = torch.unique(labels)
        found = found[found >= 0]
        if len(found) and self.changed.setdefault(found.numpy().tobytes(), reason) is reason:
            self._add_line(reason)

    def mark_competing(self, labels: Tensor, reason: str) -> None:
        """Keep that units compete in an op, see `routing_rules.settle_competition`."""
        self.competing.append((labels.reshape(-1), reason))
        self._add_line(reason)

    def _add_line(self, reason: str) -> None:
        if "::" in reason and reason not in self.lines:
            self.lines[reason] = running_line()

    def mark_mixed(self, labels: Tensor, reason: str, along: Iterable[int] | None = None) -> None:
        """Keep that units influence each other in an op, so that growth cannot preserve the function exactly.

        Args:
            labels: a layer.
            reason: the op.
            along: the dimensions along which the op mixes, all by default. Where each row of a grid of heads × places turns
                out to be one unit, the op mixes what is inside a unit alone.
        """
        rows = rows_along(labels, set(along if along is not None else range(labels.dim())) & set(varying(labels)))
        if bool((rows >= 0).any()):
            self.mixed.append((torch.unique(rows, dim=0) if len(rows) > 1 else rows, reason))
            self._add_line(reason)

    def mark_kind(self, labels: Tensor, kind: str) -> None:
        """Keep what kind of block units belong to."""
        self._append(self.kinds, labels, kind)

    def mark_lengths(self) -> None:
        """Mark the units that a weight consumes through slices of given lengths: columns of new units are not 0 there."""
        for tensor, dim, where in self.lengths:
            if self.roles.get((tensor, dim)) == CONSUMES:
                ids = next(
                    torch.arange(a.start, a.start + a.size) for a in self.axes if (a.tensor, a.dim) == (tensor, dim)
                )
                self.mark_mixed(ids, f"{where} scales the column of each unit to a length")

    @staticmethod
    def _append(entries: list[tuple[Tensor, str]], labels: Tensor, reason: str) -> None:
        found = torch.unique(labels[labels >= 0])
        if len(found):
            entries.append((found, reason))

    def set_role(self, origin: str | None, layer: Tensor, consumed: bool) -> None:
        """Keep whether an axis of a weight produces or consumes its units; one that consumes them once is a consumer."""
        axis = None if origin is None or layer.numel() == 0 else self._axis(int(layer.reshape(-1)[0]))
        if axis is not None and (consumed or axis not in self.roles):
            self.roles[axis] = CONSUMES if consumed else PRODUCES

    def share_role(self, layers: Sequence[Tensor]) -> None:
        """Axes of weights that are added to each other have the same role."""
        axes = dict.fromkeys(self._axis(int(layer.reshape(-1)[0])) for layer in layers)
        self.same_roles += permutations([axis for axis in axes if axis is not None], 2)

    def propagate_roles(self) -> None:
        """Give axes without a role the role of an axis that they are paired with in `same_roles`, and masks theirs."""
        for _ in self.same_roles:
            found = {
                two: self.roles[one] for one, two in self.same_roles if one in self.roles and two not in self.roles
            }
            if not found:
                break
            self.roles.update(found)
            self.inherited_roles.update(found)
        self.roles.update({(axis.tensor, axis.dim): MASKS for axis in self.axes if axis.tensor in self.masks})

    def tensor_of(self, layer: Tensor) -> str | None:
        """Name of the parameter or buffer that a layer's first unit is of; None for a placeholder."""
        axis = self._axis(int(layer.reshape(-1)[0]))
        return None if axis is None else axis[0]

    def _axis(self, label: int) -> tuple[str, int] | None:
        """(tensor, axis) of a unit's id; None for a placeholder."""
        found = bisect_right(self.axes, label, key=lambda axis: axis.start) - 1
        if found < 0 or label >= self.axes[found].start + self.axes[found].size:
            return None
        return self.axes[found].tensor, self.axes[found].dim

    def components(self) -> np.ndarray:
        """Number of the connected component of every id, int array `[units]`.

        The units of a grid's row are tied if the row's placeholder is connected to a unit of a tensor, frozen or mixed.
        """
        component = connected(self.units, self.edges)
        fixed = np.concatenate([np.arange(axis.start, axis.start + axis.size) for axis in self.axes] or [[]]).astype(
            int
        )
        fixed = np.concatenate([fixed, *(labels.reshape(-1).numpy() for labels, _ in (*self.frozen, *self.mixed))])
        fixed = fixed[fixed >= 0]
        whole = [pair for pair in self.placeholder_ties if bool((pair[0] >= 0).all())]
        joined: list[tuple[Tensor, Tensor]] = []
        # Each pass joins at least one more pair, or is the last.
        for _ in whole:
            real = set(component[fixed].tolist())
            due = [pair for pair in whole if not real.isdisjoint(component[pair[1].numpy()].tolist())]
            if len(due) == len(joined):
                break
            joined = due
            component = connected(self.units, [*self.edges, *joined])
        return component


def varying(layer: Tensor) -> tuple[int, ...]:
    """Dimensions along which a layer varies."""
    return tuple(dim for dim, size in enumerate(layer.shape) if size > 1)


def compress(labels: Tensor) -> Tensor:
    """Store a layer at size 1 along every dimension in which it is constant."""
    if not labels.numel():
        return labels.new_full((1,) * labels.dim(), -1)
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            # Comparing two corners first finds most layers that vary without comparing all elements.
            if labels.stride(dim) == 0 or (
                _corner(first) == _corner(labels.narrow(dim, size - 1, 1)) and bool((labels == first).all())
            ):
                labels = first
    return labels.contiguous()


def _corner(labels: Tensor) -> int:
    return int(labels[(0,) * labels.dim()])


def useful(layers: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The layers that distinguish places: those of one place, and those of padding and data alone, are dropped."""
    return tuple(layer for layer in layers if layer.numel() > 1 and bool((layer != -1).any()))


def places_of_constant(size: int, dim: int, dims: int) -> Tensor:
    """The layer of an axis along which a tensor is constant: as many places as it has, which belong to no unit.

    >>> places_of_constant(3, 1, 2)
    tensor([[-2, -3, -4]])
    """
    return torch.arange(-2, -2 - size, -1).view([size if d == dim else 1 for d in range(dims)])


def is_constant(layer: Tensor) -> bool:
    """Whether a layer holds places of a constant only."""
    return int(layer.reshape(-1)[0]) < -1 and bool((layer < -1).all())


def align(layer: Tensor, dims: int) -> Tensor:
    """Prepend axes of size 1, as broadcasting does."""
    return layer.view((1,) * (dims - layer.dim()) + tuple(layer.shape))


def arrange(layer: Tensor, names: Sequence[str], target: Mapping[str, int]) -> Tensor:
    """A layer with dimensions `names`, rearranged so that name `n` is dimension `target[n]`."""
    grid = [1] * len(target)
    order = sorted(range(len(names)), key=lambda dim: target[names[dim]])
    for dim in order:
        grid[target[names[dim]]] = layer.shape[dim]
    return layer.permute(order).reshape(grid)
