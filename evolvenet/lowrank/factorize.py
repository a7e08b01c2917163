"""`factorize` and `merge`: layers replaced by chains of factors and back, with the optimizers, all or nothing."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import parameter_table
from evolvenet.errors import FactorizationError
from evolvenet.graph.naming import named_tensors
from evolvenet.lowrank.fit import Fitted, fit, observe
from evolvenet.lowrank.layers import FactoredLayer, factored
from evolvenet.lowrank.plan import (
    Choice,
    Rank,
    SecondMoments,
    choose,
    decomposed,
    relative_error,
    requested,
    weights_of,
)
from evolvenet.lowrank.report import Factorization, LayerReport
from evolvenet.surgery.module_replacement import Replacement, exchange_modules, replacements
from evolvenet.surgery.optimizer_parameters import replace_parameters


@torch.no_grad()
def factorize(
    model: nn.Module,
    ranks: Rank | Mapping[str, Any] | None = None,
    kinds: str | Mapping[str, str] = "auto",
    batches: Iterable[Any] | None = None,
    optimizers: Optimizer | Sequence[Optimizer] = (),
) -> Factorization:
    """Replace dense layers and convolutions by chains of smaller layers, in place, all or nothing.

    A layer whose factors would not have fewer parameters stays whole, and the report says so. The factors are ordinary
    layers in a `FactoredLayer`, which knows its `kind`, its `ranks` and its `merged_weight`. The bias stays the parameter
    that it was.

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
    requests = requested(model, ranks, kinds)
    layers = [request.target for request in requests if request.target.refusal is None]
    seen = None if batches is None or not layers else observe(model, layers, batches)
    moments = {} if seen is None else seen.moments
    choices = [choose(request, moments) for request in requests]
    chosen = [choice for choice in choices if choice.refusal is None]
    if seen is None or not chosen:
        fitted = Fitted({choice.target.name: decomposed(choice, None) for choice in chosen}, {}, {})
    else:
        fitted = fit(model, chosen, seen)
    report = Factorization(tuple(_reported(choice, fitted, moments) for choice in choices))
    with ExitStack() as undo:
        _install(model, choices, fitted, _as_list(optimizers), undo)
        undo.pop_all()
    return report


def merge(
    model: nn.Module, names: Iterable[str] | None = None, optimizers: Optimizer | Sequence[Optimizer] = ()
) -> tuple[str, ...]:
    """Put whole layers back in the place of factorized ones, in place, all or nothing. The outputs stay the same.

    Args:
        model: any module.
        names: paths of the layers; None for all that are factorized.
        optimizers: the one or those that hold the model's parameters. A weight takes the place of its first factor, with
            fresh state.

    Returns:
        The paths of the merged layers.

    Raises:
        FactorizationError: if there is no factorized layer of a name. Nothing has changed then.

    >>> model = nn.Sequential(nn.Linear(10, 10))
    >>> _ = factorize(model, 2)
    >>> merge(model)
    ('0',)
    >>> model
    Sequential(
      (0): Linear(in_features=10, out_features=10, bias=True)
    )
    """
    there = replacements(model)
    wanted = list(there) if names is None else list(names)
    for name in wanted:
        if name not in there:
            raise FactorizationError(
                f"Merge: expected names of factorized layers, got {name!r}. The model has {', '.join(there) or 'none'}."
            )
    wholes: dict[nn.Module, nn.Module] = {}
    replaced: dict[Tensor, list[Tensor]] = {}
    for module in dict.fromkeys(there[name] for name in wanted):
        wholes[module] = _whole(module, replaced)
    with ExitStack() as undo:
        exchange_modules(model, wholes, undo)
        replace_parameters(_as_list(optimizers), replaced, _names(model), undo)
        undo.pop_all()
    return tuple(wanted)


def _whole(module: Replacement, replaced: dict[Tensor, list[Tensor]]) -> nn.Module:
    """The whole layer; chains that share their factors share its weight."""
    whole = module.whole()
    if isinstance(module, FactoredLayer):
        first, *rest = (factor.get_parameter("weight") for factor in module.factors)
        if first in replaced:
            (weight,) = replaced[first]
            parameter_table(whole)["weight"] = weight  # type: ignore[assignment]
        replaced[first] = [whole.get_parameter("weight")]
        replaced.update({factor: [] for factor in rest})
    return whole


def _install(
    model: nn.Module,
    choices: Sequence[Choice],
    fitted: Fitted,
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
    replace_parameters(optimizers, replaced, _names(model), undo)


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


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _as_list(optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
