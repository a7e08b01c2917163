"""Widths and ranks together: which of both to cut for a cost, by loss per cost over both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evolvenet.graph.sizes import proposed_length
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lowrank.base import LayerShape, Ranks
from evolvenet.lowrank.budget import Option, chain_cost, whole_cost
from evolvenet.lowrank.fit import Extent
from evolvenet.measurement.cost import Costs
from evolvenet.pruning.allocation import possible_sizes
from evolvenet.pruning.marginal_analysis import convex, fit_to_cost
from evolvenet.pruning.trials import Curve, filled


@dataclass(frozen=True)
class LayerInGraph:
    """One layer of a graph: what its factors save while the widths around it change.

    Args:
        weight: its name in the graph.
        shape: of the weight as it is.
        extents: sizes of its inputs and outputs in each call.
        entry_bytes: of one entry of the weight.
    """

    weight: str
    shape: LayerShape
    extents: Sequence[Extent]
    entry_bytes: int = 4

    def shape_at(self, graph: WidthGraph, sizes: Mapping[str, int]) -> LayerShape:
        """The shape if the named widths had these sizes. Where groups of channels can go, all of them stay."""
        if self.weight not in graph.shapes or self.shape.groups > 1:
            return self.shape
        lengths = [proposed_length(graph, self.weight, axis, sizes) for axis in (0, 1)]
        transposed = any(extent.transposed for extent in self.extents)
        outputs, inputs = reversed(lengths) if transposed else lengths
        return replace(self.shape, outputs=outputs, inputs=inputs)

    def ranks_at(self, graph: WidthGraph, sizes: Mapping[str, int], option: Option) -> Ranks:
        """The ranks of some factors at these widths: none above what the shape allows."""
        assert option.kind is not None
        return option.kind.capped(self.shape_at(graph, sizes), option.ranks)

    def saved(self, kind: str, shape: LayerShape, option: Option) -> float:
        """What factors save of the whole layer's cost, 0 where they cost more.

        Args:
            kind: of the cost: "params", "bytes" or "macs".
            shape: of the weight.
            option: the factors; none for the whole layer.
        """
        if option.kind is None:
            return 0.0
        ranks = option.kind.capped(shape, option.ranks)
        if option.kind.parameters(shape, ranks) >= shape.parameters:
            return 0.0
        whole = whole_cost(kind, shape, self.extents, self.entry_bytes)
        return max(0.0, whole - chain_cost(kind, shape, option.kind, ranks, self.extents, self.entry_bytes))


@dataclass(frozen=True)
class Joint:
    """Widths and factors, chosen together.

    Args:
        sizes: {width: size}.
        options: {layer: its factors, or the whole layer}.
    """

    sizes: Mapping[str, int]
    options: Mapping[str, Option]


def joint(
    graph: WidthGraph,
    costs: Costs,
    kind: str,
    limit: float,
    curves: Mapping[str, Curve],
    options: Mapping[str, Sequence[Option]],
    layers: Mapping[str, LayerInGraph],
) -> Joint:
    """Widths and ranks with a small sum of losses whose cost is within a limit, see `fit_to_cost`.

    The cost of a layer is the lesser one of the whole layer and its factors, at the widths around it. A rank saves nothing
    above break-even, so for ranks several depths of a cut are compared.

    Args:
        graph: the widths.
        costs: of the network with whole layers.
        kind: of the cost: "params", "bytes" or "macs".
        limit: of the cost.
        curves: {width: loss at some sizes}; the others keep their sizes.
        options: {layer: ways to factorize it, by cost}, the whole layer last.
        layers: {layer: its costs}.

    Returns:
        The smallest ones where even their cost is above the limit.
    """
    places = {f"{layer}\n": layer for layer in options}  # no width has such a name
    widths = {name: convex(filled(curve)) for name, curve in curves.items()}
    every = {name: possible_sizes(graph.widths[name]) for name in widths}

    def cost(sizes: Mapping[str, int]) -> float:
        own = {name: size for name, size in sizes.items() if name not in places}
        saved = 0.0
        for key, layer in places.items():
            option = options[layer][sizes[key]]
            if option.kind is not None:
                saved += layers[layer].saved(kind, layers[layer].shape_at(graph, own), option)
        return costs.at(kind, own) - saved

    found = fit_to_cost(
        {**widths, **{key: [(i, each.loss) for i, each in enumerate(options[layer])] for key, layer in places.items()}},
        {**every, **{key: range(len(options[layer])) for key, layer in places.items()}},
        {**graph.sizes, **{key: len(options[layer]) - 1 for key, layer in places.items()}},
        cost,
        limit,
        ahead=places,
    )
    return Joint(
        {**graph.sizes, **{name: found[name] for name in widths}},
        {layer: options[layer][found[key]] for key, layer in places.items()},
    )
