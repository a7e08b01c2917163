"""Replicas that run beside their source in a traced step: a momentum teacher, the target of a critic.

The trace finds widths of their own for them. Since a replica takes over its source's weights, each such width is united with
the one that the source has at the same place: both are resized by the same index map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from evolvenet.graph.exact_growth import united_growth
from evolvenet.graph.width_graph import Segment, Width, WidthGraph, Widths, assemble
from evolvenet.tracing.grouping import NEVER_RAN

Layout = Mapping[int, tuple[Segment, ...]]
Part = tuple[str, int]
"""A width and the number of one of its parts."""
Name = TypeVar("Name", str, Part)


def united(graph: WidthGraph, copy: str, source: str) -> WidthGraph:
    """The graph in which every width of a replica is the one that its source has at the same place.

    A width is frozen if one of those that it unites is. If the two cannot be united, since a unit is another number of
    places in them, all their widths are frozen.

    Args:
        graph: of a model in which both run.
        copy: path of the replica.
        source: path of the module that it follows, of the same type and shapes.

    >>> import torch
    >>> from torch import nn
    >>> from evolvenet.tracing.trace import trace
    >>> class Both(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    ...         self.slow = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    ...     def forward(self, x):
    ...         return self.net(x) - self.slow(x)
    >>> graph = trace(Both(), torch.zeros(1, 4))
    >>> graph.sizes, united(graph, "slow", "net").sizes
    ({'net.0': 8, 'slow.0': 8}, {'net.0': 8})
    """
    pairs = {name: _counterpart(graph, name, copy, source) for name in graph.layouts if name.startswith(f"{copy}.")}
    layouts = dict(graph.layouts)
    same: list[tuple[Part, Part]] = []
    for name, other in pairs.items():
        one, two = graph.layouts[name], graph.layouts.get(other, {})
        if _idle(graph, one) or _idle(graph, two):
            layouts[name] = layouts[other] = two if _idle(graph, one) else one
        elif not _alike(one, two):
            reason = f"its units stand in another way in {copy}, which follows {source}"
            return frozen_tensors(graph, [*pairs, *pairs.values()], reason)
        else:
            same += [
                ((p.width, p.part), (q.width, q.part))
                for d in one
                for p, q in zip(one[d], two[d], strict=True)
                if p.width and q.width
            ]
    widths: dict[str, Width] = {}
    name_of: dict[str, str] = {}
    for names in _classes(graph, [(one, two) for (one, _), (two, _) in same]).values():
        # Named by what is trained, also where the step has tied the two itself.
        name = source + names[0].removeprefix(copy) if names[0].startswith(f"{copy}.") else names[0]
        name = names[0] if name in list(graph.widths) and name not in names else name
        widths[name] = replace(_united(graph, names), name=name)
        name_of |= dict.fromkeys(names, name)
    numbers = _part_numbers(graph, same, name_of)
    layouts = {name: _renamed(layout, name_of, numbers) for name, layout in layouts.items()}
    held = {part.width for layout in layouts.values() for parts in layout.values() for part in parts}
    roles = {(tie.tensor, tie.dim): tie.role for width in graph.widths.values() for tie in width.ties}
    roles |= {(one, dim): roles[two, dim] for one, two in pairs.items() for dim in layouts[one] if (two, dim) in roles}
    kept = {name: width for name, width in widths.items() if name in held}
    added, gates = (known | {one for one, two in pairs.items() if two in known} for known in (graph.added, graph.gates))
    made = assemble(kept, layouts, graph.shapes, graph.trainable, graph.aliases, roles, graph.differentiates, added)
    return replace(made, gates=gates, outputs=graph.outputs)


def frozen_tensors(graph: WidthGraph, tensors: Iterable[str], reason: str) -> WidthGraph:
    """The graph in which every width that occurs in one of some tensors is frozen."""
    names = {
        part.width for name in tensors for parts in graph.layouts.get(name, {}).values() for part in parts if part.width
    }
    if not any(graph.widths[name].frozen is None for name in names):
        return graph
    widths = {
        name: replace(width, frozen=reason, patches=()) if name in names and width.frozen is None else width
        for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths))


def tensors_that_ran(graph: WidthGraph) -> set[str]:
    """Names of the tensors that a run has used."""
    return {name for name, layout in graph.layouts.items() if layout and not _idle(graph, layout)}


def _counterpart(graph: WidthGraph, name: str, copy: str, source: str) -> str:
    other = f"{source}.{name.removeprefix(f'{copy}.')}"
    return graph.aliases.get(other, other)


def _idle(graph: WidthGraph, layout: Layout) -> bool:
    """Whether no run has used a tensor of this layout."""
    widths = [graph.widths[part.width] for parts in layout.values() for part in parts if part.width]
    return bool(widths) and all(width.frozen == NEVER_RAN for width in widths)


def _alike(one: Layout, two: Layout) -> bool:
    def shape(layout: Layout) -> object:
        return {
            dim: [(part.length, part.repeat if part.width else 1) for part in parts] for dim, parts in layout.items()
        }

    return shape(one) == shape(two)


def _classes(graph: WidthGraph, same: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that stand for one width: the source's first, if it has run."""
    root = _roots(graph.widths, same)
    found: dict[str, list[str]] = {}
    sources = {two for _, two in same}
    for name in sorted(graph.widths, key=lambda each: each not in sources):
        found.setdefault(root[name], []).append(name)
    order = {name: number for number, name in enumerate(graph.widths)}
    return dict(sorted(found.items(), key=lambda entry: order[entry[1][0]]))


def _roots(names: Iterable[Name], same: Iterable[tuple[Name, Name]]) -> dict[Name, Name]:
    """{name: one that stands for all that are the same}."""
    home = {name: name for name in names}

    def root(name: Name) -> Name:
        while home[name] != name:
            name = home[name]
        return name

    for one, two in same:
        home[root(one)] = root(two)
    return {name: root(name) for name in home}


def _part_numbers(graph: WidthGraph, same: Iterable[tuple[Part, Part]], name_of: Mapping[str, str]) -> dict[Part, int]:
    """{part of a width: its number in the width that unites some}: parts that are tied in one of them are one part."""
    root = _roots(((width.name, part) for width in graph.widths.values() for part in range(width.parts)), same)
    found: dict[str, dict[Part, int]] = {}
    for part in sorted(root, key=lambda each: each[1]):
        known = found.setdefault(name_of[part[0]], {})
        known.setdefault(root[part], len(known))
    return {part: found[name_of[part[0]]][root[part]] for part in root}


def _united(graph: WidthGraph, names: list[str]) -> Width:
    widths = [graph.widths[name] for name in names]
    first = widths[0]
    if len(widths) == 1:
        return first
    reason = next((f"{width.name}: {width.frozen}" for width in widths if width.frozen is not None), first.frozen)
    reason = first.frozen or reason
    patches = () if reason else tuple(dict.fromkeys(patch for width in widths for patch in width.patches))
    mixed = next((width.mixed for width in widths if width.mixed is not None), None)
    smallest, multiple = max(w.smallest for w in widths), math.lcm(*(w.multiple for w in widths))
    step = math.lcm(*(w.step for w in widths))
    made = replace(first, frozen=reason, mixed=mixed, patches=patches, smallest=smallest, multiple=multiple, step=step)
    return replace(made, exact_growth=united_growth([width for width in widths if width.mixed is not None]))


def _renamed(layout: Layout, name_of: Mapping[str, str], numbers: Mapping[Part, int]) -> dict[int, tuple[Segment, ...]]:
    return {
        dim: tuple(
            replace(part, width=name_of[part.width], part=numbers[part.width, part.part]) if part.width else part
            for part in parts
        )
        for dim, parts in layout.items()
    }
