"""Sizes found anew from losses that are measured with all widths cut, as losses of single cuts do not always add up.

Two widths that hold the same lose nothing when either is cut, and everything when both are; behind a narrow width another one
needs less. A round measures, with all widths at the sizes found so far, what each loses when it is a quarter narrower and gains
when it is a third wider. From these curves the sizes are found anew, within the measured ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.host_model import on_host
from evolvenet.pruning.marginal_analysis import convex, fit_to_cost
from evolvenet.pruning.selection import plan_prune
from evolvenet.pruning.trial_data import Loss, TrialData
from evolvenet.pruning.trials import Curve

NEAR = (3 / 4, 4 / 3)
"""Of a width's size, what is tried beside it."""


def joint_loss(
    model: nn.Module, graph: WidthGraph, batches: Sequence[Any], samples: int, loss: Loss
) -> Callable[[Mapping[str, int]], float]:
    """What is lost when all widths are cut to some sizes at once and their consumers fitted, as a function of the sizes.

    The arguments are those of `trial_curves`. The moments of all widths are gathered at once.
    """
    host, data = on_host(model), TrialData.of(model, graph, batches, samples, loss)
    statistics, whole = collect(model, graph, data.all), data.measured()
    recording = data.recording([width.name for width in graph.resizable])

    def lost(sizes: Mapping[str, int]) -> float:
        return data.lost(whole, plan_prune(model, graph, sizes, statistics, host), recording)

    return lost


def refined(
    sizes: Mapping[str, int],
    options: Mapping[str, Sequence[int]],
    loss: Callable[[Mapping[str, int]], float],
    cost: Callable[[Mapping[str, int]], float],
    limit: float,
    rounds: int,
) -> dict[str, int]:
    """Sizes after some rounds, each from the best ones so far; it ends with the first round that does not lower the loss.

    Args:
        sizes: to begin with, each one of its options.
        options: of each width, the sizes that it may take, ascending.
        loss: of some sizes together.
        cost: of some sizes.
        limit: of the cost, within which `sizes` are.
        rounds: at most.

    >>> def loss(sizes):
    ...     return 8 / max(sizes.values()) + 1 / min(sizes.values())  # either of both may be small
    >>> refined({"a": 4, "b": 4}, {"a": range(1, 9), "b": range(1, 9)}, loss, lambda sizes: sum(sizes.values()), 8, rounds=3)
    {'a': 2, 'b': 6}
    """
    best, least = dict(sizes), loss(sizes)
    for _ in range(rounds):
        curves = {name: _nearby(name, best, least, options[name], loss) for name in best}
        within = {
            name: [size for size in options[name] if curve[0][0] <= size <= curve[-1][0]]
            for name, curve in curves.items()
        }
        start = {name: each[-1] for name, each in within.items()}
        found = fit_to_cost({name: convex(curve) for name, curve in curves.items()}, within, start, cost, limit)
        lost = loss(found) if found != best else least
        if lost >= least:
            break
        best, least = found, lost
    return best


def _nearby(
    name: str, sizes: Mapping[str, int], lost: float, options: Sequence[int], loss: Callable[[Mapping[str, int]], float]
) -> Curve:
    """The loss at the sizes and with one of them smaller and larger, by that size; a larger one loses no more."""
    here = sizes[name]
    smaller, larger = ([size for size in options if size < here], [size for size in options if size > here])
    tried = [
        min(each, key=lambda size: abs(size - way * here))
        for each, way in zip((smaller, larger), NEAR, strict=True)
        if each
    ]
    points = sorted([(here, lost), *((size, loss({**sizes, name: size})) for size in tried)])
    return [(size, max(loss for _, loss in points[place:])) for place, (size, _) in enumerate(points)]
