"""The graph of a model in which one layer has become a chain of two, or a chain one layer again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from evolvenet.graph.width_graph import CONSUMES, PRODUCES, Segment, Width, WidthGraph, assemble

Axes = Mapping[int, tuple[Segment, ...]]


@dataclass(frozen=True)
class TwoFactors:
    """The tensors of a layer whose weight is `[out, in, k…]`, and of the chain of two layers that stands for it.

    Args:
        layer: the path of both.
        whole: shape of the layer's weight.
        first: shape of the first factor, `[rank, in, k…]`.
        last: shape of the last factor, `[out, rank, k…]`.
    """

    layer: str
    whole: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def rank(self) -> str:
        """The name of the width between the factors, as a trace gives it."""
        return f"{self.layer}.0"

    @property
    def weights(self) -> tuple[str, str, str]:
        """Names of the layer's weight, of the first factor and of the last one."""
        return f"{self.layer}.weight", f"{self.layer}.0.weight", f"{self.layer}.1.weight"

    @property
    def biases(self) -> tuple[str, str]:
        """Names of the bias in the layer and in the chain."""
        return f"{self.layer}.bias", f"{self.layer}.1.bias"


def with_factors(graph: WidthGraph, factors: TwoFactors, step: int = 1) -> WidthGraph:
    """The graph after a layer has become a chain; all widths keep their names, and the rank is one more.

    Args:
        graph: of the model with the layer.
        factors: the tensors of both.
        step: of the rank, see `Width.step`.

    >>> import torch
    >>> from torch import nn
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(1, 6))
    >>> chain = with_factors(graph, TwoFactors("2", (4, 8), (2, 8), (4, 2)))
    >>> chain.sizes, chain.parameters, chain.widths["2.0"].rank_of
    ({'0': 8, '2.0': 2}, 84, '2')
    """
    whole, first, last = factors.weights
    axes = graph.layouts[whole]
    segment = Segment(factors.rank, factors.first[0])
    made = {
        first: (factors.first, {**_of(axes, 1, factors.first), 0: (segment,)}),
        last: (factors.last, {**_of(axes, 0, factors.last), 1: (segment,)}),
    }
    rank = Width(factors.rank, factors.first[0], rank_of=factors.layer, step=step)
    roles = {(first, 0): PRODUCES, (last, 1): CONSUMES}
    return _rebuilt(graph, {whole: made}, {(whole, 0): (last, 0), (whole, 1): (first, 1)}, factors.biases, roles, rank)


def without_factors(graph: WidthGraph, factors: TwoFactors) -> WidthGraph:
    """The reverse of `with_factors`: the rank is gone, all other widths keep their names.

    >>> import torch
    >>> from torch import nn
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(1, 6))
    >>> chain = TwoFactors("2", (4, 8), (2, 8), (4, 2))
    >>> without_factors(with_factors(graph, chain), chain) == graph
    True
    """
    whole, first, last = factors.weights
    axes = {**_of(graph.layouts[last], 0, factors.last), **_of(graph.layouts[first], 1, factors.first)}
    replaced = {first: {whole: (factors.whole, axes)}, last: {}}
    moved = {(last, 0): (whole, 0), (first, 1): (whole, 1)}
    return _rebuilt(graph, replaced, moved, (factors.biases[1], factors.biases[0]), {}, factors.rank)


def _of(axes: Axes, dim: int, shape: tuple[int, ...]) -> dict[int, tuple[Segment, ...]]:
    """The layout of one of the first two axes, and of the kernel's as far as a tensor of that shape has them."""
    return {each: segments for each, segments in axes.items() if each == dim or (each > 1 and shape[each] > 1)}


def _rebuilt(
    graph: WidthGraph,
    replaced: Mapping[str, Mapping[str, tuple[tuple[int, ...], Axes]]],
    moved: Mapping[tuple[str, int], tuple[str, int]],
    bias: tuple[str, str],
    roles: Mapping[tuple[str, int], str],
    rank: Width | str,
) -> WidthGraph:
    """The graph with other tensors in the places of some.

    Args:
        graph: before.
        replaced: {tensor: {the ones in its place: (shape, layout)}}.
        moved: {(tensor, axis): where that axis is now}, to keep its role.
        bias: its name before and now.
        roles: of new axes.
        rank: the width that is new, or the name of the one that is gone.
    """
    layouts: dict[str, Axes] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    trainable: set[str] = set()
    for name, axes in graph.layouts.items():
        new = replaced.get(name, {bias[1] if name == bias[0] else name: (graph.shapes[name], axes)})
        for other, (shape, layout) in new.items():
            layouts[other], shapes[other] = layout, shape
        trainable |= set(new) if name in graph.trainable else set()
    kept = {
        moved.get((tie.tensor, tie.dim), (bias[1] if tie.tensor == bias[0] else tie.tensor, tie.dim)): tie.role
        for width in graph.widths.values()
        for tie in width.ties
    }
    gone = rank if isinstance(rank, str) else None
    bare = {name: replace(width, ties=()) for name, width in graph.widths.items() if name != gone}
    if isinstance(rank, Width):
        bare[rank.name] = rank
    known = {place: role for place, role in {**kept, **roles}.items() if place[0] in shapes}
    added = frozenset(bias[1] if name == bias[0] else name for name in graph.added)
    made = assemble(bare, layouts, shapes, frozenset(trainable), graph.aliases, known, graph.differentiates, added)
    gates = frozenset(name for name in graph.gates if name in shapes)
    return replace(made, gates=gates, outputs=graph.outputs)
