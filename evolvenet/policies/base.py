"""Which widths change, and to what size: from their spectra, pure and without the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.loss_test import Evidence
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_spectra import WidthStatistics


@dataclass(frozen=True)
class Proposal:
    """A new size for a width, and why, for a person to read."""

    size: int
    reason: str


@dataclass(frozen=True)
class PolicyContext:
    """When an event happens in a run, for policies with a schedule.

    Args:
        progress: share of the run that is done, 0 … 1.
        initial: sizes of the widths when the run began.
        costs: what other sizes would cost.
        trials: cuts every width by itself to some sizes, `shares` of its units if they are given, and tells how far the outputs
            move: {width: [(size, loss)]}, by size. It takes a while, so it is done only when it is called.
        standing: how far the run has come under a policy that judges its cuts, see `Judging`.
        evidence: tells of widths that would grow to some sizes whether the loss asks for that, {} where nothing is known
            (no gradients were seen). It takes some runs of the network for each.
    """

    progress: float
    initial: Mapping[str, int]
    costs: Costs
    trials: Callable[..., Mapping[str, Sequence[tuple[int, float]]]] = lambda **_: {}
    standing: Any = None
    evidence: Callable[[Mapping[str, int]], Mapping[str, Evidence]] = lambda _: {}


@runtime_checkable
class Scheduled(Protocol):
    """A policy that depends on the moment: it is asked for the policy of the moment, which then proposes."""

    def at(self, moment: PolicyContext) -> Policy | None:
        """The policy for one moment of a run; None if nothing is to change, so that nothing needs to be measured."""
        ...


@runtime_checkable
class Judging(Scheduled, Protocol):
    """A policy whose cuts are judged by a validation metric afterwards, and taken back where they cost too much.

    Its standing is of its own kind and immutable; the evolver keeps it and puts it into checkpoints.
    """

    @property
    def metric(self) -> str:
        """The metric's name, as the module logs it."""
        ...

    def begin(self, state: Mapping[str, Any] | None = None) -> Any:
        """The standing at the start of a run, or what `plain` made of one."""
        ...

    def plain(self, standing: Any) -> dict[str, Any]:
        """A standing as plain data, for a checkpoint."""
        ...

    def after(self, standing: Any, widths: Iterable[str]) -> Any:
        """The standing after an event that cut these widths, which now wait for their judgement; none if it found nothing."""
        ...

    def judged(self, standing: Any, value: float) -> tuple[str, Any]:
        """Whether the last cut is to "keep", "undo" or "wait", and the standing after that."""
        ...


class Policy(Protocol):
    """Anything that proposes sizes: a pure function of what was measured."""

    def propose(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> dict[str, Proposal]:
        """New sizes for the widths that should change; the others are left out."""
        ...


def enlarged(measure: WidthStatistics, growth: float) -> int:
    """The size of a width after it grew by a share of itself, rounded up.

    >>> enlarged(WidthStatistics("0", 8, spectrum=(1.0,) * 8, events_since_change=9, growable=True), 0.3)
    11
    """
    return measure.size + math.ceil(growth * measure.size)


def check_fields(policy: object, shares: Iterable[str], least: Mapping[str, float]) -> None:
    """Refuse a policy with shares outside of 0 … 1, or numbers below the least that they may be.

    Raises:
        PolicyError: for the first such field.
    """
    for name, low, high in (
        *((name, 0, 1) for name in shares),
        *((name, low, math.inf) for name, low in least.items()),
    ):
        check_number(type(policy).__name__, name, getattr(policy, name), low, high)


def check_number(policy: str, name: str, value: object, low: float, high: float) -> None:
    """Refuse what is not a number in `low … high`; NaN is in no range.

    Raises:
        PolicyError: with the names of the policy and of the argument.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        expected = f"a number in {low} … {high}" if high < math.inf else f"a number of {low} or more"
        raise PolicyError(f"{policy}: expected {name} to be {expected}, got {value!r}.")
