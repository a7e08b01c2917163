"""What a run's settings make impossible: a warning when the run starts, and one at its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from evolvenet.engine.distributed import process_group
from evolvenet.errors import OptimizerStateError, TraceError
from evolvenet.execution.isolation import isolated
from evolvenet.execution.step import returned_loss, run_model
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.plan import NewUnits
from evolvenet.lowrank.layer_ranks import LowRank, costs_of
from evolvenet.policies.base import Policy, PolicyContext
from evolvenet.policies.schedule import Schedule
from evolvenet.surgery.optimizer_parameters import check_replaceable
from evolvenet.surgery.optimizer_state import check_optimizers
from evolvenet.surgery.optimizer_tensors import with_inner

if TYPE_CHECKING:
    from evolvenet.engine.evolver import Evolver

log = logging.getLogger("evolvenet")

UNKNOWN_LENGTH = (
    "How long this run is to be is not known: expected a data loader with a length, or one of Trainer(max_steps=…), "
    "Trainer(max_time=…), or max_epochs above 1. Policies and stop={stop:g} are given 0 % of the run as its progress, so budgets "
    "that are to be reached later are not, and widths never come to rest. Give one of these to the Trainer."
)
"""For a run of which no share can be told."""


def warn(message: str | None) -> None:
    """Log a warning on rank 0, if there is one."""
    if message is not None and not process_group().rank:
        log.warning("%s", message)


def no_event_possible(
    schedule: Schedule,
    steps: float | None,
    epoch_steps: float | None = None,
    epochs: float | None = None,
    later: int = 0,
) -> str | None:
    """Why no event can take place in a run, and what to do about it; None where one can, or where that is not known.

    Args:
        schedule: when events come due.
        steps: optimizer steps of the run; None if they are not known.
        epoch_steps: optimizer steps of an epoch; None if they are not known.
        epochs: of the run; None if they are not known.
        later: optimizer steps that an event takes place after it has come due, at least.

    >>> no_event_possible(Schedule(every_n_steps=100), steps=500) is None
    True
    >>> print(no_event_possible(Schedule(every_n_steps=1000), steps=500))
    No event falls into this run, so all widths stay as they are: the first one is due after 1,000 steps, and the run ends
    after 500. Take a smaller every_n_steps or a longer run.
    """
    name, unit, total, start = "every_n_steps", "steps", steps, max(schedule.start_step, 1)
    period: float | None = schedule.every_n_steps
    if period is None:
        name, period = "every_n_epochs", (schedule.every_n_epochs or 1) * (epoch_steps or 1)
        if not epoch_steps or not steps:
            unit, total, start, later = "epochs", epochs, 1, 0
    if not schedule.stop:
        why, remedy = "stop=0 leaves no time for one", "a larger stop"
    elif not total:
        return None
    else:
        first = math.ceil(start / period) * period
        due = f"the first one is due after {first:,.0f} {unit}"
        if first >= total:
            why, remedy = f"{due}, and the run ends after {total:,.0f}", f"a smaller {name} or a longer run"
            remedy = f"a smaller start_step, {remedy}" if schedule.start_step > period else remedy
        elif first / total > schedule.stop:
            why = f"{due} of {total:,.0f}, when more than the share stop={schedule.stop:g} of the run is over"
            remedy = f"a larger stop, a smaller {name} or a longer run"
        elif first + later >= total:
            why = f"{due} and measures on the batches that follow, but the run ends after {total:,.0f}"
            remedy = f"a smaller {name} or a longer run"
        else:
            return None
    return f"No event falls into this run, so all widths stay as they are: {why}. Take {remedy}."


def unreachable(
    policy: Policy, model: nn.Module, graph: WidthGraph, example_inputs: Any, lowrank: LowRank | None = None
) -> str | None:
    """What the policy cannot reach with this network, as its method `unreachable` tells; None if it has none.

    Args:
        policy: any.
        model: is left as it was.
        graph: its widths.
        example_inputs: what costs are counted on.
        lowrank: how layers may be factorized; None where ranks are not in question.
    """
    return _told(policy, "unreachable", model, graph, example_inputs, graph.sizes, lowrank)


def without_loss(new_units: NewUnits, model: nn.Module, inputs: Any) -> str | None:
    """What becomes of a way in which new units start that needs the loss, where there is none; None where nothing does.

    Args:
        new_units: how they are to start.
        model: is run once on the inputs where they need the loss, and left as it was.
        inputs: of the model, or a `Step`.
    """
    if not new_units.needs_loss:
        return None
    try:
        with isolated(model):
            returned = run_model(model, inputs)
    except Exception as problem:
        log.debug("%s does not run for its loss", type(model).__name__, exc_info=problem)
        return None
    try:
        returned_loss(returned)
    except TraceError as problem:
        given = f"new_units={new_units.method!r}" + (", update=True" if new_units.update else "")
        other = new_units.without_loss.method
        return (
            f"{given} needs the loss: new units start as {other!r} and no weight is updated with inputs like the example. "
            f"Batches that bring what the loss needs are used. {problem}"
        )
    return None


def fixed_by_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> str | None:
    """Why the optimizers keep all widths as they are; None where their state can follow. The reason is logged."""
    try:
        check_optimizers(optimizers, dict(model.named_parameters()))
    except OptimizerStateError as problem:
        reason = f"widths stay as they are in this run, since an optimizer could not follow: {problem}"
        warn(reason)
        return reason
    return None


def rank_changes_possible(lowrank: LowRank | None, optimizers: Sequence[Optimizer], model: nn.Module) -> LowRank | None:
    """How layers may be factorized; None, with a warning, where an optimizer has no place for the factors."""
    if lowrank is not None:
        try:
            check_replaceable(optimizers, model)
        except OptimizerStateError as problem:
            warn(f"layers are not factorized in this run, since an optimizer could not follow: {problem}")
            return None
    return lowrank


def have_state(optimizers: Sequence[Optimizer]) -> bool:
    """Whether one of the optimizers, or one inside of them, has state, which most make in their first step."""
    return any(bool(optimizer.state) for optimizer in with_inner(optimizers))


def missed(evolver: Evolver) -> str | None:
    """What the policy has not reached by the end of a run, as its method `missed` tells; None if it has none."""
    initial = evolver.history.initial.sizes
    return _told(
        evolver.policy, "missed", evolver.model, evolver.graph, evolver.example_inputs, initial, evolver.lowrank
    )


def _told(
    policy: Policy,
    method: str,
    model: nn.Module,
    graph: WidthGraph,
    inputs: Any,
    initial: Mapping[str, int],
    lowrank: LowRank | None,
) -> str | None:
    tell = getattr(policy, method, None)
    if tell is None:
        return None
    progress = 0.0 if method == "unreachable" else 1.0
    try:
        ranks = lowrank and lowrank.ranks(model, graph, inputs)
        seen = graph if ranks is None else ranks.extended
        return tell(PolicyContext(seen, progress, initial, count_costs=lambda: costs_of(model, graph, inputs, ranks)))
    except Exception as problem:
        log.debug("%s of %s fails", method, type(policy).__name__, exc_info=problem)
        return None
