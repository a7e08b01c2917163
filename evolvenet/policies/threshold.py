"""`Threshold`: prune the directions without energy, grow the widths that are saturated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.loss_test import Evidence
from evolvenet.linalg.spectrum import effective_rank, energy_shares, units_for_energy
from evolvenet.measurement.width_spectra import WidthStatistics
from evolvenet.policies.base import Policy, PolicyContext, Proposal, check_fields, enlarged


@dataclass(frozen=True)
class Threshold:
    """Prune what carries no energy, grow what is saturated and wanted.

    A width shrinks by as many directions as carry together at most the share `prune` of its energy (the sum of its
    squared singular values), and grows when its saturation, effective rank (Roy and Vetterli 2007) over size, reaches
    `grow`, if the loss asks for it: new units must make outputs move as the loss wants on samples that did not choose how, by
    `certain` standard errors (`evolvenet.growth.loss_test`). Between the two it stays; a saturated width is never pruned.

    Args:
        prune: share of the energy that may go in one event, 0 … 1, below `grow`.
        grow: saturation from which a width grows, 0 … 1; 1 practically never.
        largest_step: largest share of a width's units that goes in one event, 0 … 1.
        growth: units added at a growth as a share of the size, 0 … 1, rounded up; 0 for never.
        cooldown: events for which a width that grew is not pruned, and one that was pruned does not grow; twice as many
            with each turn that it has made before, so that widths settle: a growth whose units did not come to carry
            anything is tried again later and later.
        smallest: fewest units that a width keeps.
        certain: standard errors by which the loss must be seen to fall for a width to grow, where its gradients are known; 0
            to go by the spectrum alone. At 2 one of 44 widths grows by chance.
        max_parameters: a growth that would take the network above it is left out, and while the network is above it
            and nothing is left below `prune`, what carries least goes all the same; None for no limit.

    Raises:
        PolicyError: for a value outside its range, or `prune` not below `grow`.

    >>> from torch import nn, zeros
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), zeros(1, 4))
    >>> measure = WidthStatistics("0", 3, spectrum=(2.0, 1.0, 0.1), events_since_change=9, growable=True)
    >>> Threshold(prune=0.01, grow=0.9).propose({"0": measure}, graph)["0"]
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

    def at(self, moment: PolicyContext) -> Policy:
        """The policy that asks the moment's gradients before a width grows."""
        return _Asking(self, moment)

    def propose(
        self,
        measures: Mapping[str, WidthStatistics],
        graph: WidthGraph,
        evidence: Callable[[Mapping[str, int]], Mapping[str, Evidence]] = lambda _: {},
    ) -> dict[str, Proposal]:
        """New sizes for the widths that should change; prunings first, then growths, the most saturated first.

        Args:
            measures: of the widths.
            graph: the widths.
            evidence: whether the loss asks for growths, see `PolicyContext`; by default nothing is known and the
                spectrum decides.

        Raises:
            SpectrumError: for a spectrum with negative or NaN values.
        """
        found: dict[str, Proposal] = {}
        saturated: list[tuple[float, WidthStatistics]] = []
        for measure in measures.values():
            saturation = effective_rank(measure.spectrum) / measure.size
            if saturation >= self.grow:
                saturated.append((saturation, measure))
            elif (shrink := self._shrink(measure, graph, self.prune)) is not None:
                found[measure.width] = shrink
        if not found and self.max_parameters is not None and graph.parameters > self.max_parameters:
            return self._relieve(measures, graph)
        smaller = {name: proposal.size for name, proposal in found.items()}
        larger = {measure.width: self._larger(measure) for _, measure in saturated}
        may = {name: size for name, size in larger.items() if size > measures[name].size}
        may = {name: size for name, size in may.items() if self._fits(graph, {**smaller, name: size})}
        known = evidence(may) if may and self.certain else {}
        for _, measure in sorted(saturated, key=lambda pair: -pair[0]):
            name = measure.width
            asked = known.get(name)
            if name in may and (asked is None or asked.t_statistic >= self.certain):
                sizes = {each: proposal.size for each, proposal in found.items()} | {name: may[name]}
                if self._fits(graph, sizes):
                    found[name] = Proposal(may[name], self._why(measure, asked))
        return found

    def _relieve(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> dict[str, Proposal]:
        """What goes where the network is above `max_parameters` and nothing is below `prune`: what carries least.

        The threshold is doubled until a width has something to give, saturated or not.
        """
        share = self.prune or 1e-4
        while share < 1:
            share = min(2 * share, 1.0)
            shrinks = {name: self._shrink(measure, graph, share) for name, measure in measures.items()}
            found = {name: shrink for name, shrink in shrinks.items() if shrink is not None}
            if found:
                return found
        return {}

    def _shrink(self, measure: WidthStatistics, graph: WidthGraph, prune: float) -> Proposal | None:
        """The pruning of one width, if there is enough to prune."""
        if measure.last_change >= 0 and self._rests(measure):
            return None
        kept = units_for_energy(measure.spectrum, prune)
        slowest = measure.size - math.floor(self.largest_step * measure.size)
        size = max(kept, slowest, self.smallest, graph.widths[measure.width].smallest)
        if size >= measure.size:
            return None
        gone = measure.size - size
        carried = float(energy_shares(measure.spectrum).sort().values[:gone].sum())
        reason = (
            f"{gone} direction{'s carry' if gone > 1 else ' carries'} {carried:.1%} of the energy "
            f"(threshold {prune:.1%})"
        ).replace("%", " %")
        return Proposal(size, reason)

    def _rests(self, measure: WidthStatistics) -> bool:
        # Beyond 2⁶⁰ events it rests for good.
        return measure.events_since_change <= self.cooldown * 2 ** min(measure.reversals, 60)

    def _larger(self, measure: WidthStatistics) -> int:
        """The size to which one width would grow now; its present one if it may not."""
        if not measure.growable or (measure.last_change <= 0 and self._rests(measure)):
            return measure.size
        return enlarged(measure, self.growth)

    def _fits(self, graph: WidthGraph, sizes: Mapping[str, int]) -> bool:
        return self.max_parameters is None or graph.proposed_parameters(sizes) <= self.max_parameters

    def _why(self, measure: WidthStatistics, asked: Evidence | None) -> str:
        rank = effective_rank(measure.spectrum)
        wanted = "" if asked is None else f", and the loss asks for it ({asked.t_statistic:.1f} standard errors)"
        return f"effective rank {rank:.1f} of {measure.size} = {rank / measure.size:.2f} (threshold {self.grow:.2f}){wanted}"


@dataclass(frozen=True)
class _Asking:
    """`Threshold` at one moment."""

    threshold: Threshold
    moment: PolicyContext

    def propose(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> dict[str, Proposal]:
        """New sizes for the widths that should change."""
        return self.threshold.propose(measures, graph, self.moment.evidence)
