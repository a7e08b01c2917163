"""`Budget`: a network of a given cost, shared out between its widths by loss per cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import Width
from evolvenet.linalg.spectrum import effective_rank
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import NEGLIGIBLE, PolicyContext, Proposal, check_fields, fewest_units, lowest
from evolvenet.pruning.allocation import energy_curve
from evolvenet.pruning.marginal_analysis import convex, fit_to_cost, loss_at
from evolvenet.pruning.trials import Curve, smallest

KINDS = ("params", "macs", "bytes", "latency")
NEAR = 0.98
"""Share of the budget from which on it holds: widths stay once the cost lies between this and the budget."""
BISECTIONS = 6
"""In the search for the multiply-accumulates whose latency fits."""


@dataclass(frozen=True)
class Budget:
    """Reach a cost by a share of the run, and stay at it; from above by pruning, from below by growing.

    Each width has one curve of losses. Below its present size the loss is −log of the share of energy kept; above it, it is
    negative: −log(1 + `trust` · Δ) with Δ the loss of as many units at the hull's slope just below the present size. Units are
    removed where loss per cost is least and added where it is largest (`fit_to_cost`), so growth of one width may be paid for by
    pruning of another, if it passes the loss test. What stays free is filled without a test, on the way up and from `by`
    on. The cost follows budget + (start − budget)·(1 − t)³, t = progress / by (Zhu and Gupta 2017, "To prune, or not to
    prune", equation 1). From `by` on widths stay where the cost lies within 2 % below the budget, or where no width that may
    grow has room to.

    Args:
        params: parameters of the network at the end; or one of the next three.
        macs: multiply-accumulates a sample.
        bytes: of parameters and buffers.
        latency: seconds of a forward pass on the example inputs, measured on this machine.
        by: share of the run, 0 … 1, at which the budget holds.
        multiple: sizes are multiples of it, for widths that have as many units. `multiple` of `WidthEvolution` and `Evolver`
            counts channels, and holds as well.
        largest_step: largest share of a width's units that is removed in one event, 0 … 1.
        growth: largest share of a width's units that is added in one event, 0 … 1; 0 for none. Down or up to the next multiple a
            width may always go.
        trust: expected gain of a new unit, as a share 0 … 1 of the loss of the width's least direction; below 1 widths stay
            where gain and loss are about the same.
        saturated: a width grows only if its effective rank (Roy and Vetterli 2007) over its size reaches this, 0 … 1.
        certain: least t-statistic of new units in the loss test (see `Threshold`) for growth that is paid for by pruning; widths
            that cannot be tested, for want of gradients, pass. Infinite for no such growth; growth towards a budget above
            the cost is not tested.
        smallest: fewest units that a width keeps.
        lowrank: ranks of layers are in question beside widths: a layer becomes a chain of two factors where that costs less, and
            is whole again where it no longer does. Needs a cost other than latency; `evolvenet.compress` measures that.
        trials: take losses from trials, as `allocate` with batches does: the error of the network's outputs when one width is
            cut and its consumers are fitted anew. Measures effects on the task, and takes longer.
        depth: while the network costs more than it may, residual blocks and their branches are removed whole where the outputs
            then move by at most 0.1 % of their variance; widths and ranks make up the rest.

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
    lowrank: bool = False
    depth: bool = False

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise PolicyError(
                f"Budget: expected one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}. "
                "Take for example Budget(params=12_500)."
            )
        if self.lowrank and self.latency is not None:
            raise PolicyError(
                "Budget: expected params, macs or bytes with lowrank, got latency. evolvenet.compress(latency=…) times chains."
            )
        shares = ("by", "largest_step", "growth", "trust", "saturated")
        check_fields(self, shares, least={given[0]: 0, "multiple": 1, "smallest": 1, "certain": 0})

    @property
    def kind(self) -> str:
        """Which cost is bounded."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def target(self, start: float, progress: float) -> float:
        """The most that the network may cost now.

        Args:
            start: its cost at the beginning of the run.
            progress: share of the run that is done, 0 … 1.
        """
        budget = float(getattr(self, self.kind))
        left = 1 - min(1.0, progress / self.by) if self.by else 0.0
        return budget + (start - budget) * left**3

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        """New sizes with which the network costs at most what it may now; {} once the budget holds."""
        return self.propose_from(context, context.costs.at(self.kind, context.initial), context.progress)

    def block_loss(
        self, context: PolicyContext, path: str, saved: Callable[[str], float], accepted: Callable[[str], float]
    ) -> float:
        """See `evolvenet.policies.base.DepthPolicy`."""
        start = context.costs.at(self.kind, context.initial)
        return self.block_loss_from(context, start, context.progress, accepted)

    def block_loss_from(
        self, context: PolicyContext, start: float, progress: float, accepted: Callable[[str], float]
    ) -> float:
        """As `block_loss`, on the way from a network that cost `start`, of which a share `progress`, 0 … 1, is done."""
        now = context.costs.at(self.kind, {}) - accepted(self.kind)
        return NEGLIGIBLE if now > self.target(start, progress) else -math.inf

    def unreachable(self, context: PolicyContext) -> str | None:
        """Why no widths of a network cost so little, and what to do; None if some do."""
        least = {each.name: fewest_units(each, self.smallest, self._step(each)) for each in context.graph.resizable}
        fewest, budget = context.costs.at(self.kind, least), float(getattr(self, self.kind))
        if fewest <= budget:
            return None
        return (
            f"Budget({self.kind}={getattr(self, self.kind)}) cannot be reached: with every width at its smallest the network has "
            f"{self._amount(fewest)}. Take a larger budget, a smaller `smallest` or `multiple`, or let more widths change: "
            "print(evolvenet.trace(model, inputs)) gives the reason for each that keeps its size."
        )

    def missed(self, context: PolicyContext) -> str | None:
        """By how much a network misses the budget at the end of a run, and what to do; None if it holds."""
        now, budget = context.costs.at(self.kind, {}), float(getattr(self, self.kind))
        below = now < NEAR * budget and context.costs.at(self.kind, context.initial) < NEAR * budget
        if now <= budget and not below:
            return None
        return (
            f"The run has ended at {self._amount(now)}, {'below' if below else 'above'} its budget of {self._amount(budget)}. "
            "Give it more or larger steps on the way (every_n_steps, largest_step, growth), or a smaller `by`; skipped events "
            "have a warning of their own."
        )

    def _amount(self, cost: float) -> str:
        return f"{cost:.3g} s of latency" if self.kind == "latency" else f"{cost:,.0f} {self.kind}"

    def propose_from(self, context: PolicyContext, start: float, progress: float) -> dict[str, Proposal]:
        """As `propose`, on the way from a network that cost `start`, of which a share `progress`, 0 … 1, is done."""
        target, final = self.target(start, progress), progress >= self.by
        now, fills = context.costs.at(self.kind, {}), final or start < target
        if final and NEAR * target <= now <= target:
            return {}
        if now < target and not (fills and self._room(context, target)):
            return {}
        return self._proposals(context, target, fills and now < target)

    def _proposals(self, context: PolicyContext, target: float, fills: bool) -> dict[str, Proposal]:
        """Proposals for a target above the cost, which is filled if `fills`, or below it."""
        known, graph = context.statistics, context.graph
        tried = context.trials() if self.trials else {}
        tops = {name: self._largest(width, graph.widths[name]) for name, width in known.items()}
        tested = self._tested(context, tops) if context.costs.at(self.kind, {}) >= target else {}
        curves = {name: self._curve(width, tried.get(name), tops[name]) for name, width in known.items()}
        start = {name: tested.get(name, width.size) for name, width in known.items()}
        ends = tops if fills else start
        options = {name: self._options(width, graph.widths[name], ends[name]) for name, width in known.items()}
        # A rank of a whole layer saves nothing until it is below break-even.
        ahead = {name for name in known if not context.graph.widths[name].ties}
        sizes = self._fitted(context.costs, curves, options, start, target, ahead)
        cost = context.costs.at(self.kind, sizes)
        return {
            name: Proposal(size, self._reason(loss_at(curves[name], size), cost, target))
            for name, size in sizes.items()
            if size != known[name].size
        }

    def _room(self, context: PolicyContext, target: float) -> bool:
        """Whether any width could have its next size and the network still cost at most the target."""
        return any(
            size > width.size and context.costs.at(self.kind, {name: size}) <= target
            for name, width in context.statistics.items()
            for size in self._options(
                width, context.graph.widths[name], self._largest(width, context.graph.widths[name])
            )
        )

    def _tested(self, context: PolicyContext, tops: Mapping[str, int]) -> dict[str, int]:
        """Of the widths that could grow to their largest size, those that pass the loss test or cannot be tested."""
        if math.isinf(self.certain):
            return {}
        larger = {name: size for name, size in tops.items() if size > context.statistics[name].size}
        found = context.loss_tests(larger) if larger and self.certain else {}
        return {
            name: size for name, size in larger.items() if name not in found or found[name].t_statistic >= self.certain
        }

    def _curve(self, width: WidthStatistics, tried: Curve | None, top: int) -> Curve:
        """The loss at every size: from trials or energies up to the present size, negative above it."""
        hull = convex(tried or energy_curve(width.spectrum))
        if top == width.size:
            return hull
        (low, above), (high, below) = hull[-2:]
        least = (above - below) / (high - low)
        return [*hull, (top, below - math.log1p(self.trust * least * (top - width.size)))]

    def _step(self, width: Width) -> int:
        """The units of which its sizes are multiples."""
        return math.lcm(self.multiple, width.step)

    def _largest(self, statistics: WidthStatistics, width: Width) -> int:
        """The size up to which a width may grow in one event."""
        may = self.growth and statistics.growable
        if not may or effective_rank(statistics.spectrum) < self.saturated * width.size:
            return width.size
        step = self._step(width)
        largest = width.size + max(math.floor(self.growth * width.size), step - width.size % step)
        # Copies of all units, where new ones can be nothing else, are more than the share by which a width may grow.
        return width.size if width.step_to(largest) > step else largest

    def _options(self, statistics: WidthStatistics, width: Width, top: int) -> list[int]:
        """Sizes that a width may take now, ascending."""
        size, step = statistics.size, self._step(width)
        if size < step:
            return [size]
        least = max(lowest(size, self.largest_step, step), smallest(width), min(self.smallest, size))
        return [each for each in range(step, top + 1, step) if each >= least] or [size]

    def _fitted(
        self,
        costs: Costs,
        curves: Mapping[str, Curve],
        options: Mapping[str, Sequence[int]],
        start: Mapping[str, int],
        target: float,
        ahead: Collection[str],
    ) -> dict[str, int]:
        """The options with the least loss whose cost fits.

        For a latency, those with the most multiply-accumulates of which it fits: a bisection measures a few candidates.
        """
        if self.kind != "latency":
            return fit_to_cost(curves, options, start, partial(costs.at, self.kind), target, ahead)
        low = costs.at("macs", {name: sizes[0] for name, sizes in options.items()})
        high = costs.at("macs", {name: sizes[-1] for name, sizes in options.items()})
        best = fit_to_cost(curves, options, start, partial(costs.at, "macs"), low)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            sizes = fit_to_cost(curves, options, start, partial(costs.at, "macs"), middle)
            if costs.at("latency", sizes) <= target:
                best, low = sizes, middle
            else:
                high = middle
        return best

    def _reason(self, loss: float, cost: float, target: float) -> str:
        what = "the outputs' variance" if self.trials else "−log energy"
        loses = f"{'loses' if loss > 0 else 'gains'} {abs(loss):.2g} of {what}"
        if self.kind == "latency":
            return f"{loses}: {cost:.3g} s of {target:.3g} s allowed now"
        return f"{loses}: {cost:,.0f} {self.kind} of {target:,.0f} allowed now"
