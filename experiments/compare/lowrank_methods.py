"""What `experiments.compare.lowrank` compares: widths, each kind of factorization, both together, and two peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.lowrank.kinds import kind_named
from evolvenet.lowrank.targets import Target, find_targets
from evolvenet.measurement.cost import macs, parameters
from experiments.compare.copies import copied
from experiments.compare.networks import TaskData

CALIBRATION = 512
"""Training images that methods with data measure on."""

STEPS = 10
"""Halvings in the search for a setting whose network has the wanted cost."""

TIMED = 64
"""Images in the batch whose latency is limited."""

PARAMETERS, MACS, LATENCY = ALL = ("parameters", "macs", "latency")


@dataclass(frozen=True)
class Case:
    """One network to be made smaller.

    Args:
        data: the task with its data.
        seed: of the network.
        model: a copy of the uncut network, changed in place.
        cost: "parameters", "macs" or "latency".
        limit: the most of it afterwards; of latency in seconds, for a batch of 64.
    """

    data: TaskData
    seed: int
    model: nn.Module
    cost: str
    limit: float

    @property
    def batches(self) -> list[Tensor]:
        """512 training images in eight batches, the same for all methods."""
        return list(torch.cat(self.data.calibration(self.seed, CALIBRATION)).split(TIMED))

    @property
    def example(self) -> Tensor:
        """For the trace, and for the measurements of what a forward pass costs."""
        return self.batches[0] if self.cost == LATENCY else self.data.example

    def cost_of(self, model: nn.Module) -> int:
        """What a model costs."""
        return parameters(model) if self.cost == PARAMETERS else macs(model, self.data.example)


@dataclass(frozen=True)
class Method:
    """A way to make a network smaller.

    Args:
        label: of its row.
        run: changes the case's model in place, returns what is to be known about it.
        ours: whether its results depend on the package's sources.
        kernels: whether it differs from SVD only for convolutions with a kernel wider than 1.
        costs: what it can keep within a limit.
        needs: a module without which it is left out.
    """

    label: str
    run: Callable[[Case], str]
    ours: bool = True
    kernels: bool = False
    costs: tuple[str, ...] = (PARAMETERS, MACS)
    needs: str = "torch"


def widths(case: Case) -> str:
    """Widths alone."""
    if case.cost != PARAMETERS:
        return compressed(case, lowrank=False)
    graph = evolvenet.trace(case.model, case.data.example)
    sizes = evolvenet.allocate(case.model, graph, parameters=int(case.limit), batches=case.batches)
    evolvenet.prune(case.model, graph, sizes, batches=case.batches)
    return f"{graph.sizes} → {sizes}"


def both(case: Case) -> str:
    """Widths and ranks together."""
    return compressed(case, lowrank=True)


def compressed(case: Case, lowrank: bool) -> str:
    """`evolvenet.compress` to the case's limit."""
    limit: dict[str, Any] = {case.cost: case.limit}
    return str(evolvenet.compress(case.model, case.example, case.batches, lowrank=lowrank, **limit))


def factorized(kind: str, whitened: bool) -> Callable[[Case], str]:
    """Ranks alone, of one kind for all kernels wider than 1; dense layers and kernels of 1 have SVD in any case."""

    def run(case: Case) -> str:
        chosen = kinds_for(case.model, kind)
        limit: dict[str, Any] = {case.cost: case.limit}
        if whitened:
            return str(evolvenet.factorize(case.model, kinds=chosen, batches=case.batches, **limit))
        if case.cost == MACS:
            # Without batches there is no budget in multiply-accumulates: the one in parameters that comes nearest.
            whole = parameters(case.model)
            share = largest_share(case, lambda model, share: _to_parameters(model, chosen, round(share * whole)))
            limit = {PARAMETERS: round(share * whole)}
        return str(evolvenet.factorize(case.model, kinds=chosen, **limit))

    return run


def kinds_for(model: nn.Module, kind: str) -> str | dict[str, str]:
    """The kind for every layer that it can factorize, "svd" for the others."""
    if kind == "auto":
        return kind
    found = find_targets(model).items()
    return {name: "svd" if kind_named(kind).refusal(target.shape) else kind for name, target in found}


def _to_parameters(model: nn.Module, kinds: str | Mapping[str, str], limit: int) -> None:
    evolvenet.factorize(model, kinds=kinds, parameters=limit)


def largest_share(case: Case, change: Callable[[nn.Module, float], None]) -> float:
    """The largest share in 0 … 1 with which `change` makes a copy of the case's model that is within its limit.

    Raises:
        FactorizationError: if there is none.
    """
    low, high, found, last = 0.0, 1.0, None, ""
    for _ in range(STEPS):
        middle = (low + high) / 2
        model = copied(case.model)
        try:
            change(model, middle)
            cost = case.cost_of(model)
        except evolvenet.FactorizationError as error:
            cost, last = None, str(error)
        if cost is not None and cost > case.limit:
            high = middle
        else:
            low = middle
            found = middle if cost is not None else found
        if high < 1e-3:
            break
    if found is None or high < 1e-3:
        raise evolvenet.FactorizationError(f"Expected {case.limit:,} {case.cost}, no share reaches so few. {last}")
    return found


def plain_svd(case: Case) -> str:
    """Truncated SVD of each weight but the last layer's, the same share of its parameters for each."""
    share = largest_share(case, _cut_svd)
    _cut_svd(case.model, share)
    return f"share {share:.4f}"


def _cut_svd(model: nn.Module, share: float) -> None:
    svd, layers = kind_named("svd"), all_but_last(model)
    evolvenet.factorize(
        model, {name: _rank(target, svd.parameters(target.shape, (1,)), share) for name, target in layers}, "svd"
    )


def _rank(target: Target, each: int, share: float) -> int:
    """The rank whose factors have a share of a layer's parameters, `each` for a rank."""
    return max(1, int(share * target.shape.parameters / each))


def all_but_last(model: nn.Module) -> list[tuple[str, Target]]:
    """Layers that can be factorized, without the one that gives the outputs, each once."""
    found = [(name, target) for name, target in find_targets(model).items() if target.refusal is None]
    return [(name, target) for name, target in found if name == target.name][:-1]


def tensorly_torch(case: Case) -> str:
    """Tensorly-torch's layers: convolutions by Tucker, dense layers by a tensor-train matrix of two modes.

    Its factorized dense layers multiply more often than whole ones, so these stay whole where that is limited.
    """
    dense = case.cost == PARAMETERS
    share = largest_share(case, lambda model, share: _exchange(model, share, dense, decompose=False))
    _exchange(case.model, share, dense, decompose=True)
    return f"share {share:.4f}"


def _exchange(model: nn.Module, share: float, dense: bool, decompose: bool) -> None:
    layers: Any = importlib.import_module("tltorch.factorized_layers")
    shapes: Any = importlib.import_module("tltorch.utils")
    for name, target in all_but_last(model):
        layer = target.layer
        if isinstance(layer, nn.Linear) and not dense:
            continue
        if isinstance(layer, nn.Linear):
            inputs, outputs = shapes.get_tensorized_shape(
                layer.in_features, layer.out_features, order=2, min_dim=2, verbose=False
            )
            rank = _rank(target, sum(a * b for a, b in zip(inputs, outputs, strict=True)), share)
            options: dict[str, Any] = {"factorization": "blocktt", "implementation": "factorized", "rank": (1, rank, 1)}
            made = layers.FactorizedLinear(inputs, outputs, bias=layer.bias is not None, **options)
            if decompose:
                made.weight.init_from_matrix(layer.weight.data)
                if layer.bias is not None:
                    made.bias.data = layer.bias.data
        else:
            made = layers.FactorizedConv.from_conv(
                layer,
                rank=share,
                factorization="tucker",
                implementation="factorized",
                fixed_rank_modes="spatial",
                decompose_weights=decompose,
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)


METHODS = {
    "both": Method("**widths and ranks** (`compress`)", both, costs=ALL),
    "widths": Method("widths alone", widths, costs=ALL),
    "auto": Method('ranks, "auto", whitened', factorized("auto", True), kernels=True, costs=ALL),
    "svd": Method("ranks, SVD, whitened", factorized("svd", True)),
    "spatial": Method("ranks, spatial SVD, whitened", factorized("spatial", True), kernels=True),
    "tucker": Method("ranks, Tucker-2, whitened", factorized("tucker", True), kernels=True),
    "auto_plain": Method('ranks, "auto", plain', factorized("auto", False), kernels=True),
    "svd_plain": Method("ranks, SVD, plain", factorized("svd", False)),
    "spatial_plain": Method("ranks, spatial SVD, plain", factorized("spatial", False), kernels=True),
    "tucker_plain": Method("ranks, Tucker-2, plain", factorized("tucker", False), kernels=True),
    "peer_svd": Method("truncated SVD, equal ratios", plain_svd, ours=False),
    "tltorch": Method("tensorly-torch, equal ratios", tensorly_torch, ours=False, needs="tltorch"),
}
