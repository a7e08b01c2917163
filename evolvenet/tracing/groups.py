"""Groups of heads that lie in one weight so that no part of them is a width by itself.

Of groups × heads × places, where the key and value of a group stand behind its queries, the units of the queries are never
next to each other, and neither are those of the values: only whole groups are in order (Falcon's new decoder).
"""

from __future__ import annotations

import numpy as np
from torch import nn

from evolvenet.tracing.coupled_dims import CandidateFix
from evolvenet.tracing.grouping import GroupedWidths
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.numbers_of_widths import HEAD, heads_of_one_key


def groups_without_width(built: GroupedWidths, label_graph: LabelGraph) -> list[CandidateFix]:
    """Tie the units of each group that the code lays out, where none of them is of a width; the largest layouts count.

    These fixes are applied without a trial of the untied units, of which there are no widths that could fail.
    """
    blocks = sorted(label_graph.blocks.values(), key=lambda ids: -ids.numel())
    if not blocks:
        return []
    taken = {unit for members in built.members.values() for unit in members}
    for ids, _ in label_graph.frozen:
        taken.update(np.unique(built.component[ids.numpy()]).tolist())
    _, first = np.unique(built.component, return_index=True)
    rows = [(len(ids), set(built.component[ids.numpy()].reshape(-1).tolist())) for ids in label_graph.grids.values()]
    found = []
    for ids in blocks:
        units = set(built.component[ids.numpy()].reshape(-1).tolist())
        if len(ids) < 2 or not units.isdisjoint(taken):
            continue
        taken |= units
        counts = frozenset(count for count, inside in rows if inside <= units and count % len(ids) == 0)
        edges = (ids.T.reshape(-1), ids.T[:1].expand_as(ids.T).reshape(-1))
        found.append(CandidateFix((min(int(first[unit]) for unit in units),), HEAD, edges, ids.shape, counts=counts))
    return found


def numbers_of_one_key(
    model: nn.Module, built: GroupedWidths, label_graph: LabelGraph
) -> dict[str, tuple[tuple[str, str], ...]]:
    """{width: its `heads_of_one_key`} of the heads of queries that share one key, in a run that keeps heads apart."""
    queries = label_graph.one_key if label_graph.keeps_heads else []
    return {name: heads_of_one_key(model, built.graph.widths[name]) for name in built.widths_of(queries)}
