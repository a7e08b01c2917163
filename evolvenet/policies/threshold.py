"""`Threshold`: prune the directions without energy, grow the widths that are saturated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.loss_test import Evidence
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import PolicyContext, Proposal, check_fields, enlarged, fewest_units, lowest


def units_above(energies: Sequence[float], share: float) -> int:
    """The most units of which each has at least a share of the mean energy, which is 1 over their number.

    Units go from the last to the first while the last one has less. Among the units that then stay there is none that would go:
    a second time gives the same number.

    Args:
        energies: of each unit, descending, as a share of the variance of the consumers' outputs.
        share: of the mean, 0 … 1.

    >>> units_above([0.7, 0.25, 0.01, 0.005], share=0.05)
    2
    >>> units_above([0.7, 0.25], share=0.05)
    2
    """
    count = len(energies)
    while count and (energies[count - 1] <= 0 or energies[count - 1] * count < share):
        count -= 1
    return count


@dataclass(frozen=True)
class Threshold:
    """Prune units without energy, grow saturated widths whose new units reduce the loss.

    The energy of a unit is what it adds to the outputs of the layers that consume it, as a share of their variance: the part
    of it that the units before it do not predict (`WidthStatistics.energies`). A width shrinks to the units of which each
    adds at least the share `prune` of the mean, 1 over their number. Where these are at least the share `grow` of its units,
    it is saturated: it is not pruned, unless it was a moment ago, and grows if it passes the loss test, which is that the
    t-statistic of the loss's decrease by new units, on samples that they were not fitted on, is at least `certain`
    (`evolvenet.growth.loss_test`).

    Where the sizes end depends little on the number of events. The energies of the units that stay are the same when the
    others have gone, so a second event finds nothing more to prune; they are averaged over a span of the run; and the most that
    is changed at once depends on the share of the run since the last change. Widths grow early and are pruned late.

    Args:
        prune: share of the mean energy below which a unit is removed, 0 … 1.
        grow: share of its units, 0 … 1, that have more energy than that in a width that grows.
        largest_step: largest share of a width's units that is removed within `cooldown`, 0 … 1.
        growth: units added at a growth as a share of the size, 0 … 1, rounded up; 0 for never.
        start: share of the run, 0 … 1, before which no width is pruned: the spectra of a network that has hardly been trained
            change fast.
        settle: share of the run, 0 … 1, after which no width grows.
        cooldown: share of the run, 0 … 1. Widths are tested for growth once in it; one that grew is not pruned, and one that
            was pruned does not grow, for so long, twice as long after each reversal.
        smallest: fewest units that a width keeps.
        certain: least t-statistic in the loss test; 0 to go by the energies alone, as where the loss's gradients are not
            known. At 4, one of 30,000 tests is passed by chance.
        max_parameters: growth that would take the network above it is left out, and while the network is above it
            and nothing is left below `prune`, `prune` is doubled until a width shrinks; None for no limit.
        depth: residual blocks and their branches are removed whole, from `start` on, where the outputs then move by at most the
            share `prune` of their variance.

    Where the length of the run is unknown (`Evolver.step` without `progress`), widths may shrink and grow at every event, and an
    event counts for a twentieth of the run.

    Raises:
        PolicyError: for a value outside its range.

    >>> from torch import nn, zeros
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), zeros(1, 4))
    >>> width = WidthStatistics("0", 3, spectrum=(2.0, 1.0, 0.1), events_since_change=9, growable=True)
    >>> context = PolicyContext(graph, progress=0.5, initial=graph.sizes, measure=lambda: {"0": width})
    >>> Threshold().propose(context)["0"]
    Proposal(size=2, reason='1 unit has less than 1.0 % of the mean energy: 0.4 %')
    """

    prune: float = 0.01
    grow: float = 0.95
    largest_step: float = 0.5
    growth: float = 0.25
    start: float = 0.25
    settle: float = 0.5
    cooldown: float = 0.1
    smallest: int = 2
    certain: float = 4.0
    max_parameters: int | None = None
    depth: bool = False

    def __post_init__(self) -> None:
        limit = {} if self.max_parameters is None else {"max_parameters": 1}
        shares = ("prune", "grow", "largest_step", "growth", "start", "settle", "cooldown")
        check_fields(self, shares=shares, least={"smallest": 1, "certain": 0, **limit})

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        """New sizes for the widths that change; prunings first, then growths, the most saturated first.

        Raises:
            SpectrumError: for a spectrum with negative or NaN values.
        """
        known, graph = context.statistics, context.graph
        saturation = {name: units_above(width.energies, self.prune) / width.size for name, width in known.items()}
        saturated = [name for name in known if saturation[name] >= self.grow]
        found: dict[str, Proposal] = {}
        if context.previous is None or context.progress >= self.start:
            # One that is on its way down goes on to where it is going: else many small steps would stop short of one large one.
            due = {name: each for name, each in known.items() if name not in saturated or self._is_shrinking(each)}
            found = self._shrinks(due, context, self.prune)
            if not found and self.max_parameters is not None and graph.parameters > self.max_parameters:
                return self._shrink_anyway(context)
        return {
            **found,
            **self._growths(context, [name for name in saturated if self._grows(context)], saturation, found),
        }

    def block_loss(
        self, context: PolicyContext, path: str, saved: Callable[[str], float], accepted: Callable[[str], float]
    ) -> float:
        """See `evolvenet.policies.base.DepthPolicy`; before `start` not even what is zero, which may not be trained yet."""
        return self.prune if context.previous is None or context.progress >= self.start else -math.inf

    def _grows(self, context: PolicyContext) -> bool:
        """Whether widths may grow at this event: at the first one in every `cooldown` of the run, until `settle`."""
        if context.previous is None or not self.cooldown:
            return context.previous is None or context.progress <= self.settle
        number, before = (math.floor(share / self.cooldown + 1e-9) for share in (context.progress, context.previous))
        return number > before and context.progress <= self.settle

    def _growths(
        self,
        context: PolicyContext,
        saturated: Sequence[str],
        saturation: Mapping[str, float],
        found: Mapping[str, Proposal],
    ) -> dict[str, Proposal]:
        """The growths beside the prunings that were found."""
        known, graph = context.statistics, context.graph
        growths: dict[str, Proposal] = {}
        sizes = {name: proposal.size for name, proposal in found.items()}
        larger = {name: graph.widths[name].rounded(self._larger(known[name])) for name in saturated}
        larger = {name: size for name, size in larger.items() if size > known[name].size}
        larger = {name: size for name, size in larger.items() if self._fits(graph, {**sizes, name: size})}
        tests = context.loss_tests(larger) if larger and self.certain else {}
        for name in sorted(larger, key=lambda name: -saturation[name]):
            passed = name not in tests or tests[name].t_statistic >= self.certain
            if passed and self._fits(graph, {**sizes, name: larger[name]}):
                sizes[name] = larger[name]
                growths[name] = Proposal(larger[name], self._why(known[name], tests.get(name)))
        return growths

    def unreachable(self, context: PolicyContext) -> str | None:
        """Why no widths of a network have so few parameters, and what to do; None if some do, or without a limit."""
        least = {each.name: fewest_units(each, self.smallest, each.step) for each in context.graph.resizable}
        fewest = context.graph.proposed_parameters(least)
        if self.max_parameters is None or fewest <= self.max_parameters:
            return None
        return (
            f"Threshold(max_parameters={self.max_parameters}) cannot be reached: with every width at its smallest the network "
            f"has {fewest:,} parameters. Take a larger max_parameters, a smaller `smallest` or `multiple`, or let more widths "
            "change: print(evolvenet.trace(model, inputs)) gives the reason for each that keeps its size."
        )

    def _shrink_anyway(self, context: PolicyContext) -> dict[str, Proposal]:
        """Prunings with the threshold doubled until a width shrinks, saturated or not."""
        share = self.prune or 1e-4
        while share < 1:
            share = min(2 * share, 1.0)
            found = self._shrinks(context.statistics, context, share)
            if found:
                return found
        return {}

    def _span(self, context: PolicyContext, width: WidthStatistics) -> float:
        """The part of `cooldown` that has passed since the width changed, or since pruning started; at most 1."""
        since = width.since_change
        if context.previous is not None:
            since = min(since, context.progress - min(self.start, context.previous))
        return min(1.0, since / self.cooldown) if self.cooldown else 1.0

    def _shrinks(
        self, known: Mapping[str, WidthStatistics], context: PolicyContext, prune: float
    ) -> dict[str, Proposal]:
        shrinks = {name: self._shrink(width, context, prune) for name, width in known.items()}
        return {name: shrink for name, shrink in shrinks.items() if shrink is not None}

    def _shrink(self, width: WidthStatistics, context: PolicyContext, prune: float) -> Proposal | None:
        """The pruning of one width; None if it keeps its size."""
        if width.last_change > 0 and self._cools_down(width):
            return None
        kept = units_above(width.energies, prune)
        sizes = context.graph.widths[width.width]
        step = 1 - (1 - self.largest_step) ** self._span(context, width)
        slowest = lowest(width.size, step, sizes.step)
        size = sizes.rounded(max(kept, slowest, self.smallest, sizes.smallest))
        if size >= width.size:
            return None
        gone = width.size - size
        most = width.energies[size] * size
        reason = (
            f"{gone} unit{'s have' if gone > 1 else ' has'} less than {prune:.1%} of the mean energy: "
            f"{'at most ' if gone > 1 else ''}{most:.1%}"
        ).replace("%", " %")
        return Proposal(size, reason)

    def _is_shrinking(self, width: WidthStatistics) -> bool:
        return width.last_change < 0 and width.since_change <= self.cooldown

    def _cools_down(self, width: WidthStatistics) -> bool:
        """Whether its last change is too recent for one of the opposite direction."""
        # Beyond 2⁶⁰: for good.
        return width.since_change <= self.cooldown * 2 ** min(width.reversals, 60)

    def _larger(self, width: WidthStatistics) -> int:
        """The size to which one width would grow now; its present one if it may not."""
        if not width.growable or (width.last_change < 0 and self._cools_down(width)):
            return width.size
        return enlarged(width, self.growth)

    def _fits(self, graph: WidthGraph, sizes: Mapping[str, int]) -> bool:
        return self.max_parameters is None or graph.proposed_parameters(sizes) <= self.max_parameters

    def _why(self, width: WidthStatistics, test: Evidence | None) -> str:
        above = units_above(width.energies, self.prune)
        passed = (
            "" if test is None else f", t-statistic of new units {test.t_statistic:.1f} (threshold {self.certain:g})"
        )
        return (
            f"{above} of {width.size} units have at least {self.prune:.1%} of the mean energy".replace("%", " %")
            + passed
        )
