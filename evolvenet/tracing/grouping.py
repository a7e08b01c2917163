"""From a ledger of ties to a `WidthGraph`: connected components are units, units that show alike form a width."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import CONSUMES, FOLLOWS, PRODUCES, Segment, Width, WidthGraph, assemble
from evolvenet.tracing.labels import KERNEL, AxisIds, Ledger

Parts = tuple[tuple[int | None, int, int], ...]
"""An axis as runs of (group or None, length, repeat)."""


@dataclass(frozen=True)
class Group:
    """Units with one and the same structure, before they have a name.

    Args:
        members: their component numbers, in order.
        anchor: the first id of the first member; it stays the same when units are joined further.
        frozen: why they must stay, or None.
        mixed: which op mixes them, or None.
        smallest: the fewest that may remain.
    """

    members: tuple[int, ...]
    anchor: int
    frozen: str | None
    mixed: str | None
    smallest: int


@dataclass(frozen=True)
class Built:
    """A graph with what later steps need to find its widths in the ledger again.

    Args:
        graph: the graph.
        component: component of every id, `[units]`.
        anchors: name of every width → its anchor.
        members: name of every width → its components, in order.
        joined: names of the widths whose units were joined beyond what the ledger says.
    """

    graph: WidthGraph
    component: np.ndarray
    anchors: Mapping[str, int]
    members: Mapping[str, tuple[int, ...]]
    joined: frozenset[str] = frozenset()


def build_graph(model: nn.Module, ledger: Ledger) -> Built:
    """Group units into widths and lay every axis out as segments of them."""
    component = ledger.components()
    ledger.spread_roles()
    groups = _groups(ledger, component)
    where = {member: (g, u) for g, group in enumerate(groups) for u, member in enumerate(group.members)}
    layouts: dict[str, dict[int, Parts]] = defaultdict(dict)
    disordered = _partly_treated(ledger, component, groups, where)
    for axis in ledger.axes:
        places = [where[int(c)] for c in component[axis.start : axis.start + axis.size]]
        layouts[axis.tensor][axis.dim] = _segments(places, groups, axis, disordered)
    tensors, aliases, trainable = named_tensors(model)
    names = _names(groups, layouts, ledger, trainable)
    widths = {name: _width(name, groups[g], disordered.get(g)) for g, name in names.items()}
    named = {
        tensor: {
            dim: tuple(Segment(None if g is None else names.get(g), length, repeat) for g, length, repeat in parts)
            for dim, parts in layouts.get(tensor, {}).items()
        }
        for tensor in tensors
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    graph = assemble(widths, named, shapes, trainable, aliases, ledger.roles)
    anchors = {name: groups[g].anchor for g, name in names.items()}
    return Built(graph, component, anchors, {name: groups[g].members for g, name in names.items()})


def _partly_treated(
    ledger: Ledger, component: np.ndarray, groups: Sequence[Group], where: Mapping[int, tuple[int, int]]
) -> dict[int, str]:
    """Groups of which an op has changed some units and not the others, `h[:, :4] *= 2`: they differ by their place."""
    found: dict[int, str] = {}
    for ids, reason in ledger.treated.items():
        members = np.unique(component[np.frombuffer(ids, np.int64)])
        inside = Counter(where[member][0] for member in members.tolist() if member in where)
        for group, count in inside.items():
            if count < len(groups[group].members):
                found.setdefault(group, reason)
    return found


def _width(name: str, group: Group, disorder: str | None) -> Width:
    frozen = group.frozen or disorder
    return Width(name, len(group.members), frozen=frozen, mixed=group.mixed, smallest=group.smallest)


def _groups(ledger: Ledger, component: np.ndarray) -> list[Group]:
    """Components with equal counts on equal axes and equal notes, in order of their first id."""
    frozen, mixed = (_notes(book, component) for book in (ledger.frozen, ledger.mixed))
    whole = {int(c) for labels in ledger.whole_groups for c in component[labels.reshape(-1).numpy()]}
    shows = _shows(ledger, component, frozen)
    _, first = np.unique(component, return_index=True)
    together: dict[tuple[bytes, str | None, str | None, bool], list[int]] = defaultdict(list)
    for member in sorted(shows, key=lambda m: first[m]):
        together[shows[member], frozen.get(member), mixed.get(member), member in whole].append(member)
    return [
        Group(tuple(members), int(first[members[0]]), frozen=key[1], mixed=key[2], smallest=2 if key[3] else 1)
        for key, members in together.items()
    ]


def _shows(ledger: Ledger, component: np.ndarray, frozen: dict[int, str]) -> dict[int, bytes]:
    """For every component that a tensor holds, on which axes it shows how often, in a form that compares."""
    rows = []
    for number, axis in enumerate(ledger.axes):
        members, counts = np.unique(component[axis.start : axis.start + axis.size], return_counts=True)
        rows.append(np.stack([members, np.full_like(members, number), counts], axis=1))
        if axis.tensor not in ledger.order:
            for member in members.tolist():
                frozen.setdefault(member, "never ran on the example inputs")
    table = np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    members, starts = np.unique(table[:, 0], return_index=True)
    entries = np.ascontiguousarray(table[:, 1:])
    stops = [*starts[1:].tolist(), len(table)]
    return {
        member: entries[start:stop].tobytes()
        for member, start, stop in zip(members.tolist(), starts.tolist(), stops, strict=True)
    }


def _notes(book: Sequence[tuple[Tensor, str]], component: np.ndarray) -> dict[int, str]:
    found: dict[int, str] = {}
    for labels, reason in book:
        for member in np.unique(component[labels.numpy()]).tolist():
            found.setdefault(member, reason)
    return found


def _segments(places: list[tuple[int, int]], groups: list[Group], axis: AxisIds, disordered: dict[int, str]) -> Parts:
    """Cut an axis into (group, length, repeat) runs that hold all units of a group in order.

    A group whose units stand in another order anywhere is noted in `disordered`: how its new units would have to be
    laid out there is not known.
    """
    parts: list[tuple[int | None, int, int]] = []
    start = 0
    while start < len(places):
        group = places[start][0]
        size = len(groups[group].members)
        repeat = 1
        while start + repeat < len(places) and places[start + repeat] == places[start]:
            repeat += 1
        stop = start + size * repeat
        if places[start:stop] == [(group, unit) for unit in range(size) for _ in range(repeat)]:
            parts.append((group, size * repeat, repeat))
        else:
            stop = start + 1
            disordered.setdefault(group, f"its units stand in another order on axis {axis.dim} of {axis.tensor}")
            parts.append((None, 1, 1))
        start = stop
    return tuple(parts)


def _names(
    groups: list[Group], layouts: Mapping[str, Mapping[int, Parts]], ledger: Ledger, trainable: frozenset[str]
) -> dict[int, str]:
    """Name every group that holds parameters after its first producer, in execution order."""
    late = len(ledger.order)
    shows: dict[int, list[tuple[bool, int, str, int]]] = defaultdict(list)
    for tensor, axes in layouts.items():
        for dim, parts in axes.items():
            # A weight's own use names its units, before what is added to it.
            role = ledger.roles.get((tensor, dim), FOLLOWS) if (tensor, dim) not in ledger.lent else FOLLOWS
            for group in {part[0] for part in parts if part[0] is not None}:
                shows[group].append((role != PRODUCES, ledger.order.get(tensor, late), tensor, dim))
    names: dict[int, str] = {}
    taken: set[str] = set()
    for group in sorted(shows, key=lambda g: min((show[1], show[0]) for show in shows[g])):
        if groups[group].frozen == KERNEL or not any(show[2] in trainable for show in shows[group]):
            continue
        not_produced, _, tensor, dim = min(shows[group])
        module = tensor.rpartition(".")[0] or tensor
        reads = ledger.roles.get((tensor, dim)) == CONSUMES
        base = module if not not_produced else f"{module}:in" if reads else f"{tensor}[{dim}]"
        name, count = base, 2
        while name in taken:
            name, count = f"{base}#{count}", count + 1
        taken.add(name)
        names[group] = name
    return names
