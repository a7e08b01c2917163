"""Layers that become chains of two factors at an event, or whole again: with replicas, optimizers and graph, revertible."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import parameter_table
from evolvenet.engine.distributed import run_on_all_ranks, run_on_rank_0
from evolvenet.engine.event_data import EventData
from evolvenet.engine.history import WidthChange
from evolvenet.engine.transaction import Transaction
from evolvenet.errors import stage
from evolvenet.graph.factors import TwoFactors, with_factors, without_factors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.precision import in_float64
from evolvenet.lowrank.factorize import Work
from evolvenet.lowrank.fit import Fitted
from evolvenet.lowrank.kinds import kind_named
from evolvenet.lowrank.layer_ranks import LayerRank
from evolvenet.lowrank.layers import FactoredLayer, canonical, factored
from evolvenet.lowrank.merge import merge_by
from evolvenet.lowrank.plan import Choice
from evolvenet.policies.base import Proposal
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
from evolvenet.surgery.module_replacement import Record, Replacement, exchange_modules, replacements
from evolvenet.surgery.optimizer_parameters import parameter_names, replace_parameters


@dataclass(frozen=True, eq=False)
class NewFactors:
    """The factors of one layer, as plain data that rank 0 sends to all.

    Args:
        kind: name of their kind.
        rank: of them.
        weights: of both factors, `[rank, in, k…]` and `[out, rank, k…]`.
        before: units of the rank while the layer was whole.
    """

    kind: str
    rank: int
    weights: tuple[Tensor, Tensor]
    before: int


@dataclass(frozen=True, eq=False)
class FactorPlan:
    """What becomes of whole layers at an event.

    Args:
        layers: {path: its factors}.
        values: {name of a bias or a running mean: its new value}.
    """

    layers: Mapping[str, NewFactors]
    values: Mapping[str, Tensor]


def change_ranks(
    transaction: Transaction,
    graph: WidthGraph,
    data: EventData,
    proposals: Mapping[str, Proposal],
    first: Mapping[str, int],
) -> tuple[WidthGraph, dict[str, int]]:
    """Factorize the whole layers for whose ranks there are proposals, and merge the chains that do not pay (any more).

    Args:
        transaction: of the event.
        graph: the widths of the model as it is now.
        data: of the event.
        proposals: of the event, for widths and ranks.
        first: {name of a rank: units while its layer was whole}, as far as known.

    Returns:
        The graph of the changed model, and `first` of new ranks.
    """
    lowrank = data.lowrank
    if lowrank is None:
        return graph, {}
    new = {name: proposal for name, proposal in proposals.items() if name not in graph.widths}
    made: dict[str, int] = {}
    if new:
        graph, made = factorize_layers(transaction, graph, data, new, lowrank.restriction.multiple)

    def unprofitable() -> list[LayerRank]:
        return lowrank.ranks(transaction.model, graph, data.example_inputs).unprofitable(lowrank.kind)

    with stage("merge"):
        chains = run_on_rank_0(transaction.group, unprofitable)
    return (merge_layers(transaction, graph, chains, {**first, **made}) if chains else graph), made


def plan_factors(
    model: nn.Module, ranks: Mapping[str, LayerRank], sizes: Mapping[str, int], batches: Any
) -> FactorPlan:
    """Factors of whole layers, fitted to the layers' outputs in execution order. Nothing is changed yet.

    A layer whose factors would not be smaller, since widths around it have shrunk as well, is left out.

    Args:
        model: with these layers whole.
        ranks: {name of the rank: layer}.
        sizes: {name of the rank: new size}.
        batches: inputs of the model.
    """
    wanted = {ranks[name].layer: (ranks[name].kind.name, size) for name, size in sizes.items()}
    before = {ranks[name].layer: ranks[name].break_even + 1 for name in sizes}
    with ExitStack() as undo:
        work = Work.of(model, wanted, "auto", batches, undo, TRAINING_LIMITS)
        choices, _ = work.by_rules(common=False)
        fitted = work.fitted(choices)
    layers: dict[str, NewFactors] = {}
    for choice in choices:
        if choice.refusal is None and choice.kind is not None:
            first, last = fitted.factors[choice.target.name][0]
            name = choice.target.name
            layers[name] = NewFactors(choice.kind.name, choice.ranks[0], (first.cpu(), last.cpu()), before[name])
    return FactorPlan(layers, {name: value.cpu() for name, value in fitted.values.items()})


def factorize_layers(
    transaction: Transaction,
    graph: WidthGraph,
    data: EventData,
    proposals: Mapping[str, Proposal],
    step: int = 1,
) -> tuple[WidthGraph, dict[str, int]]:
    """Replace whole layers by chains, in the model, its replicas and its optimizers, on every rank.

    The factors of a replica have the model's first factor and a last one of its own, least squares on its own weight: an
    average of two networks' factors has a meaning in a common basis alone.

    Args:
        transaction: of the event.
        graph: the widths of the model as it is now.
        data: of the event.
        proposals: {name of a rank: size}; the same on every rank.
        step: of the new ranks, see `Width.step`.

    Returns:
        The graph of the changed model, and {name of a new rank: units while its layer was whole}.
    """

    def plan() -> FactorPlan:
        assert data.ranks is not None
        sizes = {name: proposal.size for name, proposal in proposals.items()}
        return plan_factors(transaction.model, data.ranks, sizes, transaction.batches)

    with stage("factorization"):
        found = run_on_rank_0(transaction.group, plan)
        run_on_all_ranks(transaction.group, partial(_install_everywhere, transaction, found))
    before: dict[str, int] = {}
    for layer, new in found.layers.items():
        names = _named(transaction.model, layer)
        graph = with_factors(graph, names, step)
        before[names.rank] = new.before
        reason = proposals[names.rank].reason
        transaction.changes.append(WidthChange(names.rank, new.before, new.rank, f"factorized: {reason}"))
    return graph, before


def merge_layers(
    transaction: Transaction, graph: WidthGraph, chains: Sequence[LayerRank], first: Mapping[str, int]
) -> WidthGraph:
    """Make layers whole again whose factors do not pay, in the model, its replicas and its optimizers, on every rank.

    Args:
        transaction: of the event.
        graph: the widths of the model as it is now.
        chains: the layers; the same on every rank.
        first: {name of the rank: units while the layer was whole}.

    Returns:
        The graph of the changed model.
    """
    paths = [rank.layer for rank in chains]

    act = partial(_merge_all, transaction.model, paths, transaction.optimizers, transaction.replicas, transaction.undo)
    with stage("merge"):
        run_on_all_ranks(transaction.group, act)
    for rank in chains:
        size = graph.widths[rank.name].size
        graph = without_factors(graph, rank.factors)
        reason = "whole again: its factors cost no less"
        transaction.changes.append(WidthChange(rank.name, size, first.get(rank.name, rank.break_even + 1), reason))
    return graph


def _install_everywhere(transaction: Transaction, plan: FactorPlan) -> None:
    olds = {path: transaction.model.get_submodule(path) for path in plan.layers}
    own = [_replica_factors(replica, transaction.model, plan) for replica in transaction.replicas]
    install_factors(transaction.model, plan, transaction.optimizers, transaction.undo)
    for replica, layers in zip(transaction.replicas, own, strict=True):
        exchanged: dict[nn.Module, nn.Module] = {}
        for path, (layer, weights) in layers.items():
            chain, new = transaction.model.get_submodule(path), plan.layers[path]
            assert isinstance(chain, FactoredLayer)
            if layer is olds[path]:
                exchanged[layer] = chain
            elif weights is None:
                shared = [factor.get_parameter("weight") for factor in chain.factors]
                exchanged[layer] = factored(layer, new.kind, (new.rank,), shared=shared)
            else:
                exchanged[layer] = factored(layer, new.kind, (new.rank,), [weights])
        exchange_modules(replica, exchanged, transaction.undo)


def install_factors(model: nn.Module, plan: FactorPlan, optimizers: Sequence[Optimizer], undo: ExitStack) -> None:
    """Put planned factors into the places of their layers; closing `undo` puts the layers back."""
    if not plan.layers:
        return
    work = Work.of(model, {path: (new.kind, new.rank) for path, new in plan.layers.items()}, "auto", None, undo)
    choices = [
        Choice(request.target, kind_named(new.kind), (new.rank,))
        for request in work.requests
        for new in [plan.layers[request.target.name]]
    ]
    factors = {path: [list(new.weights)] for path, new in plan.layers.items()}
    work.install(choices, Fitted(factors, {}, plan.values), optimizers, undo)


def _replica_factors(
    replica: nn.Module, model: nn.Module, plan: FactorPlan
) -> dict[str, tuple[nn.Module, list[Tensor] | None]]:
    """{path: the replica's layer, and its factors; None where it shares the model's weight}."""
    found: dict[str, tuple[nn.Module, list[Tensor] | None]] = {}
    for path, new in plan.layers.items():
        layer = replica.get_submodule(path)
        weight = layer.get_parameter("weight")
        if weight is model.get_submodule(path).get_parameter("weight"):
            found[path] = layer, None
        else:
            own = in_float64(canonical(layer, weight.detach(), 1)[0], "cpu")
            found[path] = layer, [new.weights[0], last_factor(own, new.weights[0], new.weights[1])]
    return found


def last_factor(weight: Tensor, first: Tensor, like: Tensor) -> Tensor:
    """The last factor with which a chain comes closest to a weight, by least squares; the first one is given.

    Args:
        weight: `[out, in, k…]`, float64.
        first: `[rank, in, k…]`, 1 wide on axes that the last one covers.
        like: a last factor of the shape that is returned, `[out, rank, k…]`.

    >>> first, last = torch.randn(2, 5).double(), torch.randn(4, 2).double()
    >>> bool((last_factor(last @ first, first, last) - last).abs().max() < 1e-9)
    True
    """
    spatial = weight.dim() - 2
    own = [axis for axis in range(spatial) if first.shape[2 + axis] == weight.shape[2 + axis]]
    others = [axis for axis in range(spatial) if axis not in own]
    order = [0, *(2 + axis for axis in others), 1, *(2 + axis for axis in own)]
    rows = weight.permute(order).reshape(-1, first[0].numel())
    solved = torch.linalg.lstsq(in_float64(first).flatten(1).T, rows.T, driver="gelsd").solution.T
    places = [weight.shape[2 + axis] for axis in others]
    return solved.reshape(len(weight), *places, len(first)).movedim(-1, 1).reshape(like.shape)


def _named(model: nn.Module, layer: str) -> TwoFactors:
    chain = model.get_submodule(layer)
    assert isinstance(chain, FactoredLayer)
    first, last = (tuple(factor.get_parameter("weight").shape) for factor in chain.factors)
    return TwoFactors(layer, tuple(chain.merged_weight.shape), first, last)


def _merge_all(
    model: nn.Module,
    paths: Sequence[str],
    optimizers: Sequence[Optimizer],
    replicas: Sequence[nn.Module],
    undo: ExitStack,
) -> None:
    """Merge layers of a model and, where they are chains, of its replicas."""
    merge_by(model, paths, optimizers, undo)
    for replica in replicas:
        merge_by(replica, [path for path in paths if _is_chain(replica, path)], (), undo)


def merge_made(
    model: nn.Module,
    graph: WidthGraph,
    known: Container[str],
    optimizers: Sequence[Optimizer],
    replicas: Sequence[nn.Module],
    undo: ExitStack,
) -> WidthGraph:
    """Make whole again what has become a chain in the run; closing `undo` puts the chains back.

    Args:
        model: the model.
        graph: its widths.
        known: names of the widths at the start of the run.
        optimizers: of the model.
        replicas: which are changed likewise.
        undo: of the change.

    Returns:
        The graph of the changed model.
    """
    chains = [width.rank_of for width in graph.widths.values() if width.rank_of and width.name not in known]
    named = [_named(model, path) for path in chains if _is_chain(model, path)]
    _merge_all(model, [names.layer for names in named], optimizers, replicas, undo)
    for names in named:
        graph = without_factors(graph, names)
    return graph


def restore_chains(model: nn.Module, records: Mapping[str, Record], optimizers: Sequence[Optimizer]) -> None:
    """Give a model the factorized layers of another moment, and no others. New tensors have undefined values.

    Args:
        model: with the same layers, some of them whole and some chains.
        records: {path: record} of the chains of that moment.
        optimizers: of the model; new parameters take the places of those that they stand for.
    """
    with ExitStack() as undo:
        merge_by(model, [path for path in replacements(model) if path not in records], optimizers, undo)
        exchanged: dict[nn.Module, nn.Module] = {}
        replaced: dict[Tensor, list[Tensor]] = {}
        for path, record in records.items():
            layer = model.get_submodule(path)
            if not isinstance(layer, Replacement):
                chain = factored(layer, record["kind"], tuple(record["ranks"]))
                exchanged[layer] = chain
                replaced[layer.get_parameter("weight")] = [each.get_parameter("weight") for each in chain.factors]
        exchange_modules(model, exchanged, undo)
        replace_parameters(optimizers, replaced, parameter_names(model), undo)
        undo.pop_all()


def _is_chain(model: nn.Module, path: str) -> bool:
    module: Any = dict(model.named_modules(remove_duplicate=False)).get(path)
    return isinstance(module, FactoredLayer) and bool(parameter_table(module.factors[0]))
