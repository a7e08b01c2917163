"""What policies propose sizes from: the spectra and energies of widths at an event, and when they changed last."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evolvenet.errors import SkippedEvent, concerning
from evolvenet.graph.naming import tensor_named
from evolvenet.graph.width_graph import Tie, Width, WidthGraph
from evolvenet.linalg.pivoted_cholesky import pivoted_cholesky
from evolvenet.linalg.shrinkage import shrunk_covariance
from evolvenet.linalg.spectrum import effective_rank, energy_shares
from evolvenet.measurement.activation_moments import ActivationMoments
from evolvenet.measurement.host_model import on_host
from evolvenet.measurement.past_events import LastChange, PastEvents
from evolvenet.measurement.rank_spectra import is_rotatable, rank_spectrum
from evolvenet.measurement.unit_rows import unit_rows
from evolvenet.measurement.width_spectra import mean_square, spectra_of_parts

log = logging.getLogger("evolvenet")

FEWEST = 16
"""Fewest places (samples × positions) at which a width is measured."""

EVENT = 0.05
"""What an event counts for, as a share of the run, where the share of the run that is done is not known."""


@dataclass(frozen=True)
class WidthStatistics:
    """What is known about one width at an event.

    Args:
        width: its name.
        size: its number of units.
        spectrum: its `size` singular values, descending. Only their proportions mean something: of a rank they are those of its
            layer's outputs, of other widths their squares add up to 1.
        events_since_change: 1 at the event right after its last change; a large number if it never changed.
        growable: whether growing keeps the function.
        last_change: units added at its last change, negative if it was pruned; 0 if that is not known, or it never changed.
        reversals: how often it grew after it was pruned, or was pruned after it grew.
        since_change: share of the run since its last change, infinite if it never changed.
        energies: `size` shares of the variance of its consumers' outputs, descending: what each unit adds to the units before it,
            the part of the unit that no linear function of those predicts, times its weights (see `unit_energies`), averaged over
            the last events. Of a rank, and by default for (), the squares of the spectrum over their sum: a rank is rotated into
            its singular directions before it is pruned.
    """

    width: str
    size: int
    spectrum: tuple[float, ...]
    events_since_change: int
    growable: bool
    last_change: int = 0
    reversals: int = 0
    since_change: float = math.inf
    energies: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.energies:
            object.__setattr__(self, "energies", tuple(energy_shares(self.spectrum).tolist()))


def width_statistics(
    model: nn.Module,
    graph: WidthGraph,
    moments: ActivationMoments,
    past: PastEvents,
) -> dict[str, WidthStatistics]:
    """The statistics of every resizable width that has a weight and was measured.

    Covariances are shrunk (`evolvenet.linalg.shrinkage`): where there are fewer places than units, only units that are
    predicted in spite of that have little energy. Widths that were measured at fewer than `FEWEST` places are left out.

    Args:
        model: the model of the graph.
        graph: its widths.
        moments: from `collect`.
        past: this event's number and share of the run, and what the events before it left.

    Raises:
        SkippedEvent: if no width was measured at `FEWEST` places.
        SpectrumError: for NaN or infinite weights.
    """
    model = on_host(model)
    spectra: dict[str, tuple[float, ...]] = {}
    energies: dict[str, list[float]] = {}
    few: dict[str, int] = {}
    for width in graph.resizable:
        with concerning(width.name):
            seen = [moments.count(tie) for tie in width.consumers if tie in moments]
            if seen and max(seen) < FEWEST:
                few[width.name] = max(seen)
                continue
            if is_rotatable(graph, width):
                spectrum = rank_spectrum(model, graph, width, moments, shrink=True)
                spectra[width.name] = tuple(spectrum.tolist())
                energies[width.name] = energy_shares(spectrum).tolist()
                continue
            covariances = {
                tie: shrunk_covariance(moments[tie].covariance, moments[tie].count)
                for tie in width.consumers
                if tie in moments
            }
            parts = list(spectra_of_parts(model, graph, width, covariances))
            spectrum = mean_square(values for values, _ in parts)
            if spectrum is not None:
                spectra[width.name] = tuple(spectrum.tolist())
                each = [
                    unit_energies(model, width, own) if own else energy_shares(values).tolist() for values, own in parts
                ]
                energies[width.name] = [sum(shares) / len(each) for shares in zip(*each, strict=True)]
    _report_few(graph, few, alone=not spectra, first=past.count == 1)
    known = past.energies.updated(energies, past.progress).known
    return {name: _statistics(model, graph, name, spectrum, known[name][1], past) for name, spectrum in spectra.items()}


def _report_few(graph: WidthGraph, few: Mapping[str, int], *, alone: bool, first: bool) -> None:
    """Name the widths that were measured at too few places; without any other, skip the event."""
    if not few:
        return
    counts = "; ".join(f"{count} for the {graph.widths[name].size} of {name}" for name, count in few.items())
    problem = (
        f"Expected at least {FEWEST} places (samples × positions) to measure on, got {counts}. "
        "Observe more or larger batches, or raise calibration_batches."
    )
    if alone:
        raise SkippedEvent(problem)
    if first:
        log.warning("%s Until then those widths stay as they are.", problem)


def unit_energies(model: nn.Module, width: Width, parts: Mapping[Tie, Tensor]) -> list[float]:
    """What each unit adds to the outputs of its consumers, as a share of their variance.

    With S the covariance of a consumer's inputs and W its weights, the share of a unit is the squared norm of its columns in W
    times its variance given the units before it, over tr(W·S·Wᵀ); of a convolution's outputs the part of each kernel position is
    counted by itself. Of several consumers the shares are averaged. The order is the one of `pivoted_cholesky`, in which units
    stay when the others are pruned.

    Args:
        model: the model of the width.
        width: `n` units.
        parts: {consumer tie: covariance `[n, n]`}.

    Returns:
        n shares, descending; all 0 where no output varies. Their sum is 1 where the units are not correlated, in general not.

    >>> model, tie = nn.Sequential(nn.Linear(2, 1)), Tie("0.weight", 1, 0, 1, "consumes")
    >>> _ = nn.init.constant_(model[0].weight, 7.0)
    >>> [round(energy, 6) for energy in unit_energies(model, Width("0", size=2), {tie: torch.eye(2).double()})]
    [0.5, 0.5]
    """
    total, count = None, 0
    for tie, covariance in parts.items():
        rows = unit_rows(model, width, tie)
        rows = rows / rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)
        largest = covariance.diagonal().max()
        moment = covariance / largest if largest > 0 else covariance.clone()
        outputs = (rows * (moment @ rows)).sum()
        if outputs > 0:
            norms = rows.norm(dim=1)
            shares, count = moment.mul_(norms / outputs).mul_(norms.unsqueeze(-1)), count + 1
            total = shares if total is None else total.add_(shares)
    found = [] if total is None else pivoted_cholesky(total.div_(count))[1]
    return [*found, *[0.0] * (width.size - len(found))]


def _statistics(
    model: nn.Module,
    graph: WidthGraph,
    name: str,
    spectrum: tuple[float, ...],
    energies: tuple[float, ...],
    past: PastEvents,
) -> WidthStatistics:
    width = graph.widths[name]
    # Without a producer's row a new unit has no input, and where an op mixes units it may change the function. Its columns
    # are 0 at first: without a consumer that is trained they stay 0.
    consumers = [tensor_named(model, tie.tensor) for tie in width.consumers]
    trained = not consumers or any(tensor.requires_grad for tensor in consumers)
    growable = width.can_grow and bool(width.producers) and trained
    return statistics_of(name, spectrum, past, growable, energies)


def statistics_of(
    name: str, spectrum: tuple[float, ...], past: PastEvents, growable: bool, energies: tuple[float, ...] = ()
) -> WidthStatistics:
    """The statistics of a width or a rank, with when it changed last.

    Args:
        name: of the width.
        spectrum: one value for each of its units.
        past: this event's number and share of the run, and what the events before it left.
        growable: whether growing keeps the function.
        energies: of its units; () for those of the spectrum.
    """
    last = past.changed.get(name, LastChange())
    events = past.count - last.event
    since = past.progress - last.progress if past.progress > last.progress else EVENT * events
    return WidthStatistics(name, len(spectrum), spectrum, events, growable, last.units, last.reversals, since, energies)


def ranks_and_energies(
    statistics: Mapping[str, WidthStatistics], sizes: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Of each width the effective rank, and the share of the energy in as many directions as units stay.

    The rank of a layer that is whole, and so has no size, keeps all.
    """
    shares = {name: energy_shares(each.spectrum).sort(descending=True).values for name, each in statistics.items()}
    ranks = {name: effective_rank(each.spectrum) for name, each in statistics.items()}
    return ranks, {name: min(1.0, float(values[: sizes.get(name)].sum())) for name, values in shares.items()}
