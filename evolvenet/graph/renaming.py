"""The graph of a model as a part of a larger one, and the part of a graph that lies in one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from evolvenet.graph.width_graph import Width, WidthGraph, assemble

Rename = Callable[[str], str | None]
"""The new name of a module, tensor or width; None for one that is left out."""


def in_parent(path: str) -> Rename:
    """The names that everything has in a module which holds the model at a path.

    >>> in_parent("net")("0.weight"), in_parent("net")(""), in_parent("")("0.weight")
    ('net.0.weight', 'net', '0.weight')
    """
    return lambda name: ".".join(filter(None, (path, name)))


def in_child(path: str) -> Rename:
    """The names that everything has in the module at a path; None for what lies outside of it.

    >>> in_child("net")("net.0.weight"), in_child("net")("net"), in_child("net")("head.weight")
    ('0.weight', '', None)
    """
    start = f"{path}." if path else ""
    return lambda name: "" if name == path else name.removeprefix(start) if name.startswith(start) else None


def without_layer(path: str) -> Rename:
    """The names that everything has once a layer was taken out of its list, and those after it have moved up.

    >>> rename = without_layer("layers.1")
    >>> rename("layers.0.fc.weight"), rename("layers.1.fc.weight"), rename("layers.2.fc.weight"), rename("head")
    ('layers.0.fc.weight', None, 'layers.1.fc.weight', 'head')
    """
    parent, _, index = path.rpartition(".")
    start, place = f"{parent}." if parent else "", int(index)

    def rename(name: str) -> str | None:
        number, dot, rest = name.removeprefix(start).partition(".")
        if not name.startswith(start) or not number.isdecimal() or int(number) < place:
            return name
        return None if int(number) == place else f"{start}{int(number) - 1}{dot}{rest}"

    return rename


def same_widths(before: WidthGraph, after: WidthGraph, rename: Rename) -> dict[str, str]:
    """{width of one graph: the width of another one of the same model that it is}, by the tensors in which they lie.

    Args:
        before: whose names are found.
        after: of the same model later; a width of it that lies in no tensor of the other graph is left out.
        rename: the names that the tensors of `before` have in `after`.
    """
    names = {
        (new, tie.dim): width.name
        for width in before.widths.values()
        for tie in width.ties
        if (new := rename(tie.tensor)) is not None
    }
    found: dict[str, str] = {}
    for width in after.widths.values():
        known = next((n for tie in width.ties if (n := names.get((tie.tensor, tie.dim))) is not None), None)
        if known is not None:
            found[width.name] = known
    return found


def renamed_width(name: str, rename: Rename) -> str:
    """The new name of a width; one that lies partly outside may keep its name."""
    return rename(name) or name


def renamed(graph: WidthGraph, rename: Rename) -> WidthGraph:
    """A graph by other names, without the tensors for which there is none.

    A width that has axes in such tensors, too, keeps the others. The chosen outputs are those of the whole model: a graph of a
    part or a holder has none.

    >>> from torch import nn, zeros
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), zeros(1, 6))
    >>> whole = renamed(graph, in_parent("net"))
    >>> whole.sizes, renamed(whole, in_child("net")) == graph
    ({'net.0': 8}, True)
    """
    names = {name: new for name in graph.shapes if (new := rename(name)) is not None}
    aliases: dict[str, str] = {}
    for other, first in graph.aliases.items():
        new = rename(other)
        # A tied tensor whose first name is outside is called by the next one.
        if new is not None and names.setdefault(first, new) != new:
            aliases[new] = names[first]
    layouts = {new: graph.layouts[name] for name, new in names.items()}
    there = {part.width for axes in layouts.values() for segments in axes.values() for part in segments}
    called = {name: renamed_width(name, rename) for name in graph.widths if name in there}
    layouts = {
        name: {
            dim: tuple(replace(part, width=part.width and called[part.width]) for part in segments)
            for dim, segments in axes.items()
        }
        for name, axes in layouts.items()
    }
    roles = {
        (names[tie.tensor], tie.dim): tie.role
        for width in graph.widths.values()
        for tie in width.ties
        if tie.tensor in names
    }
    made = assemble(
        {called[name]: _bare(graph.widths[name], called[name], rename) for name in called},
        layouts,
        {new: graph.shapes[name] for name, new in names.items()},
        frozenset(names[name] for name in graph.trainable if name in names),
        aliases,
        roles,
        graph.differentiates,
        frozenset(names[name] for name in graph.added if name in names),
    )
    same = all(name == new for name, new in names.items())
    outputs = graph.outputs if same and not callable(graph.outputs) else None
    return replace(made, gates=frozenset(names[name] for name in graph.gates if name in names), outputs=outputs)


def _bare(width: Width, name: str, rename: Rename) -> Width:
    patches = tuple((new, attribute) for path, attribute in width.patches if (new := rename(path)) is not None)
    rank_of = None if width.rank_of is None else rename(width.rank_of)
    grown = width.exact_growth
    if grown is not None:
        norms = [rename(path) for path in grown.norms]
        # With a norm outside nothing that lies here keeps the function.
        grown = None if None in norms else replace(grown, norms=tuple(path for path in norms if path is not None))
    return replace(width, name=name, ties=(), patches=patches, rank_of=rank_of, exact_growth=grown)
