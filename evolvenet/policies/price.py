"""`Price`: a width shrinks or grows until the loss of its last units equals the price of their cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from evolvenet.errors import PolicyError
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import PolicyContext, Proposal, check_fields, enlarged, lowest
from evolvenet.policies.budget import KINDS
from evolvenet.pruning.marginal_analysis import convex, loss_at
from evolvenet.pruning.trials import Curve, smallest

THOUSAND = 1000
"""Units of cost that a price is for: the price of a single parameter would be hard to read."""


@dataclass(frozen=True)
class Price:
    """Prune units whose loss per cost is below a price, grow widths whose last units' is above it.

    The loss of units is measured by trials: the error of the network's outputs when they are removed and their consumers fitted
    anew, as a share of the outputs' variance (`evolvenet.allocate`). The loss of a width's last units falls with its size, so
    a width that starts too wide and one that starts too narrow both end where it is about the price: the size depends on
    the task, not on the start. Between the price and `band` times the price a width stays.

    Args:
        price: loss, as a share of the outputs' variance, per thousand parameters (or other units of cost), above 0.
        kind: of cost: "params", "macs" (multiply-accumulates a sample) or "bytes".
        band: a width grows where its last units' loss per cost is above so many times the price, 1 or more.
        largest_step: largest share of a width's units that is removed in one event, 0 … 1.
        most: largest sum of the losses of all cuts in one event, 0 … 1.
        growth: units added at a growth as a share of the size, 0 … 1, rounded up.
        cooldown: events for which a width that grew is not pruned and one that was pruned does not grow.
        rise: share of the run over which the price rises to its full height, by the same factor in equal times, 0 … 1; 0 for
            none. While it is low, a narrow start becomes wide, and is cut down at the end as a wide start is.
        low: the price at the beginning of the rise, as a share of `price`, above 0, at most 1.
        settle: share of the run, 0 … 1, over which steps become smaller, until widths stay; 0 for steps of one size throughout.
        smallest: fewest units that a width keeps.
        lowrank: ranks of layers are in question beside widths, see `Budget`. A layer that is whole becomes a chain where all
            that it loses then is below the price of all that it saves.
        depth: residual blocks and their branches are removed whole where what is lost is below the price of what is saved, and
            at most `most` in one event.

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
    lowrank: bool = False
    depth: bool = False

    def __post_init__(self) -> None:
        least = {"price": math.ulp(0.0), "low": math.ulp(0.0), "band": 1, "cooldown": 0, "smallest": 1}
        check_fields(self, shares=("largest_step", "most", "growth", "rise", "low", "settle"), least=least)
        if self.kind not in KINDS or self.kind == "latency":
            raise PolicyError(f"Price: expected kind to be params, macs or bytes, got {self.kind!r}.")

    def now(self, progress: float) -> float:
        """The price after a share of the run, 0 … 1."""
        risen = min(1.0, progress / self.rise) if self.rise else 1.0
        return self.price * self.low ** (1 - risen)

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        """New sizes for the widths that change: cuts by rising loss, while their sum is at most `most`; then growths."""
        pace = self._pace(context.progress)
        if not pace:
            return {}
        step, known = self.largest_step * pace, context.statistics
        tried = context.trials(shares=(1 - step / 2, 1 - step))
        curves = {name: convex(tried[name]) for name in known if name in tried}
        cuts = {name: self._cut(context, known[name], curve) for name, curve in curves.items()}
        losses = {name: loss_at(curve, cuts[name]) for name, curve in curves.items()}
        found: dict[str, Proposal] = {}
        left = self.most
        for name in sorted(curves, key=losses.__getitem__):
            if cuts[name] < known[name].size and losses[name] <= left:
                left -= losses[name]
                found[name] = Proposal(cuts[name], self._why(context, known[name], cuts[name], losses[name]))
        for name, curve in curves.items():
            if name not in found:
                found |= self._grown(context, known[name], curve)
        return found

    def block_loss(
        self, context: PolicyContext, path: str, saved: Callable[[str], float], accepted: Callable[[str], float]
    ) -> float:
        """See `evolvenet.policies.base.DepthPolicy`."""
        return min(self.most, self._charge(context, max(0.0, saved(self.kind))))

    def _pace(self, progress: float) -> float:
        """The length of steps now, as a share of their length at the beginning."""
        return max(0.0, 1 - progress / self.settle) if self.settle else 1.0

    def _cut(self, context: PolicyContext, width: WidthStatistics, curve: Curve) -> int:
        """The smallest size with every unit above it below the price, or the next one that the width may have above that."""
        size, sizes = width.size, context.graph.widths[width.width]
        slowest = lowest(size, self.largest_step * self._pace(context.progress), sizes.step)
        least = max(self.smallest, smallest(sizes), min(slowest, size - 1))
        if width.last_change > 0 and self._cools_down(width):
            return size
        if not sizes.ties:
            size = self._first_rank(context, width, curve, least)
        while least < size < width.size or (sizes.ties and size > least):
            loss = loss_at(curve, size - 1) - loss_at(curve, size)
            if loss >= self._charge(context, self._saved(context.costs, width, size - 1, size)):
                break
            size -= 1
        return sizes.rounded(size)

    def _first_rank(self, context: PolicyContext, width: WidthStatistics, curve: Curve, least: int) -> int:
        """The largest rank with which a whole layer's loss is below the price of what it saves; else its present size."""
        for size in range(width.size - 1, least - 1, -1):
            if loss_at(curve, size) < self._charge(context, self._saved(context.costs, width, size, width.size)):
                return size
        return width.size

    def _grown(self, context: PolicyContext, width: WidthStatistics, curve: Curve) -> dict[str, Proposal]:
        if not width.growable or (width.last_change < 0 and self._cools_down(width)) or width.size == 1:
            return {}
        below = width.size - 1
        loss, saved = loss_at(curve, below), self._saved(context.costs, width, below, width.size)
        size = enlarged(width, self.growth * self._pace(context.progress))
        size = context.graph.widths[width.width].rounded(size)
        if size == width.size or loss <= self.band * self._charge(context, saved):
            return {}
        return {width.width: Proposal(size, self._why(context, width, below, loss))}

    def _cools_down(self, width: WidthStatistics) -> bool:
        return width.events_since_change <= self.cooldown

    def _charge(self, context: PolicyContext, cost: float) -> float:
        """The present price of a cost."""
        return self.now(context.progress) * cost / THOUSAND

    def _saved(self, costs: Costs, width: WidthStatistics, low: int, high: int) -> float:
        """The difference in cost between two sizes of one width."""
        return max(0.0, costs.at(self.kind, {width.width: high}) - costs.at(self.kind, {width.width: low}))

    def _why(self, context: PolicyContext, width: WidthStatistics, size: int, loss: float) -> str:
        saved = self._saved(context.costs, width, size, width.size)
        each = loss / saved * THOUSAND if saved else math.inf
        gone = width.size - size
        return (
            f"{gone} unit{'s hold' if gone > 1 else ' holds'} {each:.2g} of the outputs' variance a thousand {self.kind} "
            f"(price {self.now(context.progress):.2g})"
        )
