"""The kinds of blocks that parameters belong to: attention, feed-forward, residual stream, embeddings, other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evolvenet.graph.width_graph import Width, WidthGraph

STREAM, ATTENTION, FEED_FORWARD, EMBEDDINGS, OTHER = "stream", "attention", "FFN", "embeddings", "other"
KINDS: tuple[str, ...] = (ATTENTION, FEED_FORWARD, STREAM, EMBEDDINGS, OTHER)
"""In the order in which they are printed."""


def spread(widths: Mapping[str, Width]) -> dict[str, str]:
    """{width: kind}, from the kinds that the trace has seen, see `evolvenet.tracing.block_kinds`.

    A width from which weights lead to attention alone (the latent of keys and values, a rank of their projection) is
    attention. Of the rest, what lies between streams, weights leading from one to it and from it to one, is feed-forward.

    Args:
        widths: of a traced graph, by name.
    """
    kinds = {name: width.kind for name, width in widths.items()}
    consumes = _by_tensor((tie.tensor, width.name) for width in widths.values() for tie in width.consumers)
    produces = _by_tensor((tie.tensor, width.name) for width in widths.values() for tie in width.producers)
    after = {name: _over(width.consumers, produces) for name, width in widths.items()}
    before = {name: _over(width.producers, consumes) for name, width in widths.items()}
    for _ in widths:
        found = [n for n, k in kinds.items() if k == OTHER and after[n] and {kinds[m] for m in after[n]} == {ATTENTION}]
        if not found:
            break
        kinds.update(dict.fromkeys(found, ATTENTION))
    between = _leading(kinds, after) & _leading(kinds, before)
    return kinds | dict.fromkeys((name for name in between if kinds[name] == OTHER), FEED_FORWARD)


def _leading(kinds: Mapping[str, str], steps: Mapping[str, set[str]]) -> set[str]:
    """The widths from which steps over widths of no other kind lead to a stream."""
    found = {name for name, kind in kinds.items() if kind == STREAM}
    for _ in kinds:
        more = {name for name, next_ones in steps.items() if kinds[name] == OTHER and next_ones & found} - found
        if not more:
            break
        found |= more
    return found


def _over(ties: Iterable[object], widths_of: Mapping[str, set[str]]) -> set[str]:
    return {name for tie in ties for name in widths_of.get(getattr(tie, "tensor"), ())}  # noqa: B009  no import cycle


def _by_tensor(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for tensor, width in pairs:
        found.setdefault(tensor, set()).add(width)
    return found


def coverage_by_kind(graph: WidthGraph) -> dict[str, tuple[float, float]]:
    """{kind: (share of the model's parameters that can be removed, share that belongs to the kind)}, 0 … 1.

    The first numbers add up to the coverage, the second ones to 1. What falls to a width by `evolvenet.graph.coverage.shares`
    is of the width's kind, but tables that are looked up are embeddings as a whole; what falls to no width is "other".

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
    >>> coverage_by_kind(trace(model, torch.zeros(1, 3, dtype=torch.int64)))
    {'embeddings': (0.8, 0.8), 'other': (0.16, 0.2)}
    """
    from evolvenet.graph.coverage import entries_of

    found: dict[str, tuple[float, float]] = dict.fromkeys(KINDS, (0.0, 0.0))
    total = graph.parameters
    for tensor in graph.trainable if total else ():
        entries = entries_of(graph, tensor)
        table = any(graph.widths[tie].kind == EMBEDDINGS for tie in _widths_in(graph, tensor))
        rest = math.prod(graph.shapes[tensor]) - math.fsum(entries.values())
        for width, count in (*entries.items(), (None, rest)):
            kind = EMBEDDINGS if table else OTHER if width is None else graph.widths[width].kind
            removable = count if width is not None and graph.widths[width].frozen is None else 0.0
            found[kind] = found[kind][0] + removable / total, found[kind][1] + count / total
    return {kind: share for kind, share in found.items() if share[1] > 0}


def _widths_in(graph: WidthGraph, tensor: str) -> set[str]:
    return {part.width for parts in graph.layouts[tensor].values() for part in parts if part.width is not None}


def with_block_kinds(graph: WidthGraph) -> WidthGraph:
    """The graph with a kind for each width, see `spread`."""
    kinds = spread(graph.widths)
    widths = {name: replace(width, kind=kinds[name]) for name, width in graph.widths.items()}
    return replace(graph, widths=type(graph.widths)(widths))
