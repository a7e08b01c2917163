"""`factorize`: layers replaced by chains of factors, with the optimizers, all or nothing."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.errors import FactorizationError
from evolvenet.graph.naming import named_tensors
from evolvenet.lowrank.attention import Split, of_projections, split_attentions
from evolvenet.lowrank.budget import within_budget
from evolvenet.lowrank.fit import Fitted, Observations, fit, observe
from evolvenet.lowrank.layers import factored
from evolvenet.lowrank.plan import (
    Choice,
    Rank,
    Request,
    SecondMoments,
    choose,
    decomposed,
    relative_error,
    requested,
    weights_of,
)
from evolvenet.lowrank.report import Factorization, LayerReport
from evolvenet.surgery.module_replacement import exchange_modules
from evolvenet.surgery.optimizer_parameters import as_list, parameter_names, replace_parameters


@torch.no_grad()
def factorize(
    model: nn.Module,
    ranks: Rank | Mapping[str, Any] | None = None,
    kinds: str | Mapping[str, str] = "auto",
    batches: Iterable[Any] | None = None,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    parameters: int | None = None,
    macs: int | None = None,
    bytes: int | None = None,
) -> Factorization:
    """Replace dense layers and convolutions by chains of smaller layers, in place, all or nothing.

    A layer whose factors would not have fewer parameters stays whole, and the report says so. The factors are ordinary
    layers in a `FactoredLayer`, which knows its `kind`, its `ranks` and its `merged_weight`. The bias stays the parameter
    that it was. `nn.MultiheadAttention` is split into its four projections where one of them is factorized.

    Args:
        model: any module.
        ranks: for all layers, or {layer: its rank} for some. A rank is an int, a tuple of the kind's ranks, a share of energy
            to keep (0.99, the default), "evbmf", "gavish_donoho", or a rule of `evolvenet.lowrank.rank_choice`. In a dict it
            may come with a kind: ("spatial", 8).
        kinds: "auto" (SVD for dense layers and kernels of 1, Tucker-2 or spatial SVD, whichever is smaller, for others;
            Tucker-2 where the rank is given, channel SVD where there are few inputs), one of
            `evolvenet.lowrank.kinds.KINDS`, or {layer: kind}.
        batches: inputs of the model. With them the factors approximate the outputs of the layers: each layer, in execution
            order, is fitted on the inputs that it gets in the factorized model to the outputs that it had before, its bias
            or the running mean of a batch norm right after it included (`evolvenet.lowrank.fit`). Without them the factors
            approximate the weights, which is the baseline.
        optimizers: the one or those that hold the model's parameters. Factors take the place of their weight in its parameter
            group, with fresh state.
        parameters: most parameters of the whole model afterwards, in place of ranks: layers lose energy where it saves the most
            parameters, see `evolvenet.lowrank.budget`. The ranks are None, or {layer: None} for some layers alone.
        macs: likewise, most multiply-accumulates for one sample; needs batches.
        bytes: likewise, most bytes of the model's parameters and buffers in their own dtypes.

    Returns:
        What became of each layer.

    Raises:
        FactorizationError: if a layer that is named cannot be factorized as requested. Nothing has changed then.
        SpectrumError: for NaN or infinite weights or inputs.
        TraceError: for batches without a sample.

    >>> layer = nn.Linear(10, 10, bias=False)
    >>> layer.weight.data = torch.randn(10, 2) @ torch.randn(2, 10)
    >>> model, x = nn.Sequential(layer), torch.randn(100, 10)
    >>> before = model(x)
    >>> print(factorize(model, {"0": 2})["0"])
    0: svd of rank 2, 100 → 40 parameters, error ...
    >>> sum(parameter.numel() for parameter in model.parameters())
    40
    >>> bool((model(x) - before).abs().max() < 5e-6)
    True
    """

    def select(requests: Sequence[Request], seen: Observations | None) -> Sequence[Choice]:
        if parameters is None and macs is None and bytes is None:
            return [choose(request, {} if seen is None else seen.moments) for request in requests]
        _check_budget(ranks)
        return within_budget(model, requests, seen, most_parameters=parameters, most_macs=macs, most_bytes=bytes)

    with ExitStack() as undo:
        report = factorize_by(model, select, undo, ranks, kinds, batches, optimizers)
        undo.pop_all()
    return report


Select = Callable[[Sequence[Request], Observations | None], Sequence[Choice]]
"""(requests, what was observed with batches) → what becomes of each layer."""


@torch.no_grad()
def factorize_by(
    model: nn.Module,
    select: Select,
    undo: ExitStack,
    ranks: Rank | Mapping[str, Any] | None = None,
    kinds: str | Mapping[str, str] = "auto",
    batches: Iterable[Any] | None = None,
    optimizers: Optimizer | Sequence[Optimizer] = (),
) -> Factorization:
    """`factorize` with a choice of one's own.

    Args:
        model: as for `factorize`, like all below.
        select: the choice of kinds and ranks.
        undo: closing it puts everything back, also what was done before a failure.
        ranks: of the layers in question.
        kinds: of the layers in question.
        batches: inputs of the model.
        optimizers: of the model.

    Returns:
        What became of each layer.

    Raises:
        FactorizationError, SpectrumError, TraceError: as `factorize`.
    """
    named = [*_names(ranks), *_names(kinds)] if isinstance(ranks, Mapping) else None
    splits = split_attentions(model, named, undo)
    requests = requested(model, of_projections(ranks, splits), of_projections(kinds, splits))
    layers = [request.target for request in requests if request.target.refusal is None]
    seen = None if batches is None or not layers else observe(model, layers, batches)
    moments = {} if seen is None else seen.moments
    choices = select(requests, seen)
    chosen = [choice for choice in choices if choice.refusal is None]
    if seen is None or not chosen:
        fitted = Fitted({choice.target.name: decomposed(choice, None) for choice in chosen}, {}, {})
    else:
        fitted = fit(model, chosen, seen)
    report = Factorization(tuple(_reported(choice, fitted, moments) for choice in choices))
    _install(model, choices, fitted, splits, as_list(optimizers), undo)
    return report


def _names(given: object) -> list[str]:
    return [str(name) for name in given] if isinstance(given, Mapping) else []


def _check_budget(ranks: object) -> None:
    given = list(ranks.values()) if isinstance(ranks, Mapping) else [ranks]
    if any(rank is not None for rank in given):
        raise FactorizationError(
            f"Factorize: expected no ranks with a budget, which chooses them, got {ranks!r}. "
            "To factorize some layers alone, pass {layer: None}."
        )


def _install(
    model: nn.Module,
    choices: Sequence[Choice],
    fitted: Fitted,
    splits: Mapping[str, Split],
    optimizers: Sequence[Optimizer],
    undo: ExitStack,
) -> None:
    """Put chains in the places of the layers; closing `undo` puts everything back."""
    tensors, _, _ = named_tensors(model)
    for name, value in fitted.values.items():
        undo.callback(_write, tensors[name], tensors[name].detach().clone())
        _write(tensors[name], value)
    exchanged: dict[nn.Module, nn.Module] = {}
    replaced: dict[Tensor, list[Tensor]] = {}
    for choice in choices:
        if choice.refusal is not None or choice.kind is None:
            continue
        target, kind = choice.target, choice.kind.name
        chain = factored(target.layer, kind, choice.ranks, fitted.factors[target.name])
        weights = [factor.get_parameter("weight") for factor in chain.factors]
        exchanged[target.layer] = chain
        for other in target.layers[1:]:
            exchanged[other] = factored(other, kind, choice.ranks, shared=weights)
        replaced[target.layer.get_parameter("weight")] = list(weights)
    exchange_modules(model, exchanged, undo)
    for split in splits.values():
        if any(module in exchanged.values() for module in split.made.children()):
            composed = {
                old: [new for part in parts for new in replaced.pop(part, [part])]
                for old, parts in split.replaced.items()
            }
            replaced.update(composed)
        else:
            exchange_modules(model, {split.made: split.attention}, undo)
    replace_parameters(optimizers, replaced, parameter_names(model), undo)


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _reported(choice: Choice, fitted: Fitted, moments: SecondMoments) -> LayerReport:
    name, shape = choice.target.name, choice.target.shape
    if choice.refusal is not None or choice.kind is None:
        return LayerReport(name, None, (), shape.parameters, shape.parameters, reason=choice.refusal)
    merged = torch.stack([choice.kind.merged(group, shape.inputs) for group in fitted.factors[name]])
    error = fitted.errors.get(name)
    if error is None:
        error = relative_error(weights_of(choice.target), merged, moments.get(name))
    return LayerReport(name, choice.kind.name, choice.ranks, shape.parameters, choice.parameters, error)
