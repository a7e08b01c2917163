"""What an event decides: the policy's proposals from the event's measurements, in sizes that the widths may have."""

from __future__ import annotations

from collections.abc import Mapping

from evolvenet.engine.event_data import EventData
from evolvenet.engine.invariants import check_finite_weights
from evolvenet.engine.snapshot import PendingCut
from evolvenet.errors import SkippedEvent, stage
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import Policy, Proposal, check_proposals, rounded


def decide(
    policy: Policy, data: EventData, initial: Mapping[str, int], pending_cut: PendingCut | None
) -> tuple[dict[str, WidthStatistics], dict[str, Proposal]]:
    """The statistics that were measured, and the policy's proposals; nothing while a cut is still to be judged.

    Args:
        policy: proposes sizes.
        data: of the event.
        initial: {width: size} at the start of the run.
        pending_cut: of a policy that judges its cuts.

    Raises:
        SkippedEvent: for weights that are not finite, or without a batch to measure on.
        PolicyError: for proposals for widths that are unknown or frozen.
    """
    with stage("weight check"):
        check_finite_weights(data.model)
    if not data.batches:
        raise SkippedEvent("Expected at least one observed batch to measure on, got none. Call observe(batch) first.")
    if pending_cut and pending_cut.snapshot:
        return {}, {}
    with stage("policy"):
        context = data.context(initial, pending_cut and pending_cut.state)
        proposals = rounded(check_proposals(policy.propose(context), context.graph), context.graph)
        data.expect({name: proposal.size for name, proposal in proposals.items()})
        # Which units are pruned depends on the statistics, also where the policy's sizes do not.
        return (data.statistics if proposals else data.measured), proposals
