"""How much the network's outputs suffer when one layer alone is factorized: trials at a few ranks, a curve through them."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.execution.isolation import isolated, model_outputs
from evolvenet.execution.op_cache import OpCache
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.precision import in_float64
from evolvenet.lowrank.base import Kind
from evolvenet.lowrank.budget import energy_lost
from evolvenet.lowrank.fit import Observations
from evolvenet.lowrank.layers import written
from evolvenet.lowrank.plan import Choice, Request, decomposed, possible, spectra, weights_of
from evolvenet.lowrank.rank_choice import Energy
from evolvenet.measurement.output_error import MEASURES, OutputMeasure, first_batches, outputs_on
from evolvenet.pruning.trials import SAMPLES

LEVELS = (0.003, 0.03, 0.3)
"""Shares of a layer's output energy that trials lose, about."""

Point = tuple[float, float]
"""(share of the layer's energy that is lost, relative error of the network's outputs or their divergence)."""


@dataclass(frozen=True)
class OutputLoss:
    """The relative error of the network's outputs, from the share of a layer's energy that its factors lose.

    Args:
        points: {(layer, name of a kind): from trials, by share}.

    Raises:
        KeyError: for a layer or a kind without trials.
    """

    points: Mapping[tuple[str, str], Sequence[Point]]

    def __call__(self, layer: str, kind: Kind, lost: float) -> float:
        """In proportion to the share below the first trial, a power of it between and beyond two.

        >>> from evolvenet.lowrank.kinds import kind_named
        >>> loss = OutputLoss({("0", "svd"): [(0.01, 0.02), (0.1, 0.2)]})
        >>> [round(loss("0", kind_named("svd"), lost), 4) for lost in (0.005, 0.05, 0.5)]
        [0.01, 0.1, 1.0]
        """
        found = self.points.get((layer, kind.name)) or [(1.0, 1.0)]
        if lost <= found[0][0] or len(found) == 1:
            return found[0][1] * lost / found[0][0]
        beyond = (found[-2], found[-1])
        (low, less), (high, more) = next((pair for pair in pairwise(found) if lost <= pair[1][0]), beyond)
        slope = math.log(more / less) / math.log(high / low)
        return more * (lost / high) ** slope


def output_losses(
    model: nn.Module,
    requests: Sequence[Request],
    seen: Observations,
    batches: Sequence[Any],
    graph: WidthGraph | None = None,
    loss: OutputMeasure = "outputs",
) -> OutputLoss:
    """Factorize one layer at a time, at ranks that lose about `LEVELS` of its energy, and measure the network's outputs.

    The product of the factors is put into the layer's weight, with the bias or running mean that keeps the mean of its
    outputs. The model is left as it was.

    Args:
        model: with whole layers.
        requests: for its layers.
        seen: from `observe`.
        batches: inputs of the model, of which the first samples are used.
        graph: of the model, see `outputs_on`.
        loss: how the outputs are compared.
    """
    few = first_batches(batches, SAMPLES)
    own, counted = (False, None) if graph is None else (graph.differentiates, graph.outputs)
    # With autograd on, results belong to the graph of one run.
    cache = None if own else OpCache()

    def outputs_with(changed: Collection[str]) -> list[Tensor]:
        def run(batch: Any) -> list[Tensor]:
            return model_outputs(model, batch, own, counted, None if cache is None else cache.on(model, batch, changed))

        return outputs_on(model, few, graph, run=run)

    whole = outputs_with(())
    found: dict[tuple[str, str], list[Point]] = {}
    with isolated(model, shadows=True):
        shadows, _, _ = named_tensors(model)
        for request in requests:
            kinds = possible(request) if request.target.refusal is None else ""
            for kind in () if isinstance(kinds, str) else kinds:
                points = found.setdefault((request.target.name, kind.name), [])
                for choice, lost in _trials(request, kind, seen):
                    with in_place(choice, seen, shadows) as changed:
                        error = MEASURES[loss](whole, outputs_with(changed))
                    if math.isfinite(error) and error > (points[-1][1] if points else 0.0):
                        points.append((lost, error))
    return OutputLoss(found)


def _trials(request: Request, kind: Kind, seen: Observations) -> Iterator[tuple[Choice, float]]:
    """Factors of a layer with the share of energy that they lose, ascending."""
    target = request.target
    found = spectra(kind, target, seen.moments.get(target.name))
    last = 0.0
    for level in LEVELS:
        ranks = kind.checked_ranks(target.shape, kind.combined([Energy(1 - level).rank(each) for each in found]))
        lost = energy_lost(found, ranks)
        if lost > last:
            yield Choice(target, kind, ranks), lost
            last = lost


@contextmanager
def in_place(choice: Choice, seen: Observations, shadows: Mapping[str, Tensor]) -> Generator[Collection[str]]:
    """The product of a layer's factors in the place of its weight, and what takes up the change of the mean: their names."""
    target, name = choice.target, seen.names[choice.target.name]
    assert choice.kind is not None
    factors = decomposed(choice, seen.moments.get(target.name))
    merged = torch.stack([choice.kind.merged(group, target.shape.inputs) for group in factors])
    changed = {name: written(target.layer, merged)}
    outputs = seen.targets.get(name, ())
    if target.name in seen.means and len(outputs) == 1 and (place := outputs[0].bias) is not None:
        apart = (weights_of(target) - merged).flatten(2)
        shift = torch.cat([part @ mean for part, mean in zip(apart, seen.means[target.name], strict=True)])
        bias, start = place
        value = in_float64(shadows[bias].detach(), "cpu").clone()
        value.view(-1)[start : start + len(shift)] += shift * (outputs[0].bias_sign or 1)
        changed[bias] = value
    kept = {each: shadows[each].detach().clone() for each in changed}
    try:
        _write(shadows, changed)
        yield changed.keys()
    finally:
        _write(shadows, kept)


@torch.no_grad()
def _write(shadows: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        shadows[name].copy_(value)
