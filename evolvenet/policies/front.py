"""`Front`: several budgets one after the other, so that one run gives a network for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from evolvenet.errors import PolicyError
from evolvenet.policies.base import PolicyContext, Proposal, check_number
from evolvenet.policies.budget import Budget


@dataclass(frozen=True)
class Front:
    """Budgets in turn. Each has a span of the run, at the end of which the network is one point of accuracy against cost.

    Within its span a budget behaves as in a run of its own: its `by` is a share of the span, and it sets out from the budget
    before it, the first one from the network as it was at the beginning.

    Args:
        points: the budgets, all of the same kind (all parameters, all multiply-accumulates, …).
        spans: how long each one has, in any unit, for example epochs; equal shares if left out.

    Raises:
        PolicyError: for no budgets, budgets of several kinds, or spans that do not fit them.

    >>> front = Front(points=[Budget(params=5_000, by=0.5), Budget(params=700, by=0.5)], spans=[10, 30])
    >>> front.ends
    (0.25, 1.0)
    """

    points: Sequence[Budget]
    spans: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.points or len({point.kind for point in self.points}) > 1:
            kinds = ", ".join(point.kind for point in self.points) or "none"
            raise PolicyError(
                f"Front: expected one or more budgets of one kind as points, got {kinds}. "
                "Take for example points=[Budget(params=12_500), Budget(params=5_000)]."
            )
        if self.spans is not None and len(self.spans) != len(self.points):
            raise PolicyError(
                f"Front: expected one span for each of {len(self.points)} points, got {len(self.spans)}: {self.spans}."
            )
        for span in self.spans or ():
            check_number("Front", "each span", span, 0, math.inf)
            if not span:
                raise PolicyError(f"Front: expected spans above 0, got {self.spans}.")

    @property
    def kind(self) -> str:
        """Which cost is bounded."""
        return self.points[0].kind

    @property
    def lowrank(self) -> bool:
        """Whether ranks are in question in any span."""
        return any(point.lowrank for point in self.points)

    @property
    def depth(self) -> bool:
        """Whether blocks are removed in any span."""
        return any(point.depth for point in self.points)

    @property
    def ends(self) -> tuple[float, ...]:
        """The share of the run, 0 … 1, at which the span of each point ends."""
        spans = self.spans or [1] * len(self.points)
        return tuple(done / sum(spans) for done in accumulate(spans))

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        """The proposals of the budget in whose span this moment of the run lies."""
        point, start, progress = self._now(context.costs.at(self.kind, context.initial), context.progress)
        return point.propose_from(context, start, progress)

    def block_loss(
        self, context: PolicyContext, path: str, saved: Callable[[str], float], accepted: Callable[[str], float]
    ) -> float:
        """See `evolvenet.policies.base.DepthPolicy`; of the budget in whose span this moment of the run lies."""
        point, start, progress = self._now(context.costs.at(self.kind, context.initial), context.progress)
        return point.block_loss_from(context, start, progress, accepted) if point.depth else -math.inf

    def unreachable(self, context: PolicyContext) -> str | None:
        """Why no widths of a network cost as little as one of the points, and what to do; None if some do."""
        return next((problem for point in self.points if (problem := point.unreachable(context)) is not None), None)

    def missed(self, context: PolicyContext) -> str | None:
        """By how much a network misses the last point at the end of a run; None if it does not."""
        return self.points[-1].missed(context)

    def target(self, start: float, progress: float) -> float:
        """The most that the network may cost now.

        Args:
            start: its cost at the beginning of the run.
            progress: share of the run that is done, 0 … 1.

        >>> front = Front(points=[Budget(params=5_000, by=0.5), Budget(params=1_000, by=0.5)])
        >>> [front.target(9_000, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [9000.0, 5000.0, 5000.0, 1000.0]
        """
        point, start, progress = self._now(start, progress)
        return point.target(start, progress)

    def _now(self, start: float, progress: float) -> tuple[Budget, float, float]:
        """The present budget, the cost that it sets out from, and the share of its span that is done."""
        ends = self.ends
        place = next((place for place, end in enumerate(ends) if progress < end), len(ends) - 1)
        point, begin = self.points[place], ends[place - 1] if place else 0.0
        before = float(getattr(self.points[place - 1], point.kind)) if place else start
        return point, before, (progress - begin) / (ends[place] - begin)
