"""Ranks of all layers for a number of parameters or multiply-accumulates, by the energy lost per cost saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from evolvenet.errors import FactorizationError
from evolvenet.linalg.spectrum import energy_shares
from evolvenet.lowrank.base import Kind, Ranks
from evolvenet.lowrank.fit import Extent, Observations
from evolvenet.lowrank.plan import Choice, Request, possible, spectra
from evolvenet.lowrank.rank_choice import Energy, Spectrum
from evolvenet.measurement.cost import macs, parameters
from evolvenet.pruning.allocation import convex, fit_to_cost

GRID = tuple(1 - 10 ** (-6 + 0.1 * step) for step in range(60))
"""Shares of energy whose ranks are compared, from 0.999999 down to 0.2."""


@dataclass(frozen=True)
class Option:
    """One way to factorize a layer.

    Args:
        cost: of the factors.
        loss: −log of the share of energy that they keep; shares of layers in sequence multiply, so losses add up.
        kind: of the factors; None for the whole layer.
        ranks: of the factors.
    """

    cost: int
    loss: float
    kind: Kind | None = None
    ranks: Ranks = ()


def within_budget(
    model: nn.Module,
    requests: Sequence[Request],
    seen: Observations | None,
    *,
    most_parameters: int | None = None,
    most_macs: int | None = None,
) -> list[Choice]:
    """The kind and the ranks of each layer, so that the model is within one budget.

    For each layer and each kind that comes into question, the loss is −log of the share of energy that the ranks keep: of
    the outputs' where there are observations, of the weight's otherwise. Beginning with whole layers, the step is taken next
    whose loss rises least for the cost that it saves (`pruning.allocation.fit_to_cost`). Of each layer's options those on the
    lower convex hull of loss over cost count, so that factors are reached that pay only some way below the whole layer.

    Args:
        model: with whole layers.
        requests: for its layers; their ranks have no effect.
        seen: from `observe`; needed for multiply-accumulates.
        most_parameters: of the whole model.
        most_macs: of the whole model, for one sample.

    Raises:
        FactorizationError: if the model cannot be made so small, or multiply-accumulates are limited without batches.
    """
    if (most_parameters is None) == (most_macs is None):
        raise FactorizationError("Budget: expected either `parameters` or `macs`, got both or none.")
    if most_macs is not None and seen is None:
        raise FactorizationError("Budget: expected batches with `macs`, got none. They give the sizes of the images.")
    limit = most_parameters if most_parameters is not None else most_macs
    extents = seen.extents if seen is not None and most_macs is not None else None
    options = {
        request.target.name: _options(request, seen, extents) for request in requests if request.target.refusal is None
    }
    total = parameters(model) if seen is None or extents is None else macs(model, seen.batch)
    rest = total - sum(each[-1].cost for each in options.values())
    chosen = fit_to_cost(
        {name: [(option.cost, option.loss) for option in each] for name, each in options.items()},
        {name: [option.cost for option in each] for name, each in options.items()},
        {name: each[-1].cost for name, each in options.items()},
        lambda sizes: rest + sum(sizes.values()),
        limit or 0,
    )
    if limit is not None and (least := rest + sum(chosen.values())) > limit:
        what = "parameters" if most_macs is None else "multiply-accumulates"
        raise FactorizationError(
            f"Budget: expected {least:,} {what} or more, the fewest that factors of these layers reach, got {limit:,}. "
            "Prune widths as well."
        )
    by_cost = {name: {option.cost: option for option in each} for name, each in options.items()}
    return [_choice(request, by_cost, chosen) for request in requests]


def _choice(request: Request, options: Mapping[str, Mapping[int, Option]], chosen: Mapping[str, int]) -> Choice:
    target = request.target
    if target.refusal is not None:
        return Choice(target, refusal=target.refusal)
    option = options[target.name][chosen[target.name]]
    if option.kind is not None:
        return Choice(target, option.kind, option.ranks)
    reason = possible(request)
    return Choice(target, refusal=reason if isinstance(reason, str) else "within the budget it is worth its cost")


def _options(
    request: Request, seen: Observations | None, extents: Mapping[str, Sequence[Extent]] | None
) -> list[Option]:
    """The whole layer and its factors on the lower convex hull of loss over cost, by cost."""
    target, shape = request.target, request.target.shape
    own = None if extents is None else extents[target.name]
    whole = Option(shape.parameters if own is None else _whole_macs(request, own), 0.0)
    kinds = possible(request)
    found: dict[int, Option] = {whole.cost: whole}
    for kind in () if isinstance(kinds, str) else kinds:
        all_spectra = spectra(kind, target, None if seen is None else seen.moments.get(target.name))
        shares = [energy_shares(spectrum.values) for spectrum in all_spectra]
        for kept in GRID:
            ranks = kind.checked_ranks(shape, kind.combined([Energy(kept).rank(each) for each in all_spectra]))
            cost = kind.parameters(shape, ranks) if own is None else _macs(kind, request, ranks, own)
            option = Option(cost, _loss(kind, shares, all_spectra, ranks), kind, ranks)
            smaller = cost < whole.cost and kind.parameters(shape, ranks) < shape.parameters
            if smaller and (cost not in found or option.loss < found[cost].loss):
                found[cost] = option
    return [found[cost] for cost, _ in convex([(option.cost, option.loss) for option in found.values()])]


def _loss(kind: Kind, shares: Sequence[Tensor], found: Sequence[Spectrum], ranks: Ranks) -> float:
    each = ranks if len(ranks) == len(found) else ranks * len(found)
    lost = sum(float(share.sort(descending=True).values[rank:].sum()) for share, rank in zip(shares, each, strict=True))
    return -math.log(max(1e-12, 1 - min(lost, 1.0)))


def _whole_macs(request: Request, extents: Sequence[Extent]) -> int:
    entries = request.target.shape.parameters
    return round(
        sum(each.times * entries * math.prod(each.before if each.transposed else each.after) for each in extents)
    )


def _macs(kind: Kind, request: Request, ranks: Ranks, extents: Sequence[Extent]) -> int:
    shape = request.target.shape
    return round(
        sum(each.times * kind.macs(shape, ranks, each.before, each.after, each.transposed) for each in extents)
    )
