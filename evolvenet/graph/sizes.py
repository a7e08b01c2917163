"""The sizes of widths that give tensors of certain shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from evolvenet.graph.width_graph import WidthGraph

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Misfit:
    """A tensor whose shape no sizes of the widths give.

    Args:
        tensor: its name.
        dim: the axis, None if the number of axes differs.
        reason: what the axis is.
    """

    tensor: str
    dim: int | None
    reason: str


@dataclass(frozen=True)
class _Axis:
    """length = fixed + the sum of size · repeat over widths."""

    tensor: str
    dim: int
    length: int
    fixed: int
    repeats: Mapping[str, int]


def sizes_from_shapes(
    graph: WidthGraph, shapes: Shapes, original: Mapping[str, int] | None = None
) -> tuple[dict[str, int], list[Misfit]]:
    """The sizes that widths have in a model of other shapes.

    Args:
        graph: the widths.
        shapes: {tensor name: shape}, under any of a tied tensor's names; tensors that the graph does not have are ignored.
        original: sizes at the start of a run, where they are known: a width that has changed since may differ here, even
            if it is frozen now.

    Returns:
        {width: size} of every width, and the tensors that have other shapes.

    >>> from torch import nn, zeros
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), zeros(1, 6))
    >>> other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7))
    >>> sizes, misfits = sizes_from_shapes(graph, {name: tuple(tensor.shape) for name, tensor in other.named_parameters()})
    >>> sizes["0"], [(each.tensor, each.dim) for each in misfits]
    (5, [('2.weight', 0), ('2.bias', 0)])
    """
    original = original or {}
    known = {
        name: width.size
        for name, width in graph.widths.items()
        if width.frozen is not None and original.get(name, width.size) == width.size
    }
    named = {graph.aliases.get(name, name): (name, shape) for name, shape in shapes.items()}
    wrong = [
        Misfit(named[first][0], None, f"it is a tensor of {len(shape)} axes")
        for first, shape in graph.shapes.items()
        if first in named and len(named[first][1]) != len(shape)
    ]
    numbered = {each.tensor for each in wrong}
    axes = [
        axis
        for first, (name, shape) in named.items()
        if first in graph.shapes and name not in numbered
        for axis in _axes(graph, first, name, shape)
    ]
    sizes = _solved(graph, axes, known)
    wrong += [
        Misfit(axis.tensor, axis.dim, _reason(graph, axis))
        for axis in axes
        if axis.fixed + sum(sizes[width] * repeat for width, repeat in axis.repeats.items()) != axis.length
    ]
    return sizes, wrong


def _axes(graph: WidthGraph, first: str, name: str, shape: tuple[int, ...]) -> Iterator[_Axis]:
    for dim, length in enumerate(shape):
        segments = graph.layouts[first].get(dim)
        if segments is None:
            yield _Axis(name, dim, length, graph.shapes[first][dim], {})
            continue
        repeats: dict[str, int] = {}
        for part in segments:
            if part.width is not None:
                repeats[part.width] = repeats.get(part.width, 0) + part.repeat
        yield _Axis(name, dim, length, sum(part.length for part in segments if part.width is None), repeats)


def _solved(graph: WidthGraph, axes: list[_Axis], known: Mapping[str, int]) -> dict[str, int]:
    """Sizes by the axes on which one width alone is unknown; those that no axis gives are as in the graph."""
    sizes = dict(known)
    waiting = axes
    while waiting:
        later: list[_Axis] = []
        for axis in waiting:
            unknown = [width for width in axis.repeats if width not in sizes]
            if len(unknown) > 1:
                later.append(axis)
            elif unknown:
                rest = axis.length - axis.fixed - sum(sizes.get(w, 0) * repeat for w, repeat in axis.repeats.items())
                size, remainder = divmod(rest, axis.repeats[unknown[0]])
                if remainder == 0 and size >= graph.widths[unknown[0]].smallest:
                    sizes[unknown[0]] = size
        if len(later) == len(waiting):
            break
        waiting = later
    return {name: sizes.get(name, width.size) for name, width in graph.widths.items()}


def _reason(graph: WidthGraph, axis: _Axis) -> str:
    """Why the axis cannot have its length, for a message."""
    if not axis.repeats:
        return "it belongs to no width"
    for name in axis.repeats:
        frozen = graph.widths[name].frozen
        if frozen is not None:
            return f"width {name!r} keeps its size: {frozen}"
    return f"no size of width {' and '.join(map(repr, axis.repeats))} gives it together with the other tensors"


def proposed_length(graph: WidthGraph, tensor: str, axis: int, sizes: Mapping[str, int]) -> int:
    """Places on an axis of a tensor if the named widths had these sizes; the others stay as they are."""
    segments = graph.layouts[tensor].get(axis)
    if segments is None:
        return graph.shapes[tensor][axis]
    return sum(sizes.get(part.width or "", part.length // part.repeat) * part.repeat for part in segments)
