"""From a ledger of ties to a `WidthGraph`: connected components are units, units that show alike form a width."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from evolvenet.graph import CONSUMES, FOLLOWS, PRODUCES, Segment, Width, WidthGraph, assemble
from evolvenet.labels import KERNEL, AxisIds, Ledger


@dataclass(frozen=True)
class Group:
    """Units with one and the same structure, before they have a name. `members` are component numbers, in order."""

    members: tuple[int, ...]
    frozen: str | None
    mixed: str | None
    smallest: int


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], frozenset[str]]:
    """Every parameter and floating-point buffer once by its first name, the other names, and which are parameters."""
    first: dict[int, str] = {}
    tensors, aliases, trainable = {}, {}, set()
    entries = [(n, t, True) for n, t in model.named_parameters(remove_duplicate=False)]
    entries += [(n, t, False) for n, t in model.named_buffers(remove_duplicate=False) if t.is_floating_point()]
    for name, tensor, is_parameter in entries:
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
            continue
        tensors[name] = tensor
        if is_parameter:
            trainable.add(name)
    return tensors, aliases, frozenset(trainable)


def build_graph(model: nn.Module, ledger: Ledger) -> WidthGraph:
    """Group units into widths and lay every axis out as segments of them."""
    component = ledger.components()
    groups = _groups(ledger, component)
    where = {member: (g, u) for g, group in enumerate(groups) for u, member in enumerate(group.members)}
    layouts: dict[str, dict[int, tuple[tuple[int | None, int, int], ...]]] = defaultdict(dict)
    disordered: dict[int, str] = {}
    for axis in ledger.axes:
        places = [where.get(int(c)) for c in component[axis.start : axis.start + axis.size]]
        layouts[axis.tensor][axis.dim] = _segments(places, groups, axis, disordered)
    tensors, aliases, trainable = named_tensors(model)
    names = _names(groups, layouts, ledger, trainable)
    widths = {
        name: Width(
            name,
            len(groups[g].members),
            frozen=groups[g].frozen or disordered.get(g),
            mixed=groups[g].mixed,
            smallest=groups[g].smallest,
        )
        for g, name in names.items()
    }
    named = {
        tensor: {
            dim: tuple(Segment(None if g is None else names.get(g), length, repeat) for g, length, repeat in parts)
            for dim, parts in layouts.get(tensor, {}).items()
        }
        for tensor in tensors
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return assemble(widths, named, shapes, trainable, aliases, ledger.roles)


def _groups(ledger: Ledger, component: np.ndarray) -> list[Group]:
    """Components with equal counts on equal axes and equal notes, in order of their first id."""
    frozen, mixed = (_notes(book, component) for book in (ledger.frozen, ledger.mixed))
    whole = {int(c) for labels in ledger.whole_groups for c in component[labels.reshape(-1).numpy()]}
    shows: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, axis in enumerate(ledger.axes):
        members, counts = np.unique(component[axis.start : axis.start + axis.size], return_counts=True)
        for member, count in zip(members.tolist(), counts.tolist(), strict=True):
            shows[member].append((number, count))
        if axis.tensor not in ledger.order:
            for member in members.tolist():
                frozen.setdefault(member, "never ran on the example inputs")
    _, first = np.unique(component, return_index=True)
    together: dict[object, list[int]] = defaultdict(list)
    for member in sorted(shows, key=lambda m: first[m]):
        together[tuple(shows[member]), frozen.get(member), mixed.get(member), member in whole].append(member)
    return [
        Group(tuple(members), frozen=key[1], mixed=key[2], smallest=2 if key[3] else 1)  # type: ignore[index]
        for key, members in together.items()
    ]


def _notes(book: list, component: np.ndarray) -> dict[int, str]:
    found: dict[int, str] = {}
    for labels, reason in book:
        for member in np.unique(component[labels.numpy()]).tolist():
            found.setdefault(member, reason)
    return found


def _segments(
    places: list[tuple[int, int] | None], groups: list[Group], axis: AxisIds, disordered: dict[int, str]
) -> tuple[tuple[int | None, int, int], ...]:
    """Cut an axis into (group, length, repeat) runs that hold all units of a group in order.

    A group whose units stand in another order anywhere is noted in `disordered`: how its newborns would have to be
    laid out there is not known.
    """
    parts: list[tuple[int | None, int, int]] = []
    start = 0
    while start < len(places):
        at = places[start]
        stop = start + 1
        if at is None:
            while stop < len(places) and places[stop] is None:
                stop += 1
            parts.append((None, stop - start, 1))
            start = stop
            continue
        group, size = at[0], len(groups[at[0]].members)
        repeat = 1
        while start + repeat < len(places) and places[start + repeat] == at:
            repeat += 1
        stop = start + size * repeat
        expected = [(group, unit) for unit in range(size) for _ in range(repeat)]
        if places[start:stop] == expected:
            parts.append((group, size * repeat, repeat))
        else:
            stop = start + 1
            disordered.setdefault(group, f"its units stand in another order on axis {axis.dim} of {axis.tensor}")
            parts.append((None, 1, 1))
        start = stop
    return tuple(parts)


def _names(
    groups: list[Group],
    layouts: Mapping[str, Mapping[int, tuple[tuple[int | None, int, int], ...]]],
    ledger: Ledger,
    trainable: frozenset[str],
) -> dict[int, str]:
    """Name every group that holds parameters after its first producer, in execution order."""
    late = len(ledger.order)
    shows: dict[int, list[tuple[bool, int, str, int]]] = defaultdict(list)
    for tensor, axes in layouts.items():
        for dim, parts in axes.items():
            role = ledger.roles.get((tensor, dim), FOLLOWS)
            for group in {part[0] for part in parts if part[0] is not None}:
                shows[group].append((role != PRODUCES, ledger.order.get(tensor, late), tensor, dim))
    names: dict[int, str] = {}
    for group in sorted(shows, key=lambda g: min((show[1], show[0]) for show in shows[g])):
        if groups[group].frozen == KERNEL or not any(show[2] in trainable for show in shows[group]):
            continue
        not_produced, _, tensor, dim = min(shows[group])
        module = tensor.rpartition(".")[0] or tensor
        reads = ledger.roles.get((tensor, dim)) == CONSUMES
        base = module if not not_produced else f"{module}:in" if reads else f"{tensor}[{dim}]"
        name, count = base, 2
        while name in names.values():
            name, count = f"{base}#{count}", count + 1
        names[group] = name
    return names
