"""What policies see of the ranks of whole layers: the spectra of their outputs, and trials of factors."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from evolvenet.execution.isolation import isolated
from evolvenet.graph.naming import named_tensors
from evolvenet.lowrank.fit import Observations, observe
from evolvenet.lowrank.layer_ranks import LayerRanks
from evolvenet.lowrank.plan import Choice, spectra
from evolvenet.lowrank.sensitivity import in_place
from evolvenet.lowrank.targets import Target, find_targets
from evolvenet.measurement.output_error import first_batches, output_error, outputs_on
from evolvenet.measurement.past_events import PastEvents
from evolvenet.measurement.width_statistics import WidthStatistics, statistics_of
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
from evolvenet.pruning.trials import SAMPLES, SHARES, Curve


def observe_whole(model: nn.Module, ranks: LayerRanks, batches: Sequence[Any]) -> Observations | None:
    """Second moments of the inputs of all layers that are whole and have a rank; None if there are none.

    Args:
        model: is left as it was.
        ranks: of its layers.
        batches: its inputs.
    """
    targets = whole_targets(model, ranks)
    return observe(model, list(targets.values()), batches, TRAINING_LIMITS) if targets else None


def whole_targets(model: nn.Module, ranks: LayerRanks) -> dict[str, Target]:
    """{name of the rank: layer} of all layers that are whole and have a rank."""
    targets = find_targets(model) if ranks.whole else {}
    return {name: targets[rank.layer] for name, rank in ranks.whole.items()}


def rank_statistics(
    model: nn.Module, ranks: LayerRanks, seen: Observations, past: PastEvents
) -> dict[str, WidthStatistics]:
    """The statistics of the ranks of whole layers.

    The spectrum is that of the layer's outputs up to its break-even, and one value for the rest, the root of the sum of
    their squares.

    Args:
        model: of the ranks.
        ranks: of its layers.
        seen: from `observe_whole`.
        past: what the events before this one left.

    Raises:
        SpectrumError: for NaN or infinite weights.
    """
    found: dict[str, WidthStatistics] = {}
    for name, target in whole_targets(model, ranks).items():
        rank = ranks[name]
        moments = seen.moments.get(rank.layer)
        if moments is not None:
            (spectrum,) = spectra(rank.kind, target, moments)
            values = _up_to(spectrum.values, rank.break_even)
            found[name] = statistics_of(name, values, past, growable=False)
    return found


def _up_to(values: Tensor, break_even: int) -> tuple[float, ...]:
    """Values up to a break-even and one for the rest, in descending order.

    Where the rest has more energy than the values before it, they share it: what a first cut loses is then too small, but
    of a cut below them all it is exact, and that is one that pays.
    """
    squares = values.square().tolist()
    first = [*squares[:break_even], *[0.0] * (break_even - len(squares))]
    blocks: list[tuple[float, int]] = []
    for energy in (*first, sum(squares[break_even:])):
        blocks.append((energy, 1))
        while len(blocks) > 1 and blocks[-1][0] * blocks[-2][1] > blocks[-2][0] * blocks[-1][1]:
            (more, count), (less, others) = blocks.pop(), blocks.pop()
            blocks.append((more + less, count + others))
    return tuple(math.sqrt(energy / count) for energy, count in blocks for _ in range(count))


def rank_trials(
    model: nn.Module,
    ranks: LayerRanks,
    seen: Observations,
    batches: Sequence[Any],
    shares: Sequence[float] = SHARES,
) -> dict[str, Curve]:
    """The relative error of the model's outputs when one layer alone is factorized. The model is left as it was.

    Args:
        model: of the ranks.
        ranks: of its layers.
        seen: from `observe_whole`.
        batches: inputs of the model.
        shares: of a rank's units that are tried, 0 … 1, descending.

    Returns:
        {name of the rank: [(size, loss)]}, by size.
    """
    few = first_batches(batches, SAMPLES)
    whole = outputs_on(model, few, ranks.graph)
    found: dict[str, Curve] = {}
    with isolated(model, shadows=True):
        shadows: Mapping[str, Tensor] = named_tensors(model)[0]
        for name, target in whole_targets(model, ranks).items():
            rank = ranks[name]
            size = rank.break_even + 1
            points = [(size, 0.0)]
            for tried in sorted({max(1, min(size - 1, round(share * size))) for share in shares}, reverse=True):
                with in_place(Choice(target, rank.kind, (tried,)), seen, shadows):
                    error = output_error(whole, outputs_on(model, few, ranks.graph))
                points.append((tried, max(error, points[-1][1]) if math.isfinite(error) else math.inf))
            found[name] = [(0, 10 * points[-1][1] + 1), *reversed(points)]
    return found
