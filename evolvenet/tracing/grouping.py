"""From a `LabelGraph` to a `WidthGraph`.

The connected components of the label graph are the model's units. Units that occur on the same axes equally often, with the
same reasons to be frozen, are grouped into one width, and every axis of a tensor is divided into segments of widths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from evolvenet.graph.block_kinds import ATTENTION, EMBEDDINGS, EXPERTS, OTHER, STREAM
from evolvenet.graph.coverage import other_order
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import CONSUMES, FOLLOWS, PRODUCES, Segment, Width, WidthGraph, assemble
from evolvenet.tracing.labels import KERNEL, AxisIds, LabelGraph
from evolvenet.tracing.needed_sizes import common_multiple, needed_multiples, needed_units
from evolvenet.tracing.normalised import norms_over, possible_growth
from evolvenet.tracing.recurrent_layers import parts_of, with_tied_layers

NEVER_RAN = "never ran on the example inputs"
"""The reason of a width of which no op of the run has used a tensor."""

AxisRuns = tuple[tuple[int | None, int, int], ...]
"""An axis as runs of (group or None, length, repeat)."""


@dataclass(frozen=True)
class Group:
    """Units of the same structure: a width before it has a name.

    Args:
        members: their component numbers, in order.
        anchor: first id of the first member; it does not change when more units are tied.
        frozen: why the width is frozen, or None.
        mixed: the op in which they influence each other, or None.
        smallest: smallest number of units that may remain.
        multiple: number of which the size stays a multiple.
    """

    members: tuple[int, ...]
    anchor: int
    frozen: str | None
    mixed: str | None
    smallest: int
    multiple: int = 1


@dataclass(frozen=True)
class GroupedWidths:
    """A width graph with the place of its widths in the label graph.

    Args:
        graph: the graph.
        component: component of every id, `[units]`.
        anchors: name of every width → its anchor.
        members: name of every width → its components, in order; of one with parts, those of the first part.
        joined: names of the widths whose units are tied by a fix.
    """

    graph: WidthGraph
    component: np.ndarray
    anchors: Mapping[str, int]
    members: Mapping[str, tuple[int, ...]]
    joined: frozenset[str] = frozenset()

    def widths_of(self, layers: Sequence[Tensor]) -> frozenset[str]:
        """Names of the widths of which label layers have units."""
        units = {unit for layer in layers for unit in np.unique(self.component[layer.reshape(-1).numpy()]).tolist()}
        return frozenset(name for name, members in self.members.items() if units and not units.isdisjoint(members))


def build_graph(model: nn.Module, label_graph: LabelGraph) -> GroupedWidths:
    """Group units into widths and divide every axis into segments of them."""
    component = label_graph.components()
    label_graph.propagate_roles()
    groups = _groups(label_graph, component)
    where = {member: (g, u) for g, group in enumerate(groups) for u, member in enumerate(group.members)}
    places = np.full((component.max(initial=-1) + 1, 2), -1)
    places[list(where)] = list(where.values())
    kinds_of = [(len(group.members), group.multiple) for group in groups]
    parts = parts_of(label_graph, places[component], kinds_of)
    if parts.unfit:
        return build_graph(model, with_tied_layers(label_graph, parts.unfit))
    layouts: dict[str, dict[int, AxisRuns]] = defaultdict(dict)
    disordered = _partly_changed(label_graph, component, groups, places[:, 0])
    for axis in label_graph.axes:
        along = places[component[axis.start : axis.start + axis.size]]
        layouts[axis.tensor][axis.dim] = _segments(along, groups, axis, disordered)
    tensors, aliases, trainable = named_tensors(model)
    names = _names(groups, layouts, label_graph, trainable, parts.leaders)
    families = {g: [each for each, leader in parts.leaders.items() if leader == g] or [g] for g in names}
    bare = {name: _width(name, groups, families[g], disordered, label_graph.lines) for g, name in names.items()}
    of_groups = {name: (bare[name], families[g]) for g, name in names.items()}
    widths = _with_growth(model, label_graph, component, groups, of_groups)

    def segment(g: int | None, length: int, repeat: int) -> Segment:
        if g is None:
            return Segment(None, length, repeat)
        return Segment(names.get(parts.leaders.get(g, g)), length, repeat, parts.numbers.get(g, 0))

    named = {
        tensor: {dim: tuple(segment(*run) for run in runs) for dim, runs in layouts.get(tensor, {}).items()}
        for tensor in tensors
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    added = frozenset(name for name, only in label_graph.only_added.items() if only)
    graph = assemble(widths, named, shapes, trainable, aliases, label_graph.roles, label_graph.differentiates, added)
    graph = replace(graph, gates=frozenset(label_graph.gates - {tensor for tensor, _ in label_graph.roles}))
    anchors = {name: groups[g].anchor for g, name in names.items()}
    return GroupedWidths(graph, component, anchors, {name: groups[g].members for g, name in names.items()})


def _with_growth(
    model: nn.Module,
    label_graph: LabelGraph,
    component: np.ndarray,
    groups: Sequence[Group],
    widths: Mapping[str, tuple[Width, Sequence[int]]],
) -> dict[str, Width]:
    """The widths, given with their groups, with the kind of their block and the growth that may keep the function."""
    order = sorted(label_graph.kinds, key=lambda entry: (EXPERTS, STREAM, ATTENTION, EMBEDDINGS).index(entry[1]))
    kinds, norms = _reasons(order, component), norms_over(label_graph, component)
    found: dict[str, Width] = {}
    for name, (width, parts) in widths.items():
        members = (member for part in parts for member in groups[part].members)
        kind = next((kinds[member] for member in members if member in kinds), OTHER)
        growth = None
        if width.mixed is not None and width.frozen is None:
            paths = dict.fromkeys(path for part in parts for path in norms.get(groups[part].members[0], ()))
            growth = possible_growth(model, kind, tuple(paths))
        found[name] = replace(width, kind=kind, exact_growth=growth)
    return found


def _partly_changed(
    label_graph: LabelGraph, component: np.ndarray, groups: Sequence[Group], group_of: np.ndarray
) -> dict[int, str]:
    """{group: reason} for groups of which an op changes some units and not the others, such as `h[:, :4] *= 2`.

    Args:
        label_graph: the units, and which of them each op changes.
        component: of every unit.
        groups: all of them.
        group_of: the group of every component, -1 for none.
    """
    found: dict[int, str] = {}
    for ids, reason in label_graph.changed.items():
        members = np.unique(component[np.frombuffer(ids, np.int64)])
        inside = group_of[members]
        for group, count in zip(*(part.tolist() for part in np.unique(inside, return_counts=True)), strict=True):
            if group >= 0 and count < len(groups[group].members):
                found.setdefault(group, reason)
    return found


def _width(
    name: str, groups: Sequence[Group], parts: Sequence[int], disordered: Mapping[int, str], lines: Mapping[str, str]
) -> Width:
    """The width of a group, or of several that are its parts: frozen if one of them is, for the first one's reason."""
    each = [groups[part] for part in parts]
    reason = next((why for part in parts if (why := groups[part].frozen or disordered.get(part)) is not None), None)
    mixing = next((group.mixed for group in each if group.mixed is not None), None)
    frozen = None if reason is None else reason + lines.get(reason, "")
    mixed = None if mixing is None else mixing + lines.get(mixing, "")
    multiple, least = each[0].multiple, max(group.smallest for group in each)
    smallest = -(-least // multiple) * multiple
    size = len(each[0].members)
    return Width(name, size, frozen=frozen, mixed=mixed, smallest=smallest, step=multiple, multiple=multiple)


def _groups(label_graph: LabelGraph, component: np.ndarray) -> list[Group]:
    """Groups of components with equal signatures and equal reasons, in order of their first id."""
    frozen = _reasons(label_graph.frozen, component)
    mixed = _reasons([entry for entry in label_graph.mixed if _mixes_units(*entry, component)], component)
    channels = [labels.reshape(-1) for labels in label_graph.whole_groups]
    whole = [frozenset(component[labels[labels >= 0].numpy()].tolist()) for labels in channels]
    in_groups = frozenset[int]().union(*whole)
    signatures = _signatures(label_graph, component, frozen)
    _, first = np.unique(component, return_index=True)
    together: dict[tuple[bytes, str | None, str | None, bool], list[int]] = defaultdict(list)
    for member in sorted(signatures, key=lambda m: first[m]):
        together[signatures[member], frozen.get(member), mixed.get(member), member in in_groups].append(member)
    # Where several widths have groups of one axis, each with one is enough for the two that the axis needs.
    alone = {
        members for members in map(frozenset, together.values()) if any(axis and axis <= members for axis in whole)
    }
    multiples, fewest = needed_multiples(label_graph, component), needed_units(label_graph, component)
    found: list[Group] = []
    for key, members in together.items():
        multiple, why = common_multiple([multiples[member] for member in members if member in multiples])
        fits = len(members) % multiple == 0
        least = max([2 if frozenset(members) in alone else 1, *(fewest.get(member, 1) for member in members)])
        reason = key[1] if key[1] is not None or fits else f"{why} needs a multiple of {multiple} of its units"
        found.append(Group(tuple(members), int(first[members[0]]), reason, key[2], least, multiple if fits else 1))
    return found


def _signatures(label_graph: LabelGraph, component: np.ndarray, frozen: dict[int, str]) -> dict[int, bytes]:
    """{component: bytes} that are equal for components that occur on the same axes equally often.

    Components of tensors that never ran are added to `frozen`.
    """
    rows = []
    for number, axis in enumerate(label_graph.axes):
        members, counts = np.unique(component[axis.start : axis.start + axis.size], return_counts=True)
        rows.append(np.stack([members, np.full_like(members, number), counts], axis=1))
        if axis.tensor not in label_graph.first_use:
            for member in members.tolist():
                frozen.setdefault(member, NEVER_RAN)
    table = np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    members, starts = np.unique(table[:, 0], return_index=True)
    entries = np.ascontiguousarray(table[:, 1:])
    stops = [*starts[1:].tolist(), len(table)]
    return {
        member: entries[start:stop].tobytes()
        for member, start, stop in zip(members.tolist(), starts.tolist(), stops, strict=True)
    }


def _reasons(entries: Sequence[tuple[Tensor, str]], component: np.ndarray) -> dict[int, str]:
    found: dict[int, str] = {}
    for labels, reason in entries:
        for member in np.unique(component[labels[labels >= 0].numpy()]).tolist():
            found.setdefault(member, reason)
    return found


def _mixes_units(rows: Tensor, reason: str, component: np.ndarray) -> bool:
    """Whether an op that mixes what stands in each row mixes units, and not only the places inside each of several units.

    Places of data beside those of a unit, as all heads of multi-head latent attention share some of their keys, are no units.
    """
    known = rows.numpy() >= 0
    units = np.where(known, component[rows.numpy()], -1)
    own = units.max(1, keepdims=True)
    each_one = bool((rows >= -1).all()) and bool(((units == own) | ~known).all())
    return not each_one or len(np.unique(own[own >= 0])) < 2


def _segments(along: np.ndarray, groups: list[Group], axis: AxisIds, disordered: dict[int, str]) -> AxisRuns:
    """Divide an axis into (group, length, repeat) runs that hold all units of a group in order.

    A group whose units are in another order on the axis is added to `disordered`: where new units would have to be
    inserted is not known. Its places, next to each other, are one run without a group.

    Args:
        along: (group, unit) at each place of the axis, `[places, 2]`.
        groups: all of them.
        axis: the axis, for the reason.
        disordered: {group: reason}, extended here.
    """
    parts: list[tuple[int | None, int, int]] = []
    changes = np.flatnonzero((along[1:] != along[:-1]).any(axis=1)) + 1
    ends = np.append(changes, len(along))
    next_change = np.repeat(ends, np.diff(ends, prepend=0))
    start = 0
    while start < len(along):
        group, repeat = int(along[start, 0]), int(next_change[start]) - start
        length = len(groups[group].members) * repeat
        if _in_order(along[start : start + length], length, repeat):
            parts.append((group, length, repeat))
        else:
            length = repeat
            disordered.setdefault(group, other_order(axis.tensor, axis.dim))
            joined = parts.pop()[1] if parts and parts[-1][0] is None else 0
            parts.append((None, joined + length, 1))
        start += length
    return tuple(parts)


def _in_order(found: np.ndarray, length: int, repeat: int) -> bool:
    """Whether places hold all units of the first one's group, in order, `repeat` times each.

    The ends are compared first: a table of which the middle is used begins its width anew at every place.
    """
    last = length // repeat - 1
    if len(found) < length or found[0, 1] != 0 or tuple(found[-1]) != (found[0, 0], last):
        return False
    return bool((found[:, 0] == found[0, 0]).all() and (found[:, 1] == np.arange(length) // repeat).all())


def _names(
    groups: list[Group],
    layouts: Mapping[str, Mapping[int, AxisRuns]],
    label_graph: LabelGraph,
    trainable: frozenset[str],
    leaders: Mapping[int, int],
) -> dict[int, str]:
    """{group: name} of every group with parameters: the module of its first producer in execution order.

    Of the parts of one width the first one, their leader, has the name.
    """
    late = len(label_graph.first_use)
    occurrences: dict[int, list[tuple[bool, int, str, int]]] = defaultdict(list)
    for tensor, axes in layouts.items():
        for dim, parts in axes.items():
            # A role inherited from a weight that is added (LoRA) does not name a width.
            role = (
                label_graph.roles.get((tensor, dim), FOLLOWS)
                if (tensor, dim) not in label_graph.inherited_roles
                else FOLLOWS
            )
            for group in dict.fromkeys(part[0] for part in parts if part[0] is not None):
                occurrences[leaders.get(group, group)].append(
                    (role != PRODUCES, label_graph.first_use.get(tensor, late), tensor, dim)
                )
    names: dict[int, str] = {}
    taken: set[str] = set()
    for group in sorted(occurrences, key=lambda g: min((entry[1], entry[0]) for entry in occurrences[g])):
        if groups[group].frozen == KERNEL or not any(entry[2] in trainable for entry in occurrences[group]):
            continue
        not_produced, _, tensor, dim = min(occurrences[group])
        module = tensor.rpartition(".")[0] or tensor
        consumes = label_graph.roles.get((tensor, dim)) == CONSUMES
        base = module if not not_produced else f"{module}:in" if consumes else f"{tensor}[{dim}]"
        name, count = base, 2
        while name in taken:
            name, count = f"{base}#{count}", count + 1
        taken.add(name)
        names[group] = name
    return names
