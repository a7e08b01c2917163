"""How failed events are handled: a warning the first time, evolution off for the run where a stage fails again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evolvenet.engine.distributed import ProcessGroup
from evolvenet.errors import OutputError, Place, SkippedEvent, SpectrumError, is_out_of_memory, places_of, stage_of
from evolvenet.graph.plain_data import check_types
from evolvenet.graph.width_graph import WidthGraph, Widths
from evolvenet.policies.base import RESTS

FAILURES = 2
"""Failures of one stage after which evolution is switched off for the rest of the run."""

BLOCK_REMOVAL = "block removal"
"""The stage that is switched off alone where it fails again."""

log = logging.getLogger("evolvenet")


@dataclass(frozen=True)
class Resting:
    """A graph in which some widths rest.

    Args:
        graph: the widths.
        passing: names of those that rest in one event alone.
        message: which ones rest, how long and why.
    """

    graph: WidthGraph
    passing: frozenset[str]
    message: str


class FailurePolicy:
    """Counts failures by stage. Events that cannot be measured, or for which memory ran out, are skipped and not counted.

    Args:
        off: why evolution is switched off, None while it is on.
    """

    def __init__(self, off: str | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.off = off

    def explain(self, group: ProcessGroup, moment: int, problem: Exception) -> str:
        """Warn, and switch off where a stage failed again; the same on every rank.

        Args:
            group: the processes; all of them count the stage in which rank 0 failed.
            moment: the optimizer step, for the message.
            problem: what was raised, tagged with its `stage`.

        Returns:
            Why nothing was changed.
        """
        stage, reason = self._counted(group, moment, problem, stage_of(problem) or "event")
        if stage is not None and self.counts[stage] >= FAILURES:
            self.off = f"{reason}. It was not the first time, so widths stay as they are for the rest of the run."
            if group.rank == 0:
                log.error("step %d: %s", moment, self.off)
            return self.off
        if group.rank == 0:
            log.warning("step %d: widths are left as they are: %s", moment, reason)
        return reason

    @property
    def may_remove_blocks(self) -> bool:
        """Whether blocks are still removed at events."""
        return self.counts[BLOCK_REMOVAL] < FAILURES

    def explain_blocks(self, group: ProcessGroup, moment: int, problem: Exception) -> None:
        """Warn that an event could not remove blocks; after the second time no later one tries. Widths change all the same.

        Args:
            group: see `explain`, like the next two.
            moment: the optimizer step.
            problem: what was raised.
        """
        _, reason = self._counted(group, moment, problem, BLOCK_REMOVAL)
        until = "" if self.may_remove_blocks else " for the rest of the run, since it was not the first time"
        if group.rank == 0:
            log.warning("step %d: blocks are left as they are%s: %s", moment, until, reason)

    def explain_count(self, group: ProcessGroup, moment: int, problem: Exception) -> None:
        """Warn that multiply-accumulates could not be counted, so that the last count stays; nothing else depends on it."""
        log.debug("step %d: the count of multiply-accumulates failed", moment, exc_info=problem)
        if group.rank == 0:
            reason = str(problem) or type(problem).__name__
            log.warning("step %d: multiply-accumulates are recorded as last counted: %s", moment, reason)

    def _counted(self, group: ProcessGroup, moment: int, problem: Exception, stage: str) -> tuple[str | None, str]:
        """The stage in which rank 0 failed, None where that is not counted, and the reason."""
        named = isinstance(problem, (SkippedEvent, SpectrumError))
        stage, passing = group.broadcast((stage, named or is_out_of_memory(problem)))
        reason = str(problem) if named else f"{stage} failed: {problem or type(problem).__name__}"
        log.debug("step %d: %s", moment, stage, exc_info=problem)
        if passing:
            return None, reason
        self.counts[stage] += 1
        return stage, reason

    def resting(
        self, group: ProcessGroup, moment: int, problem: Exception, graph: WidthGraph, tried: Collection[str]
    ) -> Resting | None:
        """The widths on which an event failed, so that it can be repeated without them; the same on every rank.

        They rest for the remaining run; for this event alone where a later one may succeed (NaN activations). Wrong outputs
        are the fault of a width if it alone has changed, see `Bisection` for several.

        Args:
            group: the processes; what rank 0 has worked on counts.
            moment: the optimizer step, for the message.
            problem: what was raised, tagged by `evolvenet.errors.concerning`.
            graph: the widths before the event.
            tried: names of the widths that the event had changed until then; of several in one place, these alone rest.

        Returns:
            The graph in which they are frozen, and what to warn of once the event has succeeded; None if no single width is
            known, or no other one is left.
        """
        passing = isinstance(problem, (SkippedEvent, SpectrumError))
        found = _widths_at(places_of(problem), graph)
        if isinstance(problem, OutputError) and len(tried) == 1:
            found = set(tried) & set(graph.sizes)
        if is_out_of_memory(problem):
            found = set()  # Whichever width was being worked on.
        names, passing = group.broadcast((sorted(found & set(tried) or found), passing))
        if not names or len(names) == len(graph.resizable):
            return None
        reason = f"{stage_of(problem) or 'event'} failed: {problem or type(problem).__name__}"
        reason = group.broadcast(str(problem) if passing else reason)
        until = "in this event" if passing else "for the rest of the run"
        log.debug("step %d: %s", moment, reason, exc_info=problem)
        verb = "rests" if len(names) == 1 else "rest"
        message = f"step {moment}: {', '.join(names)} {verb} {until} while other widths change: {reason}"
        widths = {
            name: replace(width, frozen=f"{RESTS}{until}: {reason}") if name in names else width
            for name, width in graph.widths.items()
        }
        return Resting(replace(graph, widths=Widths(widths)), frozenset(names) if passing else frozenset(), message)

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain data for a checkpoint."""
        return {"failures": dict(self.counts), "off": self.off}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        check_types(state["failures"], dict[str, int], "failures")
        check_types(state["off"], str | None, "off")
        self.counts, self.off = Counter(state["failures"]), self.off or state["off"]


def with_widths_back(graph: WidthGraph, names: Collection[str], before: WidthGraph) -> WidthGraph:
    """The graph in which widths may change again that rested in one event.

    Args:
        graph: after the event.
        names: of these widths.
        before: the graph in which they could change.
    """
    widths = {
        name: replace(width, frozen=before.widths[name].frozen) if name in names else width
        for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths)) if names else graph


def _widths_at(places: Iterable[Place], graph: WidthGraph) -> set[str]:
    """The resizable widths at places: widths by name, tensors, or axes of tensors."""
    found: set[str] = set()
    for place in places:
        tensor, axis = (place, None) if isinstance(place, str) else place
        layout = graph.layouts.get(graph.aliases.get(tensor, tensor), {})
        chosen = (
            [layout.get(axis % max(1, len(graph.shapes[tensor])), ())]
            if axis is not None and layout
            else layout.values()
        )
        found |= {part.width for segments in chosen for part in segments if part.width is not None}
        found |= {tensor} if isinstance(place, str) else set()
    return found & set(graph.sizes)
