"""`Threshold`: prune the directions without energy, grow the widths that are saturated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.loss_test import Evidence
from evolvenet.linalg.spectrum import effective_rank, energy_shares, units_for_energy
from evolvenet.measurement.width_spectra import WidthStatistics
from evolvenet.policies.base import PolicyContext, Proposal, check_fields, enlarged, fewest_units, lowest


@dataclass(frozen=True)
class Threshold:
    """Prune directions without energy, grow saturated widths whose new units reduce the loss.

    A width shrinks by as many directions as hold together at most the share `prune` of its energy (the sum of its squared
    singular values). Its saturation is its effective rank (Roy and Vetterli 2007) over its size; where that reaches `grow`, it
    is not pruned, and grows if it passes the loss test: the t-statistic of the loss's decrease by new units, on samples that they
    were not fitted on, is at least `certain` (`evolvenet.growth.loss_test`). Between the two thresholds the size stays.

    Args:
        prune: share of the energy that is removed in one event at most, 0 … 1, below `grow`.
        grow: saturation from which a width grows, 0 … 1; 1 practically never.
        largest_step: largest share of a width's units that is removed in one event, 0 … 1.
        growth: units added at a growth as a share of the size, 0 … 1, rounded up; 0 for never.
        cooldown: events for which a width that grew is not pruned, and one that was pruned does not grow; twice as many after
            each reversal, so that widths settle: growth that was pruned again is repeated after longer and longer times.
        smallest: fewest units that a width keeps.
        certain: least t-statistic in the loss test; 0 to go by the spectrum alone, as where the loss's gradients are not
            known. At 2, one of 44 widths grows by chance.
        max_parameters: growth that would take the network above it is left out, and while the network is above it
            and nothing is left below `prune`, `prune` is doubled until a width shrinks; None for no limit.

    Raises:
        PolicyError: for a value outside its range, or `prune` not below `grow`.

    >>> from torch import nn, zeros
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), zeros(1, 4))
    >>> width = WidthStatistics("0", 3, spectrum=(2.0, 1.0, 0.1), events_since_change=9, growable=True)
    >>> context = PolicyContext(graph, progress=0.5, initial=graph.sizes, measure=lambda: {"0": width})
    >>> Threshold(prune=0.01, grow=0.9).propose(context)["0"]
    Proposal(size=2, reason='1 direction carries 0.2 % of the energy (threshold 1.0 %)')
    """

    prune: float
    grow: float
    largest_step: float = 0.5
    growth: float = 0.25
    cooldown: int = 2
    smallest: int = 2
    certain: float = 2.0
    max_parameters: int | None = None

    def __post_init__(self) -> None:
        limit = {} if self.max_parameters is None else {"max_parameters": 1}
        least = {"cooldown": 0, "smallest": 1, "certain": 0, **limit}
        check_fields(self, shares=("prune", "grow", "largest_step", "growth"), least=least)
        if self.prune >= self.grow:
            raise PolicyError(
                f"Threshold: expected prune below grow, got prune={self.prune} and grow={self.grow}. "
                "Widths settle in the gap between the two: take for example prune=0.01, grow=0.9."
            )

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        """New sizes for the widths that change; prunings first, then growths, the most saturated first.

        Raises:
            SpectrumError: for a spectrum with negative or NaN values.
        """
        known, graph = context.statistics, context.graph
        saturation = {name: effective_rank(width.spectrum) / width.size for name, width in known.items()}
        saturated = [name for name in known if saturation[name] >= self.grow]
        shrinks = {name: self._shrink(known[name], graph, self.prune) for name in known if name not in saturated}
        found = {name: shrink for name, shrink in shrinks.items() if shrink is not None}
        if not found and self.max_parameters is not None and graph.parameters > self.max_parameters:
            return self._shrink_anyway(context)
        sizes = {name: proposal.size for name, proposal in found.items()}
        larger = {name: graph.widths[name].rounded(self._larger(known[name])) for name in saturated}
        larger = {name: size for name, size in larger.items() if size > known[name].size}
        larger = {name: size for name, size in larger.items() if self._fits(graph, {**sizes, name: size})}
        tests = context.loss_tests(larger) if larger and self.certain else {}
        for name in sorted(larger, key=lambda name: -saturation[name]):
            passed = name not in tests or tests[name].t_statistic >= self.certain
            if passed and self._fits(graph, {**sizes, name: larger[name]}):
                sizes[name] = larger[name]
                found[name] = Proposal(larger[name], self._why(known[name], tests.get(name)))
        return found

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
            shrinks = {name: self._shrink(width, context.graph, share) for name, width in context.statistics.items()}
            found = {name: shrink for name, shrink in shrinks.items() if shrink is not None}
            if found:
                return found
        return {}

    def _shrink(self, width: WidthStatistics, graph: WidthGraph, prune: float) -> Proposal | None:
        """The pruning of one width; None if it keeps its size."""
        if width.last_change >= 0 and self._cools_down(width):
            return None
        kept = units_for_energy(width.spectrum, prune)
        sizes = graph.widths[width.width]
        slowest = lowest(width.size, self.largest_step, sizes.step)
        size = sizes.rounded(max(kept, slowest, self.smallest, sizes.smallest))
        if size >= width.size:
            return None
        gone = width.size - size
        carried = float(energy_shares(width.spectrum).sort().values[:gone].sum())
        reason = (
            f"{gone} direction{'s carry' if gone > 1 else ' carries'} {carried:.1%} of the energy "
            f"(threshold {prune:.1%})"
        ).replace("%", " %")
        return Proposal(size, reason)

    def _cools_down(self, width: WidthStatistics) -> bool:
        """Whether its last change is too recent for one of the opposite direction."""
        # Beyond 2⁶⁰ events: for good.
        return width.events_since_change <= self.cooldown * 2 ** min(width.reversals, 60)

    def _larger(self, width: WidthStatistics) -> int:
        """The size to which one width would grow now; its present one if it may not."""
        if not width.growable or (width.last_change <= 0 and self._cools_down(width)):
            return width.size
        return enlarged(width, self.growth)

    def _fits(self, graph: WidthGraph, sizes: Mapping[str, int]) -> bool:
        return self.max_parameters is None or graph.proposed_parameters(sizes) <= self.max_parameters

    def _why(self, width: WidthStatistics, test: Evidence | None) -> str:
        rank = effective_rank(width.spectrum)
        passed = (
            "" if test is None else f", t-statistic of new units {test.t_statistic:.1f} (threshold {self.certain:g})"
        )
        return (
            f"effective rank {rank:.1f} of {width.size} = {rank / width.size:.2f} (threshold {self.grow:.2f}){passed}"
        )
