"""Trials: each width alone is cut to some sizes, and what the network loses by that is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from evolvenet.errors import concerning
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.host_model import on_host
from evolvenet.pruning.selection import plan_prune
from evolvenet.pruning.trial_data import Loss, TrialData

Curve = Sequence[tuple[int, float]]
"""The loss of a width at some sizes, as (size, loss) by size, from 0 or its smallest up to its present size, loss 0."""

SHARES = (0.85, 0.7, 0.5, 0.35, 0.2, 0.1)
"""Of a width's units, at which a trial cuts it."""

BETWEEN = 8
"""Parts into which the interval between two trials is divided."""

MOMENTS = 2**30
"""Bytes of moments in memory at a time. Those of all widths of a large language model take several times its weights."""

SAMPLES = 256
"""Most samples of the batches that a trial runs on."""


def trial_curves(
    model: nn.Module,
    graph: WidthGraph,
    batches: Sequence[Any],
    shares: Sequence[float] = SHARES,
    samples: int = SAMPLES,
    loss: Loss = "outputs",
) -> dict[str, Curve]:
    """What the model loses when one width alone is cut and its consumers reconstructed. The model is kept.

    Args:
        model: the model of the graph.
        graph: its widths.
        batches: inputs of the model; with a function as the loss, pairs of inputs and labels.
        shares: of a width's units that are tried, 0 … 1, descending.
        samples: most samples of the batches that a trial runs on.
        loss: of the outputs, see `TrialData`.

    Raises:
        PolicyError: see `TrialData`.
        SpectrumError, TraceError: as `collect`.
    """
    host, data = on_host(model), TrialData.of(model, graph, batches, samples, loss)
    whole, found = data.measured(), dict[str, Curve]()
    for widths in _together(graph.resizable):
        statistics = collect(model, graph, data.all, [width.name for width in widths])
        for width in widths:
            points = [(width.size, 0.0)]
            with concerning(width.name):
                recording = data.recording([width.name])
                for size in _trial_sizes(width, shares):
                    surgery = plan_prune(model, graph, {width.name: size}, statistics, host)
                    points.append((size, max(data.lost(whole, surgery, recording), points[-1][1])))
            # Below the smallest trial: more than all that was seen.
            found[width.name] = [(0, 10 * points[-1][1] + 1), *reversed(points)]
    return found


def _together(widths: Sequence[Width]) -> Iterator[list[Width]]:
    """The widths whose moments are gathered in one run: as many as `MOMENTS` allows, one at least."""
    chosen: list[Width] = []
    used = 0
    for width in widths:
        # Two halves of the samples in float64.
        needed = 16 * width.size**2 * len(width.consumers)
        if chosen and used + needed > MOMENTS:
            yield chosen
            chosen, used = [], 0
        chosen, used = [*chosen, width], used + needed
    yield from [chosen] if chosen else []


def filled(curve: Curve) -> Curve:
    """A curve with sizes between the measured ones, at which losses are interpolated geometrically.

    Losses fall about exponentially with the size. On straight lines between trials, sums of losses would have their minima at the
    sizes that were tried. Towards a loss of 0 the interpolation is a parabola.

    Args:
        curve: by size.

    >>> [(size, round(loss, 2)) for size, loss in filled([(0, 16.0), (2, 4.0), (4, 0.0)])]
    [(0, 16.0), (1, 8.0), (2, 4.0), (3, 1.0), (4, 0.0)]
    """
    points = sorted(curve)
    found: list[tuple[int, float]] = []
    for (low, above), (high, below) in pairwise(points):
        for part in range(BETWEEN):
            size = low + part * (high - low) // BETWEEN
            way = (size - low) / (high - low)
            loss = above ** (1 - way) * below**way if below > 0 else above * (1 - way) ** 2
            if not found or size > found[-1][0]:
                found.append((size, loss))
    return [*found, *points[-1:]]


def smallest(width: Width) -> int:
    """The fewest units that the width can have: one, or as many as must stay."""
    return max(1, width.smallest)


def _trial_sizes(width: Width, shares: Sequence[float]) -> list[int]:
    # Rounded, a large share of a few units is all of them: without a trial the last one would seem to hold all of the loss.
    sizes = {width.rounded(max(smallest(width), min(width.size - 1, round(share * width.size)))) for share in shares}
    return sorted((size for size in sizes if size < width.size), reverse=True)
