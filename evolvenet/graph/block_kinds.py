"""The kinds of blocks that parameters belong to: attention, feed-forward, experts, router, stream, embeddings, other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from evolvenet.graph.axes import FOLLOWS, Tie
from evolvenet.graph.coverage import OUTPUT, entries_of

if TYPE_CHECKING:
    from evolvenet.graph.width_graph import Width, WidthGraph

STREAM, ATTENTION, FEED_FORWARD, EMBEDDINGS, OTHER = "stream", "attention", "FFN", "embeddings", "other"
EXPERTS, ROUTER = "experts", "router"
KINDS: tuple[str, ...] = (ATTENTION, FEED_FORWARD, EXPERTS, ROUTER, STREAM, EMBEDDINGS, OTHER)
"""In the order in which they are printed."""


def spread(widths: Mapping[str, Width], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{width: kind}, from the kinds that the trace has seen, see `evolvenet.tracing.block_kinds`.

    A width from which weights lead to attention alone (the latent of keys and values, a rank of their projection) is
    attention. Of the rest, what lies between streams, weights leading from one to it and from it to one, is feed-forward,
    and experts if all these weights are stacks of one matrix for each expert.

    Args:
        widths: of a traced graph, by name.
        shapes: of its tensors.
    """
    kinds = {name: _of_competing(width, shapes) for name, width in widths.items()}
    stacks = {tie.tensor for name in widths if kinds[name] == EXPERTS for tie in _stacks(widths[name], shapes)}
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
    kinds.update(dict.fromkeys((name for name in between if kinds[name] == OTHER), FEED_FORWARD))
    for name, width in widths.items():
        weights = {tie.tensor for tie in (*width.producers, *width.consumers)}
        if kinds[name] in (FEED_FORWARD, OTHER) and weights and weights <= stacks:
            kinds[name] = EXPERTS
    return kinds


def _of_competing(width: Width, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The kind of a width; of units of which the best few are selected: experts if they are rows of a stack of weights.

    Units without a stack that nothing consumes are rows of a router whose experts are modules of their own. Others are
    features of which the best few pass on, and no experts.
    """
    if width.kind != EXPERTS or _stacks(width, shapes):
        return width.kind
    return OTHER if width.consumers or width.frozen == OUTPUT else ROUTER


def _stacks(width: Width, shapes: Mapping[str, tuple[int, ...]]) -> list[Tie]:
    """The ties of a width of experts with the tensors that have a matrix, or a row of biases, for each expert."""
    ranks = {tie: len(shapes[tie.tensor]) for tie in width.ties}
    return [tie for tie, rank in ranks.items() if rank > 2 or (rank > 1 and tie.role == FOLLOWS)]


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
    is of the width's kind, but tables that are looked up are embeddings as a whole, and so are routers and the weights of
    experts what they are; what falls to no width is "other".

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
    >>> coverage_by_kind(trace(model, torch.zeros(1, 3, dtype=torch.int64)))
    {'embeddings': (0.8, 0.8), 'other': (0.16, 0.2)}
    """
    found: dict[str, tuple[float, float]] = dict.fromkeys(KINDS, (0.0, 0.0))
    total = graph.parameters
    for tensor in graph.trainable if total else ():
        entries = entries_of(graph, tensor)
        whole = _kind_of_tensor(graph, tensor)
        rest = math.prod(graph.shapes[tensor]) - math.fsum(entries.values())
        for width, count in (*entries.items(), (None, rest)):
            kind = whole or (OTHER if width is None else graph.widths[width].kind)
            removable = count if width is not None and graph.widths[width].frozen is None else 0.0
            found[kind] = found[kind][0] + removable / total, found[kind][1] + count / total
    return {kind: share for kind, share in found.items() if share[1] > 0}


def _kind_of_tensor(graph: WidthGraph, tensor: str) -> str | None:
    """The kind of all entries of a table, a router, or a stack of experts; None for other tensors."""
    names = {part.width for parts in graph.layouts[tensor].values() for part in parts if part.width is not None}
    kinds = {graph.widths[name].kind for name in names}
    if EMBEDDINGS in kinds or ROUTER in kinds:
        return EMBEDDINGS if EMBEDDINGS in kinds else ROUTER
    experts = [graph.widths[name] for name in names if graph.widths[name].kind == EXPERTS]
    if not experts:
        return None
    return EXPERTS if any(tie.tensor == tensor for w in experts for tie in _stacks(w, graph.shapes)) else ROUTER


def with_block_kinds(graph: WidthGraph) -> WidthGraph:
    """The graph with a kind for each width, see `spread`."""
    kinds = spread(graph.widths, graph.shapes)
    widths = {name: replace(width, kind=kinds[name]) for name, width in graph.widths.items()}
    return replace(graph, widths=type(graph.widths)(widths))
