"""Ranks of all layers for a time of one forward pass, measured: chains of fewer multiply-accumulates may be slower."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import FactorizationError
from evolvenet.execution.isolation import isolated
from evolvenet.execution.sampling import samples_in
from evolvenet.execution.step import run_model
from evolvenet.graph.index_map import laid_out_as
from evolvenet.lowrank.base import Kind, LayerShape, Ranks
from evolvenet.lowrank.budget import (
    LayerCost,
    Loss,
    chain_macs,
    choices_of,
    energy_loss,
    factorizable,
    least_loss,
    options_of,
)
from evolvenet.lowrank.fit import Extent, Observations
from evolvenet.lowrank.layers import factored
from evolvenet.lowrank.plan import Choice, Request, possible
from evolvenet.measurement.cost import seconds

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Of the largest ranks that have fewer parameters than the layer, at which a chain is timed."""

ROUNDS = 5, 40
"""Least and most rounds of timings."""

SPAN = 0.3
"""Seconds after which no further round begins, once there were the least."""

ATTEMPTS = 6
"""Measurements of the whole model between the fastest chains and the limit."""


@dataclass(frozen=True, eq=False)
class Run:
    """A forward pass that is timed.

    Args:
        module: that runs.
        inputs: of the module.
        function: runs it.
    """

    module: nn.Module
    inputs: Any
    function: Callable[[], object]


Timer = Callable[[Sequence[Run]], Sequence[float]]
"""Some runs → seconds of each."""


def fastest(runs: Sequence[Run]) -> list[float]:
    """Seconds of each run: the least of several, taken in turns, so that other load on the machine meets all of them.

    Before it is timed each runs once more: else the ones after a large run would pay for what it drove out of the caches.
    """
    found = [math.inf] * len(runs)
    started, (least, most) = time.perf_counter(), ROUNDS
    for number in range(most):
        if number >= least and time.perf_counter() - started > SPAN:
            break
        for place, run in enumerate(runs):
            run.function()
            found[place] = min(found[place], seconds(run.function))
    return found


@dataclass(frozen=True, eq=False)
class LatencyBudget:
    """A limit on the time of one forward pass, and how it is measured.

    Args:
        model: with whole layers.
        batch: inputs of the model.
        limit: seconds.
        installed: choices → a context in which the model has factors of these kinds and ranks, of any values.
        timer: measures.
        loss: of factors, see `budget.within_budget`.
        gradients: whether the model runs with autograd on.
    """

    model: nn.Module
    batch: Any
    limit: float
    installed: Callable[[Sequence[Choice]], AbstractContextManager[Any]]
    timer: Timer
    loss: Loss = energy_loss
    gradients: bool = False

    def measured(self, choices: Sequence[Choice]) -> float:
        """Seconds of the model's forward pass with these factors."""
        with self.installed(choices), isolated(self.model, gradients=self.gradients):
            (found,) = self.timer([Run(self.model, self.batch, partial(run_model, self.model, self.batch))])
        return found


def within_latency(
    budget: LatencyBudget, requests: Sequence[Request], seen: Observations
) -> tuple[list[Choice], tuple[float, float]]:
    """The kind and the ranks of each layer, so that a forward pass takes no more than some time.

    Each layer is timed by itself, whole and as chains of some ranks, on inputs of the sizes that it gets in the model;
    between these ranks the time is in proportion to the multiply-accumulates, and never falls with them. Factors that are
    not faster than their layer are left out. By these times energy is lost where that saves the most time, see
    `budget.least_loss`. Then the whole model is timed. If it is above the limit, the limit on the sum of the layers' times is
    lowered by bisection.

    Args:
        budget: the limit.
        requests: for the model's layers; their ranks have no effect.
        seen: from `observe`.

    Returns:
        The choices, and seconds of the whole model and of the factorized one, measured.

    Raises:
        FactorizationError: if even the fastest chains are above the limit.
    """
    before = budget.measured([])
    if before <= budget.limit:
        reason = f"the whole model takes {_ms(before)}, which is within the limit"
        return [Choice(each.target, refusal=each.target.refusal or reason) for each in requests], (before, before)
    rows = samples_in(budget.batch)
    costs = {name: timed(each, seen.extents[name], rows, budget.timer) for name, each in factorizable(requests).items()}
    options = {name: options_of(each, seen, costs[name], budget.loss) for name, each in factorizable(requests).items()}
    reasons = {name: costs[name].reason for name in options if len(options[name]) == 1}

    def at(limit: int) -> tuple[list[Choice], float, int]:
        """Choices for a limit in nanoseconds on the sum of times, seconds of the model with them, and that sum."""
        chosen, expected = least_loss(options, _nanoseconds(before), limit)
        choices = choices_of(requests, chosen, reasons)
        return choices, budget.measured(choices), expected

    choices, after = _slowest_within(budget.limit, at)
    if after > budget.limit:
        raise FactorizationError(
            f"Budget: expected a latency of {_ms(after)} or more, what the fastest factors of these layers reach, got "
            f"{_ms(budget.limit)}; the whole model takes {_ms(before)}. Prune widths as well."
        )
    return choices, (before, after)


def _slowest_within(most: float, at: Callable[[int], tuple[list[Choice], float, int]]) -> tuple[list[Choice], float]:
    """The choices for the largest limit on the sum of times with which the model takes no more than `most` seconds.

    Returns:
        These choices and the model's seconds; those of the fastest choices where even these take longer.
    """
    high = _nanoseconds(most)
    choices, after, _ = at(high)
    if after <= most:
        return choices, after
    choices, after, low = at(0)
    for _ in range(ATTEMPTS if after <= most else 0):
        limit = (low + high) // 2
        others, taken, _ = at(limit)
        if taken <= most:
            choices, after, low = others, taken, limit
        else:
            high = limit
    return choices, after


def timed(request: Request, extents: Sequence[Extent], rows: int, timer: Timer) -> LayerCost:
    """The nanoseconds of a layer and of its chains, in all its calls.

    Args:
        request: for the layer.
        extents: of its calls.
        rows: samples of the batch.
        timer: measures.
    """
    target, kinds = request.target, possible(request)
    inputs = [_inputs(request, extent, rows) for extent in extents]
    tried = (
        [] if isinstance(kinds, str) else [(kind, ranks) for kind in kinds for ranks in tried_ranks(kind, target.shape)]
    )
    chains = [
        nn.Sequential(*factored(target.layer, kind.name, ranks, any_factors(Choice(target, kind, ranks))))
        for kind, ranks in tried
    ]
    runs = [Run(module, x, partial(_without_hooks, module, x)) for module in (target.layer, *chains) for x in inputs]
    found = [_nanoseconds(each) for each in timer(runs)] if inputs else [0] * (1 + len(chains))
    step = max(1, len(inputs))
    whole, *times = (sum(found[start : start + step]) for start in range(0, len(found), step))
    points: dict[str, list[tuple[int, int]]] = {}
    for (kind, ranks), taken in zip(tried, times, strict=True):
        points.setdefault(kind.name, []).append((chain_macs(kind, target.shape, ranks, extents), taken))
    curves = {name: _rising(each) for name, each in points.items()}
    if not tried:
        return LayerCost(whole, lambda kind, ranks: whole, "no factors of it have fewer parameters")
    kind, ranks = tried[times.index(min(times))]
    reason = (
        f"none of its factors was faster: {_ms(min(times) / 1e9)} at the best ({kind.name} of rank "
        f"{', '.join(map(str, ranks))}), {_ms(whole / 1e9)} whole"
    )

    def cost(kind: Kind, ranks: Ranks) -> int:
        return (
            _between(curves[kind.name], chain_macs(kind, target.shape, ranks, extents))
            if kind.name in curves
            else whole
        )

    return LayerCost(whole, cost, reason)


def tried_ranks(kind: Kind, shape: LayerShape) -> list[Ranks]:
    """Ranks at which a kind is timed, smallest first, up to the largest that have fewer parameters than the layer.

    >>> from evolvenet.lowrank.kinds import KINDS
    >>> tried_ranks(KINDS["svd"], LayerShape(64, 64))
    [(1,), (3,), (7,), (15,), (23,), (31,)]
    """

    def at(share: float) -> Ranks:
        return kind.checked_ranks(shape, [max(1, int(share * rank)) for rank in kind.full_rank(shape)])

    paying = [
        percent / 100 for percent in range(1, 101) if kind.parameters(shape, at(percent / 100)) < shape.parameters
    ]
    return list(dict.fromkeys(at(share * paying[-1]) for share in SHARES)) if paying else []


def _inputs(request: Request, extent: Extent, rows: int) -> Tensor:
    """Random inputs of a layer, of the size of one call."""
    weight, shape = request.target.layer.get_parameter("weight"), request.target.shape
    size = (max(1, round(extent.times * rows)), shape.groups * shape.inputs, *extent.before)
    made = torch.randn(size, generator=torch.Generator().manual_seed(0), device="cpu").to(weight.device, weight.dtype)
    return laid_out_as(weight, made) if made.dim() == weight.dim() else made


def any_factors(choice: Choice) -> list[list[Tensor]]:
    """Random factors of a choice's shapes, which keep activations at their size: tiny numbers would be slow."""
    assert choice.kind is not None
    shape, generator = choice.target.shape, torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for step in choice.kind.steps(shape, choice.ranks):
        kernel = [size if axis in step.axes else 1 for axis, size in enumerate(shape.kernel)]
        size = (step.outputs, step.inputs // step.groups, *kernel)
        found.append(torch.randn(size, generator=generator, device="cpu") / math.sqrt(math.prod(size[1:])))
    return [found] * shape.groups


def _without_hooks(module: nn.Module, x: Tensor) -> object:
    """Run `forward` alone: hooks of the layer are the user's, and expect the model's own inputs."""
    forward: Callable[[Tensor], object] = module.forward
    return forward(x)


def _rising(points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(multiply-accumulates, time) by the first; no time is below one with fewer multiply-accumulates."""
    ordered = sorted(points)
    return [(macs, most) for (macs, _), most in zip(ordered, accumulate((t for _, t in ordered), max), strict=True)]


def _between(points: Sequence[tuple[int, int]], macs: int) -> int:
    """The time at some multiply-accumulates; below the first point its time, above the last one in proportion to it."""
    before = points[0]
    for point in points:
        if macs <= point[0]:
            share = 1.0 if point[0] == before[0] else (macs - before[0]) / (point[0] - before[0])
            return round(before[1] + max(0.0, share) * (point[1] - before[1]))
        before = point
    return round(before[1] * macs / before[0])


def _nanoseconds(given: float) -> int:
    return round(1e9 * given)


def _ms(given: float) -> str:
    return f"{1e3 * given:.3g} ms"
