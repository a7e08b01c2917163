"""An event that fails is repeated without the widths at fault; where that is not known, they are bisected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evolvenet.engine.distributed import ProcessGroup
from evolvenet.engine.failure_policy import FailurePolicy, Resting, with_widths_back
from evolvenet.errors import OutputError, stage_of
from evolvenet.graph.width_graph import WidthGraph, Widths
from evolvenet.policies.base import RESTS

MOST_REPETITIONS = 16
"""Repetitions of one event, each without widths on which it failed: a failure on more is no matter of single widths."""


@dataclass(frozen=True)
class Bisection:
    """The search among the widths of an event for the one whose change makes the outputs wrong; each step repeats the event.

    Args:
        all: names of the widths that had been changed.
        suspects: of those, the ones among which it is.
        part: of those, the ones that change in the next repetition.
        reason: what was wrong.

    >>> search = Bisection.of(["a", "b", "c", "d"], "NaN")
    >>> search.part
    ('a', 'b')
    >>> search.after_success().part, search.after_success().after_success().part
    (('c',), ('d',))
    """

    all: tuple[str, ...]
    suspects: tuple[str, ...]
    part: tuple[str, ...]
    reason: str

    @classmethod
    def of(cls, changed: Sequence[str], reason: str, before: Bisection | None = None) -> Bisection:
        """After a failure.

        Args:
            changed: names of the widths that had been changed.
            reason: what was wrong.
            before: the search in whose repetition that was; None for a new one.
        """
        names = tuple(changed)
        return cls(before.all if before else names, names, names[: max(1, len(names) // 2)], reason)

    @property
    def is_over(self) -> bool:
        """Whether the outputs are right although the only suspect changes: they are wrong with others alone."""
        return self.part == self.suspects

    def after_success(self) -> Bisection:
        """The search among the other suspects."""
        left = self.suspects[len(self.part) :]
        return replace(self, suspects=left, part=left[: max(1, len(left) // 2)])

    def resting(self, moment: int, graph: WidthGraph) -> Resting:
        """The graph in which the next part alone can change, and what to warn of if the event ends like that."""
        names = frozenset(self.all) - frozenset(self.part)
        why = (
            f"{self.reason} That was after a change of {', '.join(self.all)}; {', '.join(self.part)} alone can change."
        )
        listed = ", ".join(name for name in self.all if name in names)
        message = f"step {moment}: {listed} rest in this event while other widths change: {why}"
        widths = {
            name: replace(width, frozen=f"{RESTS}in this event: {why}") if name in names else width
            for name, width in graph.widths.items()
        }
        return Resting(replace(graph, widths=Widths(widths)), names, message)


class Repetitions:
    """The graphs with which an event is repeated until it succeeds; the same on every rank.

    Args:
        failures: the run's failures.
        group: the processes.
        moment: the optimizer step, for messages.
        graph: the widths before the event.

    Attributes:
        graph: with which the event is to be done next.
    """

    def __init__(self, failures: FailurePolicy, group: ProcessGroup, moment: int, graph: WidthGraph) -> None:
        self.failures, self.group, self.moment = failures, group, moment
        self.graph = self._whole = self._base = graph
        self._rests: list[Resting] = []
        self._search: Bisection | None = None
        self._left = MOST_REPETITIONS

    def ends_after_success(self) -> bool:
        """Whether an event that has succeeded stays; if not, it is to be undone and done again with `graph`."""
        if self._search is None or self._search.is_over or not self._left:
            return True
        self._left -= 1
        self._search = self._search.after_success()
        self.graph = self._search.resting(self.moment, self._base).graph
        return False

    def ends_after_failure(self, problem: Exception, tried: Sequence[str]) -> bool:
        """Whether an event that has failed is given up; if not, it is to be done again with `graph`.

        Args:
            problem: what was raised.
            tried: names of the widths that the event had changed until then.
        """
        search = self._bisected(problem, tried)
        rest = None if search else self.failures.resting(self.group, self.moment, problem, self._base, tried)
        if (search is None and rest is None) or not self._left:
            return True
        self._left -= 1
        self._search = search
        if rest is not None:
            self._rests.append(rest)
            self._base = rest.graph
        self.graph = self._base if search is None else search.resting(self.moment, self._base).graph
        return False

    def _bisected(self, problem: Exception, tried: Sequence[str]) -> Bisection | None:
        """The next step of the search; None if the problem is another one, or one width alone had been changed."""
        changed = tuple(dict.fromkeys(name for name in tried if name in self._base.sizes))
        is_search = isinstance(problem, OutputError) and len(changed) > 1
        reason = f"{stage_of(problem)} failed: {problem}"
        return self.group.broadcast(Bisection.of(changed, reason, self._search) if is_search else None)

    @property
    def rests(self) -> list[Resting]:
        """The widths that have rested in the event as it succeeded."""
        return [*self._rests, *([self._search.resting(self.moment, self._base)] if self._search else [])]

    def with_widths_back(self, graph: WidthGraph) -> WidthGraph:
        """The graph after the event, with those widths that rested in it alone as they were before."""
        return with_widths_back(graph, {name for each in self.rests for name in each.passing}, self._whole)
