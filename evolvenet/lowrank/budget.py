"""Ranks of all layers for a number of parameters, bytes or multiply-accumulates, by the energy lost per cost saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from evolvenet.errors import FactorizationError
from evolvenet.linalg.spectrum import energy_shares
from evolvenet.lowrank.base import Kind, LayerShape, Ranks
from evolvenet.lowrank.fit import Extent, Observations
from evolvenet.lowrank.plan import Choice, Request, possible, spectra
from evolvenet.lowrank.rank_choice import Energy, Spectrum
from evolvenet.measurement.cost import macs, parameters, size_in_bytes
from evolvenet.pruning.marginal_analysis import convex, fit_to_cost

GRID = tuple(1 - 10 ** (-6 + 0.1 * step) for step in range(60))
"""Shares of energy whose ranks are compared, from 0.999999 down to 0.2."""


Loss = Callable[[str, Kind, float], float]
"""(name of a layer, kind, share of the energy that its factors lose) → loss."""


def energy_loss(layer: str, kind: Kind, lost: float) -> float:
    """−log of the share of energy that factors keep; shares of layers in sequence multiply, so losses add up.

    >>> from evolvenet.lowrank.kinds import kind_named
    >>> round(energy_loss("0", kind_named("svd"), 0.5), 3)
    0.693
    """
    return -math.log(max(1e-12, 1 - lost))


def energy_lost(found: Sequence[Spectrum], ranks: Ranks) -> float:
    """The share of energy, 0 … 1, that ranks lose; of several unfoldings the sum, which is an upper bound.

    Args:
        found: the spectrum of each unfolding.
        ranks: one for each, or one for all.

    >>> import torch
    >>> energy_lost([Spectrum(torch.tensor([2.0, 1.0]), 2, 2)], (1,))
    0.2
    """
    each = ranks if len(ranks) == len(found) else ranks * len(found)
    shares = [energy_shares(spectrum.values).sort(descending=True).values for spectrum in found]
    return min(1.0, sum(float(share[rank:].sum()) for share, rank in zip(shares, each, strict=True)))


@dataclass(frozen=True)
class Option:
    """One way to factorize a layer.

    Args:
        cost: of the factors.
        loss: of the network with these factors; losses of several layers add up.
        kind: of the factors; None for the whole layer.
        ranks: of the factors.
    """

    cost: int
    loss: float
    kind: Kind | None = None
    ranks: Ranks = ()


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Args:
        whole: as it is.
        of: kind and ranks → cost of its factors.
        reason: why it stays whole, where none of its factors costs less.
    """

    whole: int
    of: Callable[[Kind, Ranks], int]
    reason: str = "no factors of it cost less"


def within_budget(
    model: nn.Module,
    requests: Sequence[Request],
    seen: Observations | None,
    *,
    most_parameters: int | None = None,
    most_macs: int | None = None,
    most_bytes: int | None = None,
    loss: Loss = energy_loss,
) -> list[Choice]:
    """The kind and the ranks of each layer, so that the model is within one budget; see `least_loss`.

    Args:
        model: with whole layers.
        requests: for its layers; their ranks have no effect.
        seen: from `observe`; needed for multiply-accumulates.
        most_parameters: of the whole model.
        most_macs: of the whole model, for one sample.
        most_bytes: of the whole model's parameters and buffers, in their own dtypes.
        loss: of a layer, from the share of energy that its factors lose.

    Raises:
        FactorizationError: if the model cannot be made so small, or multiply-accumulates are limited without batches.
    """
    given = [limit for limit in (most_parameters, most_macs, most_bytes) if limit is not None]
    assert len(given) == 1
    (limit,) = given
    if most_macs is not None:
        if seen is None:
            raise FactorizationError(
                "Budget: expected batches with `macs`, got none. They give the sizes of the images."
            )
        total, unit = macs(model, seen.batch), "multiply-accumulates"
        costs = {name: _by_macs(request, seen.extents[name]) for name, request in factorizable(requests).items()}
    else:
        total, unit = (size_in_bytes(model), "bytes") if most_bytes is not None else (parameters(model), "parameters")
        costs = {name: _by_entries(request, unit == "bytes") for name, request in factorizable(requests).items()}
    options = {name: options_of(request, seen, costs[name], loss) for name, request in factorizable(requests).items()}
    chosen, least = least_loss(options, total, limit)
    if least > limit:
        raise FactorizationError(
            f"Budget: expected {least:,} {unit} or more, the fewest that factors of these layers reach, got {limit:,}. "
            "Prune widths as well."
        )
    return choices_of(requests, chosen, {name: costs[name].reason for name in options if len(options[name]) == 1})


def factorizable(requests: Sequence[Request]) -> dict[str, Request]:
    """{name of the layer: request} of those that are not refused."""
    return {request.target.name: request for request in requests if request.target.refusal is None}


def least_loss(options: Mapping[str, Sequence[Option]], total: int, limit: int) -> tuple[dict[str, Option], int]:
    """One option for each layer, so that the model is within a limit.

    Beginning with whole layers, the step is taken next whose loss rises least for the cost that it saves
    (`pruning.allocation.fit_to_cost`).

    Args:
        options: from `options_of`, by cost; the last one of each layer is the whole layer.
        total: cost of the model with whole layers.
        limit: of the model's cost.

    Returns:
        {name: option}, and the model's cost with them; it is above the limit if that cannot be reached.

    >>> options = {"a": [Option(4, 0.5), Option(8, 0.0)], "b": [Option(4, 0.1), Option(8, 0.0)]}
    >>> chosen, cost = least_loss(options, total=20, limit=16)
    >>> [chosen[name].cost for name in "ab"], cost
    ([8, 4], 16)
    """
    rest = total - sum(each[-1].cost for each in options.values())
    chosen = fit_to_cost(
        {name: [(option.cost, option.loss) for option in each] for name, each in options.items()},
        {name: [option.cost for option in each] for name, each in options.items()},
        {name: each[-1].cost for name, each in options.items()},
        lambda sizes: rest + sum(sizes.values()),
        limit,
    )
    by_cost = {name: {option.cost: option for option in each} for name, each in options.items()}
    return {name: by_cost[name][cost] for name, cost in chosen.items()}, rest + sum(chosen.values())


def choices_of(requests: Sequence[Request], chosen: Mapping[str, Option], reasons: Mapping[str, str]) -> list[Choice]:
    """The choice of each layer.

    Args:
        requests: for the layers.
        chosen: one option for each of them that is not refused.
        reasons: {name: why it stays whole}, of layers without other options.
    """
    found: list[Choice] = []
    for request in requests:
        target = request.target
        if target.refusal is not None:
            found.append(Choice(target, refusal=target.refusal))
            continue
        option, kinds = chosen[target.name], possible(request)
        if option.kind is not None:
            found.append(Choice(target, option.kind, option.ranks))
        elif isinstance(kinds, str):
            found.append(Choice(target, refusal=kinds))
        else:
            reason = reasons.get(target.name, "within the budget it is worth its cost")
            found.append(Choice(target, refusal=reason))
    return found


def options_of(request: Request, seen: Observations | None, cost: LayerCost, loss: Loss = energy_loss) -> list[Option]:
    """The whole layer and its factors on the lower convex hull of loss over cost, by cost.

    For each kind that comes into question, the loss follows from the share of energy that the ranks lose: of the outputs'
    where there are observations, of the weight's otherwise. Only the hull counts, so that factors are reached that pay only
    some way below the whole layer. Factors that have as many parameters as the layer, or cost as much, are left out.
    """
    found = {option.cost: option for option in affordable(request, seen, cost, loss)}
    found[cost.whole] = Option(cost.whole, 0.0)
    return [found[size] for size, _ in convex([(option.cost, option.loss) for option in found.values()])]


def affordable(request: Request, seen: Observations | None, cost: LayerCost, loss: Loss = energy_loss) -> list[Option]:
    """Factors of a layer that are smaller and cost less than it; of several at one cost, that with the least loss."""
    target, shape = request.target, request.target.shape
    kinds = possible(request)
    found: dict[int, Option] = {}
    for kind in () if isinstance(kinds, str) else kinds:
        all_spectra = spectra(kind, target, None if seen is None else seen.moments.get(target.name))
        for ranks in ranks_by_energy(kind, request, all_spectra):
            option = Option(cost.of(kind, ranks), loss(target.name, kind, energy_lost(all_spectra, ranks)), kind, ranks)
            smaller = option.cost < cost.whole and kind.parameters(shape, ranks) < shape.parameters
            if smaller and (option.cost not in found or option.loss < found[option.cost].loss):
                found[option.cost] = option
    return [found[size] for size in sorted(found)]


def ranks_by_energy(kind: Kind, request: Request, all_spectra: Sequence[Spectrum]) -> list[Ranks]:
    """The ranks that keep the shares of energy of `GRID`, largest first, each once."""
    found = (kind.combined([Energy(kept).rank(each) for each in all_spectra]) for kept in GRID)
    return list(dict.fromkeys(kind.checked_ranks(request.target.shape, ranks) for ranks in found))


def layer_cost(kind: str, request: Request, seen: Observations) -> LayerCost:
    """What a layer costs.

    Args:
        kind: of the cost: "params", "bytes" or "macs".
        request: for the layer.
        seen: from `observe`.
    """
    if kind == "macs":
        return _by_macs(request, seen.extents[request.target.name])
    return _by_entries(request, kind == "bytes")


def _by_entries(request: Request, in_bytes: bool) -> LayerCost:
    """The cost of a layer in entries of its weight, or in their bytes."""
    each = request.target.layer.get_parameter("weight").element_size()
    return _cost_of("bytes" if in_bytes else "params", request, (), each)


def _by_macs(request: Request, extents: Sequence[Extent]) -> LayerCost:
    """The cost of a layer in multiply-accumulates for one sample."""
    return _cost_of("macs", request, extents, 1)


def _cost_of(cost: str, request: Request, extents: Sequence[Extent], each: int) -> LayerCost:
    shape = request.target.shape
    return LayerCost(
        round(whole_cost(cost, shape, extents, each)),
        lambda kind, ranks: round(chain_cost(cost, shape, kind, ranks, extents, each)),
    )


def whole_cost(cost: str, shape: LayerShape, extents: Sequence[Extent], entry_bytes: int) -> float:
    """What a whole layer costs.

    Args:
        cost: "params", "bytes" or "macs".
        shape: of its weight.
        extents: sizes of its inputs and outputs in each call; multiply-accumulates are those of one sample in all calls.
        entry_bytes: of one entry of its weight.

    >>> whole_cost("macs", LayerShape(8, 4, (3, 3)), [Extent((6, 6), (4, 4), False, 1.0)], 4)
    4608.0
    """
    if cost == "macs":
        places = sum(each.times * math.prod(each.before if each.transposed else each.after) for each in extents)
        return places * shape.parameters
    return float(shape.parameters * (entry_bytes if cost == "bytes" else 1))


def chain_cost(
    cost: str, shape: LayerShape, kind: Kind, ranks: Ranks, extents: Sequence[Extent], entry_bytes: int
) -> float:
    """What factors of a layer cost; arguments as for `whole_cost`."""
    if cost == "macs":
        return float(chain_macs(kind, shape, ranks, extents))
    return float(kind.parameters(shape, ranks) * (entry_bytes if cost == "bytes" else 1))


def chain_macs(kind: Kind, shape: LayerShape, ranks: Ranks, extents: Sequence[Extent]) -> int:
    """Multiply-accumulates of a layer's factors for one sample, in all its calls."""
    return round(
        sum(each.times * kind.macs(shape, ranks, each.before, each.after, each.transposed) for each in extents)
    )
