"""The changes of one event, from a policy's proposals."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from evolvenet.engine.event_data import EventData
from evolvenet.engine.original_widths import OriginalWidths
from evolvenet.engine.rank_changes import change_ranks
from evolvenet.engine.transaction import Transaction
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.past_events import PastEvents
from evolvenet.policies.base import Proposal
from evolvenet.surgery.width_record import remember_widths


def apply_proposals(
    transaction: Transaction,
    proposals: Mapping[str, Proposal],
    data: EventData,
    original: OriginalWidths,
    past: PastEvents,
    initial: dict[str, int],
) -> tuple[WidthGraph, OriginalWidths, PastEvents]:
    """Prune first, then grow, within the parameters that were freed; then layers become chains, or whole again.

    Args:
        transaction: of the event; what is done is appended to its changes, and its `undo` reverts it.
        proposals: {width or rank: new size}, the same on every rank.
        data: of the event.
        original: the units at the start of the run.
        past: the events so far, this one included.
        initial: {width: size at the start of the run}; new ranks are added.

    Returns:
        The graph of the changed model, the units at the start that are still there, and the events with these changes.
    """
    graph = data.graph
    sizes = graph.sizes
    known = {name: proposal.size for name, proposal in proposals.items() if name in sizes}
    down = {name: size for name, size in known.items() if size < sizes[name]}
    up = {name: size for name, size in known.items() if size > sizes[name]}
    for part in (down, up):
        if part:
            before, reasons = graph.sizes, {name: proposals[name].reason for name in part}
            plan = partial(data.plan_pruning, part) if part is down else partial(data.plan_growth, graph, part)
            surgery = transaction.apply(graph, plan, reasons)
            graph, original = surgery.graph, original.after(surgery.maps)
            past = past.changed_by(before, graph.sizes)
    if data.lowrank is not None:
        graph, made = change_ranks(transaction, graph, data, proposals, initial)
        past = past.changed_by(made, graph.sizes)
        for name in made.keys() - initial.keys():
            initial[name] = made[name]
            transaction.undo.callback(initial.pop, name)
        # The names of tensors have changed, and a record has those that were there when it was made.
        remember_widths(transaction.model, graph, original.sizes)
    return graph, original, past
