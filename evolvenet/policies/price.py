"""`Price`: every unit must be worth its parameters; a width shrinks or grows until its last units just are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_spectra import WidthStatistics
from evolvenet.policies.base import Policy, PolicyContext, Proposal, check_fields, enlarged
from evolvenet.policies.budget import KINDS
from evolvenet.pruning.allocation import Curve, convex, loss_at, smallest

THOUSAND = 1000
"""What a price is for, as that of a single parameter would be hard to read."""


@dataclass(frozen=True)
class Price:
    """Prune units that are worth less than the price of what they cost, grow widths whose units are worth more.

    What units are worth is measured: how far the network's outputs move if they go and their readers make up for it, as a
    share of the outputs' variance (`evolvenet.allocate`). The last units of a width are worth less the more there are, so a
    width that starts too wide and one that starts too narrow both end where its last units are worth about the price: the
    size depends on the task, not on the start. Between the price and `band` times the price a width stays.

    Args:
        price: share of the outputs' variance that a thousand parameters (or other units of cost) must be worth, above 0.
        kind: what is paid for, "params", "macs" (then a thousand multiply-accumulates a sample) or "bytes".
        band: a width grows where its last units are worth more than so many times the price, 1 or more.
        largest_step: largest share of a width's units that goes in one event, 0 … 1.
        most: largest share of the outputs' variance that all cuts of one event may be worth together, 0 … 1.
        growth: units added at a growth as a share of the size, 0 … 1, rounded up.
        cooldown: events for which a width that grew is not pruned and one that was pruned does not grow.
        rise: share of the run over which the price rises to its full height, by the same factor in equal times, 0 … 1; 0 for
            none. While it is low a narrow start becomes wide enough that it is cut down in the end, as a wide one is.
        low: share of the price that is asked for at the beginning of the rise, above 0, at most 1.
        settle: share of the run, 0 … 1, over which steps become smaller, until widths stay; 0 for steps of one size throughout.
        smallest: fewest units that a width keeps.

    Raises:
        PolicyError: for a value outside its range.

    >>> policy = Price(price=1e-3, rise=0.4, low=0.25)
    >>> [round(policy.now(progress), 6) for progress in (0, 0.2, 0.4, 1)]
    [0.00025, 0.0005, 0.001, 0.001]
    """

    price: float
    kind: str = "params"
    band: float = 1.5
    largest_step: float = 0.25
    most: float = 0.1
    growth: float = 0.15
    cooldown: int = 2
    rise: float = 0.4
    low: float = 0.2
    settle: float = 1.0
    smallest: int = 2

    def __post_init__(self) -> None:
        least = {"price": math.ulp(0.0), "low": math.ulp(0.0), "band": 1, "cooldown": 0, "smallest": 1}
        check_fields(self, shares=("largest_step", "most", "growth", "rise", "low", "settle"), least=least)
        if self.kind not in KINDS or self.kind == "latency":
            raise PolicyError(f"Price: expected kind to be params, macs or bytes, got {self.kind!r}.")

    def now(self, progress: float) -> float:
        """The price after a share of the run, 0 … 1."""
        risen = min(1.0, progress / self.rise) if self.rise else 1.0
        return self.price * self.low ** (1 - risen)

    def at(self, moment: PolicyContext) -> Policy:
        """The policy for one moment of a run."""
        return _Now(self, moment)


@dataclass(frozen=True)
class _Now:
    """A price at one moment."""

    policy: Price
    moment: PolicyContext

    @property
    def costs(self) -> Costs:
        """What other sizes would cost."""
        return self.moment.costs

    @property
    def _pace(self) -> float:
        return max(0.0, 1 - self.moment.progress / self.policy.settle) if self.policy.settle else 1.0

    def _asked(self, saved: float) -> float:
        """What units that cost so much have to be worth now."""
        return self.policy.now(self.moment.progress) * saved / THOUSAND

    def propose(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> dict[str, Proposal]:
        """New sizes for the widths that should change: the cheapest cuts first, as many as may go at once; then growths."""
        if not self._pace:
            return {}
        step = self.policy.largest_step * self._pace
        tried = self.moment.trials(shares=(1 - step / 2, 1 - step))
        hulls = {name: convex(tried[name]) for name in measures if name in tried}
        cuts = {name: self._cut(measures[name], hull, graph) for name, hull in hulls.items()}
        found: dict[str, Proposal] = {}
        left = self.policy.most
        for name in sorted(hulls, key=lambda each: loss_at(hulls[each], cuts[each])):
            worth, size = loss_at(hulls[name], cuts[name]), measures[name].size
            if cuts[name] < size and worth <= left:
                left -= worth
                found[name] = Proposal(cuts[name], self._why(name, measures[name], cuts[name], worth))
        for name, hull in hulls.items():
            if name not in found:
                found |= self._grown(measures[name], hull)
        return found

    def _cut(self, measure: WidthStatistics, hull: Curve, graph: WidthGraph) -> int:
        """The smallest size whose last units go for less than their price."""
        policy = self.policy
        least = max(policy.smallest, smallest(graph.widths[measure.width]))
        least = max(least, measure.size - max(1, math.floor(policy.largest_step * self._pace * measure.size)))
        if measure.last_change > 0 and self._rests(measure):
            return measure.size
        size = measure.size
        while size - 1 >= least:
            worth = loss_at(hull, size - 1) - loss_at(hull, size)
            if worth >= self._asked(self._saved(measure, size - 1, size)):
                break
            size -= 1
        return size

    def _grown(self, measure: WidthStatistics, hull: Curve) -> dict[str, Proposal]:
        if not measure.growable or (measure.last_change < 0 and self._rests(measure)):
            return {}
        below = measure.size - 1
        if below <= 0:
            return {}
        worth, saved = loss_at(hull, below), self._saved(measure, below, measure.size)
        size = enlarged(measure, self.policy.growth * self._pace)
        if size == measure.size or worth <= self.policy.band * self._asked(saved):
            return {}
        return {measure.width: Proposal(size, self._why(measure.width, measure, below, worth))}

    def _rests(self, measure: WidthStatistics) -> bool:
        return measure.events_since_change <= self.policy.cooldown

    def _saved(self, measure: WidthStatistics, low: int, high: int) -> float:
        costs = (self.costs.at(self.policy.kind, {measure.width: size}) for size in (high, low))
        return max(0.0, next(costs) - next(costs))

    def _why(self, name: str, measure: WidthStatistics, size: int, worth: float) -> str:
        saved = self._saved(measure, size, measure.size)
        each = worth / saved * THOUSAND if saved else math.inf
        gone = measure.size - size
        return (
            f"{gone} unit{'s are' if gone > 1 else ' is'} worth {each:.2g} of the outputs' variance a thousand "
            f"{self.policy.kind} (price {self.policy.now(self.moment.progress):.2g})"
        )
