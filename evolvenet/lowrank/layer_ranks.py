"""The rank of every layer of a network in training: of layers that are whole as well, which become chains only where it pays.

A layer of rank r costs less than the whole one below its break-even. So the rank of a whole layer is a width of
`break_even + 1` units, of which the last one stands for the rest of its spectrum: as long as it has them all the layer is
whole, and with any fewer it is a chain of two. Policies see it beside the other widths.
"""

# nn.Module's tables have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from evolvenet._compat.torch import ConvTransposeNd, parameter_table, tree_leaves
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.sampling import samples_in
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp, WeightOpMode
from evolvenet.graph.factors import TwoFactors
from evolvenet.graph.restriction import Restriction
from evolvenet.graph.sizes import proposed_length
from evolvenet.graph.width_graph import Width, WidthGraph, Widths
from evolvenet.lowrank.base import Kind, LayerShape
from evolvenet.lowrank.budget import chain_cost, whole_cost
from evolvenet.lowrank.fit import Extent
from evolvenet.lowrank.kinds import KINDS
from evolvenet.lowrank.layers import FactoredLayer, groups_of
from evolvenet.lowrank.targets import find_targets
from evolvenet.measurement.cost import Costs

IN_TRAINING = ("svd", "spatial")
"""Kinds with a single rank: their chains are two layers."""


@dataclass(frozen=True)
class LayerRank:
    """The rank of one layer.

    Args:
        factors: the names of its tensors, whole and in a chain.
        kind: of its factors.
        shape: of the whole weight at the present widths.
        extents: sizes of its inputs and outputs in each call.
        is_whole: whether it is whole now.
        entry_bytes: of one entry of its weight.
    """

    factors: TwoFactors
    kind: Kind
    shape: LayerShape
    extents: Sequence[Extent]
    is_whole: bool
    entry_bytes: int

    @property
    def name(self) -> str:
        """The name of the rank among the widths."""
        return self.factors.rank

    @property
    def layer(self) -> str:
        """The path of the layer."""
        return self.factors.layer

    @property
    def break_even(self) -> int:
        """The largest rank with which the chain has fewer parameters than the whole layer; 0 if there is none."""
        (most,) = self.kind.full_rank(self.shape)
        each = self.kind.parameters(self.shape, (1,))
        return min(most, (self.shape.parameters - 1) // each)

    def cost(self, kind: str, shape: LayerShape, rank: int | None) -> float:
        """Of the layer with another shape, as a chain of a rank, or whole for None.

        Args:
            kind: of the cost: "params", "bytes" or "macs".
            shape: of the whole weight.
            rank: of the factors, or None.
        """
        if rank is None:
            return whole_cost(kind, shape, self.extents, self.entry_bytes)
        return chain_cost(kind, shape, self.kind, self.kind.capped(shape, (rank,)), self.extents, self.entry_bytes)

    def shape_at(self, graph: WidthGraph, sizes: Mapping[str, int]) -> LayerShape:
        """The shape of the whole weight if the named widths had these sizes."""
        whole, first, last = self.factors.weights
        entries = {
            axis: proposed_length(graph, tensor, axis, sizes)
            for axis, tensor in enumerate((whole, whole) if self.is_whole else (last, first))
        }
        return replace(self.shape, outputs=entries[0], inputs=entries[1])


@dataclass(frozen=True)
class LayerRanks(Mapping[str, LayerRank]):
    """{name: rank} of all layers of a network that have one.

    Args:
        graph: the widths of the network, without those ranks that are not factors yet.
        ranks: by their names.
        step: of which ranks are multiples.
    """

    graph: WidthGraph
    ranks: Mapping[str, LayerRank]
    step: int = 1

    def __getitem__(self, name: str) -> LayerRank:
        return self.ranks[name]

    def __iter__(self) -> Any:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @classmethod
    def of(
        cls, model: nn.Module, graph: WidthGraph, example_inputs: Any, whole: Collection[str] = (), step: int = 1
    ) -> LayerRanks:
        """Find the ranks of a network.

        Args:
            model: is left as it was.
            graph: its widths.
            example_inputs: what it is run on.
            whole: paths of layers that stay as they are.
            step: of which ranks are multiples.
        """
        extents = extents_of(model, example_inputs, graph.differentiates)
        found: dict[str, LayerRank] = {}
        for path, target in find_targets(model).items():
            layer = target.layer
            names = TwoFactors(path, tuple(layer.get_parameter("weight").shape), (), ()) if not target.refusal else None
            if names is None or path in whole or len(target.layers) > 1 or not _trained(layer):
                continue
            kind = None if isinstance(layer, ConvTransposeNd) else _kind(target.shape)
            if kind is None or names.weights[0] not in graph.shapes or not extents.get(names.weights[0]):
                continue
            each = layer.get_parameter("weight").element_size()
            rank = LayerRank(names, kind, target.shape, extents[names.weights[0]], True, each)
            if rank.break_even > 1:
                found[rank.name] = rank
        for path, chain in model.named_modules():
            rank = _of_chain(path, chain, extents) if isinstance(chain, FactoredLayer) and path not in whole else None
            if rank is not None and set(rank.factors.weights[1:]) <= set(graph.shapes) and rank.name in graph.sizes:
                found[rank.name] = rank
        return cls(graph, found, step)

    @property
    def whole(self) -> dict[str, LayerRank]:
        """Those of layers that are whole now."""
        return {name: rank for name, rank in self.ranks.items() if rank.is_whole}

    @property
    def extended(self) -> WidthGraph:
        """The graph with the ranks of whole layers as widths without ties."""
        step = self.step
        more = {
            name: Width(name, rank.break_even + 1, rank_of=rank.layer, step=step if step <= rank.break_even else 1)
            for name, rank in self.whole.items()
        }
        return replace(self.graph, widths=Widths({**self.graph.widths, **more}))

    def unprofitable(self, kind: str) -> list[LayerRank]:
        """The ranks of chains that cost no less than the whole layer would."""
        return [
            rank
            for name, rank in self.ranks.items()
            if not rank.is_whole
            and rank.cost(kind, rank.shape, self.graph.widths[name].size) >= rank.cost(kind, rank.shape, None)
        ]


@dataclass(frozen=True)
class LowRank:
    """How the layers of a network may be factorized in a run.

    Args:
        kind: of the cost that is to become small: "params", "bytes" or "macs".
        restriction: layers that it excludes, by themselves or as producers of a width, stay as they are.
        path: of the network in a larger module, by whose names the restriction may go.
        whole: paths of further layers that stay as they are.
    """

    kind: str
    restriction: Restriction
    path: str = ""
    whole: frozenset[str] = frozenset()

    def ranks(self, model: nn.Module, graph: WidthGraph, example_inputs: Any) -> LayerRanks:
        """The ranks of a network's layers; arguments as for `LayerRanks.of`."""
        fixed = {path for path, _ in model.named_modules() if path and not self.restriction.permits(path, self.path)}
        return LayerRanks.of(model, graph, example_inputs, fixed | self.whole, self.restriction.multiple)


def low_rank(policy: object, restriction: Restriction, path: str = "") -> LowRank | None:
    """How a policy with `lowrank` may factorize layers; None for any other.

    Args:
        policy: its `kind` or `cost` names the cost that is to become small, "params" if it has neither.
        restriction: of the run.
        path: of the network in a larger module.
    """
    if not getattr(policy, "lowrank", False):
        return None
    kind = getattr(policy, "kind", getattr(policy, "cost", "params"))
    return LowRank(kind, restriction, path)


def costs_of(model: nn.Module, graph: WidthGraph, example_inputs: Any, ranks: LayerRanks | None) -> Costs:
    """The costs of a network, with the ranks of its layers where there are any.

    Args:
        model: is left as it was.
        graph: its widths.
        example_inputs: what costs are counted on.
        ranks: of its layers, or None.
    """
    costs = Costs.of(model, graph, example_inputs)
    return costs if ranks is None else CostsWithRanks.with_ranks(costs, ranks)


@dataclass(frozen=True)
class CostsWithRanks(Costs):
    """The cost of a network at other widths and ranks: each layer is whole or a chain, whichever costs less.

    Args:
        ranks: of its layers.
    """

    ranks: LayerRanks | None = field(default=None)

    @classmethod
    def with_ranks(cls, costs: Costs, ranks: LayerRanks) -> CostsWithRanks:
        """Of a network as it is, with the ranks of its layers."""
        return cls(costs.graph, costs.uses, costs.sizes, costs.rest, costs.timed, ranks)

    def at(self, kind: str, sizes: Mapping[str, int]) -> float:
        """As `Costs.at`; sizes may name ranks of whole layers."""
        assert self.ranks is not None
        graph = self.ranks.graph
        own = {name: size for name, size in sizes.items() if name in graph.widths}
        saved = 0.0
        for name, rank in self.ranks.items():
            if rank.is_whole and name not in sizes:
                continue
            shape = rank.shape_at(graph, own)
            whole = rank.cost(kind, shape, None)
            if rank.is_whole:
                if sizes[name] <= rank.break_even:
                    saved += max(0.0, whole - rank.cost(kind, shape, sizes[name]))
            else:
                saved += max(0.0, rank.cost(kind, shape, own.get(name, graph.widths[name].size)) - whole)
        return super().at(kind, own) - saved


def _kind(shape: LayerShape) -> Kind | None:
    """SVD for dense layers and kernels of one axis or one place, spatial SVD for others; None for grouped layers."""
    if shape.groups > 1:
        return None
    spatial = KINDS["spatial"]
    return KINDS["svd"] if shape.places == 1 or spatial.refusal(shape) else spatial


def _of_chain(path: str, chain: FactoredLayer, extents: Mapping[str, Sequence[Extent]]) -> LayerRank | None:
    if chain.kind not in IN_TRAINING or len(chain.factors) != 2 or not _trained(chain.factors[0]):
        return None
    first, last = (factor.get_parameter("weight") for factor in chain.factors)
    merged = chain.merged_weight.shape
    shape = LayerShape(merged[0], merged[1], tuple(merged[2:]))
    names = TwoFactors(path, tuple(merged), tuple(first.shape), tuple(last.shape))
    calls = zip(extents.get(names.weights[1], ()), extents.get(names.weights[2], ()), strict=False)
    both = [Extent(one.before, two.after, False, one.times) for one, two in calls]
    if groups_of(chain.factors[0]) > 1 or isinstance(chain.factors[0], ConvTransposeNd) or not both:
        return None
    return LayerRank(names, KINDS[chain.kind], shape, both, False, first.element_size())


def _trained(layer: nn.Module) -> bool:
    weight = parameter_table(layer).get("weight")
    return weight is not None and weight.requires_grad


def extents_of(model: nn.Module, example_inputs: Any, gradients: bool = False) -> dict[str, list[Extent]]:
    """{weight: sizes of its inputs and outputs in each call}, from one eval forward pass.

    Args:
        model: is left as it was.
        example_inputs: what it is run on.
        gradients: whether it runs with autograd on.

    >>> import torch
    >>> extents_of(nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 5, 5))
    {'weight': [Extent(before=(5, 5), after=(3, 3), transposed=False, times=1.0)]}
    """
    leaves = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    samples = len(leaves[0]) if leaves else samples_in(example_inputs)
    found: dict[str, list[Extent]] = {}

    def record(op: WeightOp, out: Tensor) -> None:
        found.setdefault(op.tensor, []).append(Extent.of(op, out, samples))

    with isolated(model, shadows=True, gradients=gradients), op_by_op(WeightOpMode(model, after=record)):
        run_model(model, example_inputs)
    return found
