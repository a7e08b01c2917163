"""Which other label run may show that heads of attention can go, from the graph of the first one.

Rotary embeddings and norms that all heads share tie the heads of all layers; tensors with an entry for each head (relative
position biases, attention sinks, decays) meet products over the places of each head, whose results have no labels of heads.
Both only matter where heads are units, so that a first run goes without.
"""

from __future__ import annotations

from collections import defaultdict

from evolvenet.graph.block_kinds import ATTENTION
from evolvenet.graph.coverage import TRIAL
from evolvenet.graph.width_graph import FOLLOWS, PRODUCES, Width, WidthGraph
from evolvenet.tracing.labels import MET_DATA, LabelGraph


def other_runs(graph: WidthGraph, label_graph: LabelGraph, heads: bool) -> list[tuple[frozenset[str], bool]]:
    """(tensors that all heads share, whether heads are kept apart) of each further label run that is worth making.

    Args:
        graph: of a first run.
        label_graph: the ties of its units.
        heads: as of `has_entries_of_heads`.
    """
    given = shared_by_heads(graph, label_graph, heads)
    if label_graph.one_key and heads:
        return runs_with_heads(graph, given)
    runs = [(given, False)] if given else []
    return [*runs, (given, True)] if has_entries_of_heads(graph, label_graph, heads) else runs


def runs_with_heads(graph: WidthGraph, given: frozenset[str]) -> list[tuple[frozenset[str], bool]]:
    """Runs that keep heads apart which share one key: with all tensors given, and without those that have an entry a head.

    Values have no heads in a first run, so that what has an entry for each head ties all heads and places of its results.

    Args:
        graph: of a first run.
        given: tensors that all heads share, as far as known.
    """
    single = {tie.tensor for width in graph.widths.values() if width.size == 1 for tie in width.ties}
    return [(each, True) for each in dict.fromkeys((given, given - single))]


def shared_by_heads(graph: WidthGraph, label_graph: LabelGraph, heads: bool) -> frozenset[str]:
    """Tensors that tie all heads of widths to each other: frequencies of rotary embeddings, norms of queries.

    They follow a width whose producers have more places than they have, on a module of their own; buffers do so too where the
    code multiplies frequencies by positions in a matrix product, as a weight. If they stay as they are, whole heads may go.
    Heads of queries go with the key and value head that they share. A norm over all heads of keys has an entry for each of
    their places and is no such tensor (OLMo 2).

    Args:
        graph: of a first run.
        label_graph: the ties of its units.
        heads: whether that matters where places of all heads can go too, and not of frozen widths alone.
    """
    places = {ids.shape[1] for ids in label_graph.grids.values()}
    found: set[str] = set()
    for width in graph.widths.values():
        of_places = heads and width.frozen is None and width.kind == ATTENTION and width.mixed is not None
        if not of_places and not (width.frozen or "").startswith(TRIAL):
            continue
        totals: dict[tuple[str, int], int] = defaultdict(int)
        for tie in width.ties:
            totals[tie.tensor, tie.dim] += tie.repeat * width.size
        weights = [tie for tie in width.ties if tie.role != FOLLOWS and tie.tensor in graph.trainable]
        produced = {totals[tie.tensor, tie.dim] for tie in weights if tie.role == PRODUCES}
        most, whole = max(produced, default=0), produced - places
        own = {tie.module for tie in weights}
        found |= {
            tie.tensor
            for tie in width.ties
            if (tie.role == FOLLOWS or tie.tensor not in graph.trainable)
            and tie.module not in own
            and totals[tie.tensor, tie.dim] < most
            and totals[tie.tensor, tie.dim] not in whole
        }
    return frozenset(found)


def has_entries_of_heads(graph: WidthGraph, label_graph: LabelGraph, heads: bool) -> bool:
    """Whether tensors that are frozen may have an entry for each head: relative biases, attention sinks, decays, slopes.

    A product over the places of each head has no labels of heads, so that they meet data there, or fail a trial with the heads.

    Args:
        graph: of a run without such labels.
        label_graph: the ties of its units.
        heads: whether whole heads are units wherever they can be; else they are only where places of them cannot go.
    """
    rows = {len(ids) for ids in label_graph.grids.values()}
    # What has no label of its heads may be such a product, as the decays of Mamba-2 meet it.
    reasons = [(width.frozen, width.mixed) for width in graph.widths.values() if width.frozen]
    stuck = any(MET_DATA in reason or (mixed and reason.startswith(TRIAL)) for reason, mixed in reasons)
    met = any(reason.endswith(MET_DATA) and len(ids) in rows for ids, reason in label_graph.frozen)
    failed = any(width.size in rows and _only_follows(width) for width in graph.widths.values())
    return ((stuck or heads) and met) or failed


def _only_follows(width: Width) -> bool:
    """Whether a width has failed its trials, and no weight produces or consumes its units."""
    failed = width.frozen is not None and width.frozen.startswith(TRIAL)
    return failed and all(tie.role == FOLLOWS for tie in width.ties)
