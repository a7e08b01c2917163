"""Sizes of all widths for a number of parameters, by the loss per cost of cutting each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from evolvenet.errors import PolicyError, ResizeError
from evolvenet.graph.current import check_current
from evolvenet.graph.restriction import Restriction
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.linalg.spectrum import Values, energy_shares
from evolvenet.pruning.equal_shares import equal_shares, live_units
from evolvenet.pruning.joint_rounds import joint_loss, refined
from evolvenet.pruning.marginal_analysis import convex, fit_to_cost, loss_at
from evolvenet.pruning.trial_data import Loss
from evolvenet.pruning.trials import SAMPLES, SHARES, Curve, filled, smallest, trial_curves

_LEAST = 1e-12


class Allocation(dict[str, int]):
    """Sizes for a number of parameters, {width: size}, with the losses that they were found by.

    Attributes:
        curves: {width: its loss at some sizes}, as measured; empty where there were no batches.

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sizes = allocate(model, trace(model, torch.zeros(1, 8)), 60, [torch.randn(64, 8)])
    >>> sizes, sizes.at(40)
    ({'0': 5}, {'0': 3})
    """

    def __init__(
        self, sizes: Mapping[str, int], graph: WidthGraph, curves: Mapping[str, Curve], units: Mapping[str, int]
    ) -> None:
        super().__init__(sizes)
        self.curves = curves
        self._graph, self._units = graph, units

    def at(self, parameters: int, uniform: str | None = None, multiple: int = 1) -> Allocation:
        """Sizes of the same network for another number of parameters, from the same trials.

        Args:
            parameters: see `allocate`, like the others.
            uniform: "layers" or None.
            multiple: of the channels.

        Raises:
            PolicyError, ResizeError: as `allocate`.
        """
        graph = Restriction(multiple=multiple).apply(self._graph)
        together = equal_layers(graph, uniform)
        if self.curves:
            sizes = allocate_by(graph, self.curves, parameters, together)
        else:
            sizes = _by_equal_shares(graph, self._units, parameters, together)
        return Allocation(sizes, self._graph, self.curves, self._units)


def allocate(  # noqa: PLR0913  each is a choice of its own
    model: nn.Module,
    graph: WidthGraph,
    parameters: int,
    batches: Iterable[Any] | None = None,
    uniform: str | None = None,
    multiple: int = 1,
    samples: int = SAMPLES,
    shares: Sequence[float] = SHARES,
    loss: Loss = "outputs",
    rounds: int = 0,
) -> Allocation:
    """Sizes with which the model has at most so many parameters, cut where the loss per parameter saved is least.

    With batches each width alone is cut to some of its sizes, its consumers are reconstructed as in `prune`, and the loss is
    measured, by default the relative error of the model's outputs: Σ‖y' − y‖² / Σ‖y − mean‖² over the samples. Losses of several
    widths are assumed to add up. Without batches all widths keep the same share of their units; those whose weights are 0 do not
    count. For other targets, ask the result: it repeats no trial.

    Args:
        model: the model of the graph.
        graph: its widths.
        parameters: most parameters that the model may have afterwards.
        batches: inputs of the model; None for equal shares.
        uniform: "layers" for equal sizes in all layers, see `equal_layers`; None for sizes of each width by itself. Models
            whose layers have to be built alike, such as those that a configuration of the transformers library describes,
            need them.
        multiple: of which the channels of every width that is cut are to be a multiple, see
            `evolvenet.graph.restriction.with_multiple`.
        samples: most samples of the batches that a trial runs on.
        shares: of a width's units that trials cut it to, 0 … 1, descending.
        loss: "outputs" for the relative error. "kl" where the outputs are logits, for the mean over the samples of KL(p ‖ p') in
            nats, of the probabilities before and after the cut. A function (outputs, labels) → one number, such as
            `torch.nn.functional.cross_entropy`, for what that rises by: then each batch is a pair of inputs and labels.
        rounds: in which the sizes are found anew from the losses of cuts of all widths at once, see
            `evolvenet.pruning.joint_rounds`. Each takes two such cuts for every width. The result's `at` knows nothing of them.

    Returns:
        {width: new size} of every resizable width, for `prune`; its method `at` gives the sizes for another target.

    Raises:
        PolicyError: for another value of `uniform` or `loss`, a multiple below 1, batches without labels for a
            function, or rounds without batches.
        ResizeError: if the model cannot be made so small, or the graph was made before the last change of widths.
        SpectrumError, TraceError: as `collect`.

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sizes = allocate(model, trace(model, torch.zeros(1, 8)), parameters=120)
    >>> sizes, sizes.at(80)
    ({'0': 6, '2': 7}, {'0': 5, '2': 4})
    >>> sizes.at(120, uniform="layers", multiple=2)
    {'0': 6, '2': 6}
    """
    check_current(model, graph)
    if rounds and batches is None:
        raise PolicyError(
            f"Allocate: expected batches for {rounds} rounds, got none. Give some inputs of the model, or rounds=0."
        )
    listed = [] if batches is None else list(batches)
    curves = {} if batches is None else trial_curves(model, graph, listed, shares, samples, loss)
    units = live_units(model, graph) if batches is None else {}
    found = Allocation({}, graph, curves, units).at(parameters, uniform, multiple)
    if not rounds:
        return found
    restricted = Restriction(multiple=multiple).apply(graph)
    groups = {names[0]: names for names in equal_layers(restricted, uniform)}
    lost = joint_loss(model, graph, listed, samples, loss)

    def each(sizes: Mapping[str, int]) -> dict[str, int]:
        return {**found, **{name: size for first, size in sizes.items() for name in groups[first]}}

    sizes = refined(
        {first: found[first] for first in groups},
        common_sizes(restricted, groups),
        lambda chosen: lost(each(chosen)),
        lambda chosen: graph.proposed_parameters(each(chosen)),
        parameters,
        rounds,
    )
    return Allocation(each(sizes), graph, curves, units)


def _by_equal_shares(
    graph: WidthGraph, units: Mapping[str, int], parameters: int, together: Sequence[tuple[str, ...]]
) -> dict[str, int]:
    groups = {names[0]: names for names in together}

    def each(sizes: Mapping[str, int]) -> dict[str, int]:
        return {name: size for first, size in sizes.items() for name in groups[first]}

    sizes = equal_shares(
        {first: max(units[name] for name in names) for first, names in groups.items()},
        common_sizes(graph, groups),
        lambda chosen: graph.proposed_parameters(each(chosen)),
        parameters,
    )
    return _within(graph, {**graph.sizes, **each(sizes)}, parameters)


def _within(graph: WidthGraph, sizes: dict[str, int], parameters: int) -> dict[str, int]:
    """The sizes, if they are within the limit.

    Raises:
        ResizeError: if not: these are the smallest ones.
    """
    if (fewest := graph.proposed_parameters(sizes)) > parameters:
        raise ResizeError(
            f"Allocate: expected {fewest:,} parameters or more, the fewest that the model can have, got {parameters:,}."
        )
    return sizes


def common_sizes(graph: WidthGraph, groups: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The sizes that all widths of a group may take, ascending, by the group's name."""
    return {
        first: sorted(set.intersection(*(set(possible_sizes(graph.widths[name])) for name in names)))
        for first, names in groups.items()
    }


def equal_layers(graph: WidthGraph, uniform: str | None) -> list[tuple[str, ...]]:
    """The widths that get one size.

    Args:
        graph: the widths.
        uniform: "layers" for those of one size that modules of the same name produce, whatever the numbers and modules before
            it: the inner units of all blocks, also of encoder and decoder. None for each width by itself.

    Raises:
        PolicyError: for another value.

    >>> from torch import zeros
    >>> from evolvenet.tracing.trace import trace
    >>> blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)])
    >>> equal_layers(trace(blocks, zeros(1, 4)), "layers")
    [('0.0', '1.0'), ('0.2',)]
    """
    if uniform is None:
        return [(width.name,) for width in graph.resizable]
    if uniform != "layers":
        raise PolicyError(f'Expected uniform to be None or "layers", got {uniform!r}.')
    found: dict[object, tuple[str, ...]] = {}
    for width in graph.resizable:
        modules = frozenset(_without_numbers(tie.module) for tie in width.producers)
        key = (modules, width.name.partition("#")[2], width.size, width.step)
        found[key] = (*found.get(key, ()), width.name)
    return list(found.values())


def _without_numbers(path: str) -> str:
    """The last name of a path; "" for a place in nothing but lists.

    >>> _without_numbers("encoder.layer.3.mlp.0"), _without_numbers("2")
    ('mlp', '')
    """
    return next((name for name in reversed(path.split(".")) if not name.isdigit()), "")


def energy_curve(spectrum: Values) -> Curve:
    """−log of the share of energy in the largest singular values, as many of them as each size keeps.

    What passes one width enters the next one, so kept shares multiply, and their logarithms add up: a width that keeps
    next to nothing loses more than all others together could save.

    Args:
        spectrum: `[n]` singular values.

    Raises:
        SpectrumError: for values that are negative, NaN or infinite.

    >>> [(size, round(loss, 3)) for size, loss in energy_curve([3.0, 1.0])]
    [(0, 27.631), (1, 0.105), (2, 0.0)]
    """
    kept = energy_shares(spectrum).sort(descending=True).values.cumsum(0).clamp(_LEAST, 1).tolist()
    return [(0, -math.log(_LEAST)), *((size, -math.log(share)) for size, share in enumerate(kept, 1))]


def allocate_by(
    graph: WidthGraph,
    curves: Mapping[str, Curve],
    parameters: int,
    together: Sequence[tuple[str, ...]] | None = None,
) -> dict[str, int]:
    """Sizes with at most so many parameters, from curves of some widths, see `fit_to_cost`.

    Args:
        graph: the widths; those without a curve keep their size.
        curves: of each width.
        parameters: most parameters afterwards.
        together: widths that get one size, see `equal_layers`; each by itself by default.

    Returns:
        {width: size}, of every resizable width.

    Raises:
        ResizeError: if the model cannot be made so small.
    """
    sizes = allocate_to(graph, curves, graph.proposed_parameters, parameters, together)
    return _within(graph, sizes, parameters)


def allocate_to(
    graph: WidthGraph,
    curves: Mapping[str, Curve],
    cost: Callable[[Mapping[str, int]], float],
    limit: float,
    together: Sequence[tuple[str, ...]] | None = None,
) -> dict[str, int]:
    """`allocate_by` for any cost: the smallest sizes where even their cost is above the limit.

    Args:
        graph: the widths; those without a curve keep their size.
        curves: of each width.
        cost: of some sizes, for example `Costs.at` of a kind.
        limit: of the cost.
        together: widths of one size that get one size; those of which one has no curve keep theirs. Each by itself by default.
    """
    groups = {names[0]: names for names in together or [(name,) for name in curves] if all(n in curves for n in names)}
    hulls = {first: _summed([convex(filled(curves[name])) for name in names]) for first, names in groups.items()}
    options = common_sizes(graph, groups)

    def each(sizes: Mapping[str, int]) -> dict[str, int]:
        return {name: size for first, size in sizes.items() for name in groups[first]}

    return {**graph.sizes, **each(fit_to_cost(hulls, options, graph.sizes, lambda sizes: cost(each(sizes)), limit))}


def _summed(hulls: Sequence[Curve]) -> Curve:
    """The sum of convex curves, which is convex."""
    return [
        (size, sum(loss_at(hull, size) for hull in hulls)) for size in sorted({s for hull in hulls for s, _ in hull})
    ]


def possible_sizes(width: Width) -> list[int]:
    """The sizes that a cut may give a width, ascending: multiples of its step, and its present size.

    >>> possible_sizes(Width("0", size=7, step=3))
    [3, 6, 7]
    """
    return [size for size in range(smallest(width), width.size + 1) if size % width.step == 0 or size == width.size]
