"""The fewest units that the widths of a model can have: code with a `squeeze` may need two, a top-5 needs five."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evolvenet.errors import ResizeError
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph, Widths
from evolvenet.tracing.bisection import bisect, classes_of
from evolvenet.tracing.coupled_dims import structure
from evolvenet.tracing.verification import Verification


def with_least_sizes(verification: Verification, graph: WidthGraph) -> WidthGraph:
    """The graph, in which `smallest` of every resizable width is a size that the model runs with.

    All widths are tried together at the size that is known from the ops (one unit, two groups, one multiple), in one run
    for shapes. Only if that fails, those that fail are found, each with the fewest units with which it passes: more units
    than needed to pass are taken to pass too. The other trials never have axes of one unit, since these have no labels.

    Args:
        verification: trials of the model, in all modes.
        graph: the graph, the widths of which have passed the other trials.
    """

    def failure(names: Sequence[str], more: int = 0) -> str | None:
        widths = [graph.widths[name] for name in names]
        sizes = {width.name: (width.smallest + more * width.multiple, width.size) for width in widths}
        return verification.failure(graph, {name: IndexMap.keep(range(new), old) for name, (new, old) in sizes.items()})

    names = [width.name for width in graph.resizable if width.smallest < width.size]
    failed = bisect(classes_of(names, lambda name: structure(graph.widths[name])), failure)
    # What the surgery itself refuses depends on the sizes of other widths: an LSTM's cells are more than what they project to.
    failed = {number: reason for number, reason in failed.items() if ResizeError.__name__ not in reason}
    widths = dict(graph.widths)
    for members in classes_of([names[number] for number in failed], lambda name: structure(widths[name])):
        first = widths[members[0][1]]
        low, high = 1, (first.size - first.smallest) // first.multiple
        more = low
        while low < high:
            low, high = (low, more) if failure([first.name], more) is None else (more + 1, high)
            more = (low + high) // 2
        for _, name in members:
            widths[name] = replace(widths[name], smallest=widths[name].smallest + low * widths[name].multiple)
    return replace(graph, widths=Widths(widths))
