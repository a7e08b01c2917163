"""The growth of widths that norms mix, tried with numbers: see `evolvenet.surgery.norm_expansion`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from evolvenet.graph.exact_growth import COPY, ExactGrowth
from evolvenet.graph.width_graph import WidthGraph, Widths
from evolvenet.tracing.bisection import bisect, classes_of
from evolvenet.tracing.coupled_dims import structure

Fails = Callable[[WidthGraph, Sequence[str]], str | None]
"""(graph, names of widths that grow) → how the outputs change, None if they stay."""


def without_exact_growth(graph: WidthGraph) -> WidthGraph:
    """The graph in which no width that an op mixes grows."""
    return _with(graph, dict.fromkeys(graph.widths))


def with_proved_growth(graph: WidthGraph, possible: WidthGraph, fails: Fails) -> WidthGraph:
    """The graph in which each width grows in the first way that keeps the outputs: as is possible, or else by copies.

    Args:
        graph: verified, without growth of mixed widths.
        possible: the same widths, with the growth to try.
        fails: tries it.
    """
    found: dict[str, ExactGrowth | None] = {}
    wanted = {width.name: possible.widths[width.name].exact_growth for width in graph.resizable}
    left = {name: growth for name, growth in wanted.items() if growth is not None}
    while left:
        failed = _failing(_with(graph, left), list(left), fails)
        found |= {name: growth for name, growth in left.items() if name not in failed}
        left = {name: ExactGrowth(COPY) for name in failed if left[name] != ExactGrowth(COPY)}
    return _with(graph, found)


def _failing(graph: WidthGraph, names: Sequence[str], fails: Fails) -> list[str]:
    """Those widths of a graph whose growth changes the outputs."""
    widths = graph.widths
    classes = classes_of(
        names, lambda name: (structure(widths[name]), getattr(widths[name].exact_growth, "new_units", None))
    )
    return [names[number] for number in bisect(classes, lambda chosen: fails(graph, chosen))]


def _with(graph: WidthGraph, growth: Mapping[str, ExactGrowth | None]) -> WidthGraph:
    widths = {
        name: replace(width, exact_growth=growth[name]) if name in growth else width
        for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths))
