"""`Budget`: a network of a given cost, its widths shared out by what each unit is worth for what it costs."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.spectrum import effective_rank, energy_shares
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_spectra import WidthStatistics
from evolvenet.policies.base import Policy, PolicyContext, Proposal, check_fields
from evolvenet.pruning.allocation import Curve, convex, loss_at, smallest

KINDS = ("params", "macs", "bytes", "latency")
NEAR = 0.98
"""Share of the budget from which on widths have settled, once it holds for good."""
_LEAST = 1e-12
_STRIDES = 32
"""Steps in which a width may go at most from its largest to its smallest size of one event."""
_SEARCH = 6
"""Halvings in the search for the multiply-accumulates whose latency fits."""


@dataclass(frozen=True)
class Budget:
    """Reach a cost by a share of the run, and stay at it; from above by pruning, from below by growing.

    Every width has one signed curve: −log of the share of energy kept where it shrinks, and where it grows as much again for
    each new unit as its least direction carries, times `trust`. Units go where they are worth least for what they cost, and
    come where they are worth most, so growth in one place may be paid by pruning in another, if the loss asks for it; what
    is free is filled without asking, on the way up and from `by` on. The cost follows budget + (start − budget)·(1 − t)³,
    t = progress / by (Zhu and Gupta 2017). From `by` on widths stay where the cost lies within 2 % below the budget, or where
    no width that may grow has room to.

    Args:
        params: parameters of the network at the end; or one of the next three.
        macs: multiply-accumulates a sample.
        bytes: of parameters and buffers.
        latency: seconds of a forward pass on the example inputs, measured on this machine.
        by: share of the run, 0 … 1, at which the budget holds.
        multiple: sizes are multiples of it, for widths that have as many units.
        largest_step: largest share of a width's units that goes in one event, 0 … 1.
        growth: largest share of a width's units that comes in one event, 0 … 1; 0 for none. Up to the next multiple may always
            come.
        trust: what a new unit is taken to be worth, 0 … 1 of the least direction; below 1 there is a dead band.
        saturated: a width grows only if its effective rank (Roy and Vetterli 2007) over its size reaches this, 0 … 1.
        certain: standard errors by which the loss must be seen to fall for a growth that others pay for, where its gradients
            are known (see `Threshold`); infinite for no such growth. Below the budget growth needs no such reason: it was
            asked for.
        smallest: fewest units that a width keeps.
        trials: losses are not −log of energies but measured, as by `allocate` with batches: how far the network's outputs
            move if one width is cut and its readers make up for it. Sees what a unit is worth to the task, and takes longer.

    Raises:
        PolicyError: for a value outside its range, or not exactly one cost.

    >>> Budget(params=12_500, by=0.6).target(start=100_000, progress=0.3)
    23437.5
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None
    by: float = 0.6
    multiple: int = 1
    largest_step: float = 0.5
    growth: float = 0.25
    trust: float = 0.5
    saturated: float = 0.7
    certain: float = 2.0
    smallest: int = 2
    trials: bool = False

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise PolicyError(
                f"Budget: expected one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}. "
                "Take for example Budget(params=12_500)."
            )
        shares = ("by", "largest_step", "growth", "trust", "saturated")
        check_fields(self, shares, least={given[0]: 0, "multiple": 1, "smallest": 1, "certain": 0})

    @property
    def kind(self) -> str:
        """Which cost is bounded."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def target(self, start: float, progress: float) -> float:
        """What the network may cost now.

        Args:
            start: what it cost at the beginning of the run.
            progress: share of the run that is done, 0 … 1.
        """
        budget = float(getattr(self, self.kind))
        left = 1 - min(1.0, progress / self.by) if self.by else 0.0
        return budget + (start - budget) * left**3

    def at(self, moment: PolicyContext) -> Policy | None:
        """The policy for one moment of a run; None once the budget holds."""
        return self.on_the_way(moment, moment.costs.at(self.kind, moment.initial), moment.progress)

    def on_the_way(self, moment: PolicyContext, start: float, progress: float) -> Policy | None:
        """The policy for a share `progress` of the way, 0 … 1, from a network that cost `start`."""
        target, final = self.target(start, progress), progress >= self.by
        if final and NEAR * target <= moment.costs.at(self.kind, {}) <= target:
            return None
        return _Now(self, moment, target, fills=final or start < target)


@dataclass(frozen=True)
class _Now:
    """A budget at one moment."""

    budget: Budget
    moment: PolicyContext
    target: float
    fills: bool
    """Whether new units fill what is free; on the way down they would soon be cut again."""

    @property
    def costs(self) -> Costs:
        """What other sizes would cost."""
        return self.moment.costs

    def propose(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> dict[str, Proposal]:
        """New sizes with which the network costs what it may now, as near as one event can come."""
        now = self.costs.at(self.budget.kind, {})
        if now < self.target and not (self.fills and self._room(measures, graph)):
            return {}
        tried = self.moment.trials() if self.budget.trials else {}
        tops = {name: self._most(measure) for name, measure in measures.items()}
        paid = self._paid(measures, tops) if now >= self.target else {}
        hulls = {name: self._curve(measure, tried.get(name), tops[name]) for name, measure in measures.items()}
        most = {name: paid.get(name, measure.size) for name, measure in measures.items()}
        ends = tops if self.fills and now < self.target else most
        grids = {name: self._grid(measure, graph, ends[name]) for name, measure in measures.items()}
        if self.budget.kind == "latency":
            sizes = self._fitting_latency(hulls, grids, most)
        else:
            sizes = self._fitting(hulls, grids, most, self.budget.kind, self.target)
        cost = self.costs.at(self.budget.kind, sizes)
        found = {}
        for name, size in sizes.items():
            if size != measures[name].size:
                loss = loss_at(hulls[name], size)
                found[name] = Proposal(size, _reason(loss, self.budget.trials, self.budget.kind, cost, self.target))
        return found

    def _room(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> bool:
        """Whether any width could have its next size and the network still cost what it may."""
        larger = (
            (name, size)
            for name, measure in measures.items()
            for size in self._grid(measure, graph, self._most(measure))
        )
        return any(
            size > measures[name].size and self.costs.at(self.budget.kind, {name: size}) <= self.target
            for name, size in larger
        )

    def _paid(self, measures: Mapping[str, WidthStatistics], tops: Mapping[str, int]) -> dict[str, int]:
        """How large the widths may become for which others pay: those of whose growth the loss is certain."""
        if math.isinf(self.budget.certain):
            return {}
        larger = {name: size for name, size in tops.items() if size > measures[name].size}
        known = self.moment.evidence(larger) if larger and self.budget.certain else {}
        return {
            name: size
            for name, size in larger.items()
            if name not in known or known[name].t_statistic >= self.budget.certain
        }

    def _curve(self, measure: WidthStatistics, tried: Curve | None, top: int) -> Curve:
        shares = energy_shares(measure.spectrum).sort(descending=True).values.cumsum(0).clamp(_LEAST, 1).tolist()
        down = tried or [(0, -math.log(_LEAST)), *((size, -math.log(share)) for size, share in enumerate(shares, 1))]
        hull = convex(down)
        if top == measure.size:
            return hull
        (low, above), (high, below) = hull[-2:]
        least = (above - below) / (high - low)
        return [*hull, (top, below - math.log1p(self.budget.trust * least * (top - measure.size)))]

    def _most(self, measure: WidthStatistics) -> int:
        growth = math.floor(self.budget.growth * measure.size)
        may = self.budget.growth and measure.growable
        if not may or effective_rank(measure.spectrum) < self.budget.saturated * measure.size:
            return measure.size
        unit = self.budget.multiple
        return measure.size + max(growth, unit - measure.size % unit)

    def _grid(self, measure: WidthStatistics, graph: WidthGraph, top: int) -> list[int]:
        """Sizes that the width may take now, ascending."""
        width = graph.widths[measure.width]
        least = max(measure.size - math.floor(self.budget.largest_step * measure.size), smallest(width))
        least = max(least, min(self.budget.smallest, measure.size))
        unit = self.budget.multiple
        if measure.size < unit:
            return [measure.size]
        sizes = [size for size in range(unit, top + 1, unit) if size >= least]
        # Between two multiples, where one event cannot reach the next one.
        return sizes or [measure.size]

    def _fitting(
        self,
        hulls: Mapping[str, Curve],
        grids: Mapping[str, list[int]],
        most: Mapping[str, int],
        kind: str,
        target: float,
    ) -> dict[str, int]:
        """From the `most` that each may have take away what is worth least, until the cost fits; then fill what is left."""
        places = {name: max(0, bisect_right(grid, most[name]) - 1) for name, grid in grids.items()}

        def cost(changed: Mapping[str, int]) -> float:
            chosen = {**places, **changed}
            return self.costs.at(kind, {name: grids[name][place] for name, place in chosen.items()})

        def price(name: str) -> tuple[float, str, int] | None:
            place = places[name] - min(places[name], max(1, len(grids[name]) // _STRIDES))
            if place == places[name]:
                return None
            lost = loss_at(hulls[name], grids[name][place]) - loss_at(hulls[name], grids[name][places[name]])
            # What is saved beyond the target is worth nothing: the last cut takes no more than it must.
            return lost / max(min(now - cost({name: place}), now - target), _LEAST), name, place

        now = cost({})
        queue = [entry for entry in map(price, places) if entry is not None]
        heapq.heapify(queue)
        while now > target and queue:
            _, name, _ = heapq.heappop(queue)
            # Prices only rise while others shrink: what is still the least after a second look is the least.
            entry = price(name)
            if entry is not None and queue and entry > queue[0]:
                heapq.heappush(queue, entry)
            elif entry is not None:
                places[name] = entry[2]
                now = cost({})
                heapq.heappush(queue, (entry[0], name, entry[2]))
        return self._filled(hulls, grids, kind, target, places)

    def _filled(
        self,
        hulls: Mapping[str, Curve],
        grids: Mapping[str, list[int]],
        kind: str,
        target: float,
        places: dict[str, int],
    ) -> dict[str, int]:
        """Give back single units, those first that are worth most for their cost, while the cost still fits."""
        while True:
            sizes = {name: grids[name][place] for name, place in places.items()}
            now, worth = self.costs.at(kind, sizes), []
            for name, place in places.items():
                if place + 1 < len(grids[name]):
                    more = self.costs.at(kind, {**sizes, name: grids[name][place + 1]})
                    gain = loss_at(hulls[name], sizes[name]) - loss_at(hulls[name], grids[name][place + 1])
                    if more <= target:
                        worth.append((gain / max(more - now, _LEAST), name))
            if not worth:
                return sizes
            places[max(worth)[1]] += 1

    def _fitting_latency(
        self, hulls: Mapping[str, Curve], grids: Mapping[str, list[int]], most: Mapping[str, int]
    ) -> dict[str, int]:
        """The most multiply-accumulates whose measured latency fits: the latency of each candidate is measured."""
        low = self.costs.at("macs", {name: grid[0] for name, grid in grids.items()})
        high = self.costs.at("macs", {name: grid[-1] for name, grid in grids.items()})
        best = self._fitting(hulls, grids, most, "macs", low)
        for _ in range(_SEARCH):
            middle = (low + high) / 2
            sizes = self._fitting(hulls, grids, most, "macs", middle)
            if self.costs.at("latency", sizes) <= self.target:
                best, low = sizes, middle
            else:
                high = middle
        return best


def _reason(loss: float, tried: bool, kind: str, cost: float, target: float) -> str:
    what = "the outputs' variance" if tried else "−log energy"
    worth = f"{'gives up' if loss > 0 else 'hopes for'} {abs(loss):.2g} of {what}"
    if kind == "latency":
        return f"{worth}: {cost:.3g} s of {target:.3g} s allowed now"
    return f"{worth}: {cost:,.0f} {kind} of {target:,.0f} allowed now"
