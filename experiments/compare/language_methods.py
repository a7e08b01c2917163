"""What `experiments.compare.language` compares: EvolveNet's ways to make a language model smaller, and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

import evolvenet
from evolvenet.graph.restriction import freeze
from evolvenet.measurement.activation_moments import ActivationMoments, collect
from evolvenet.pruning.allocation import Allocation, allocate_by
from evolvenet.pruning.selection import choose
from experiments.compare import language_peers as peers
from experiments.compare.copies import copied
from experiments.compare.language_networks import Uncut
from experiments.compare.peers import best


@dataclass(frozen=True, eq=False)
class Study:
    """A trained network, and what several methods measure on it, once.

    Args:
        uncut: the network and its data.
    """

    uncut: Uncut

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """The sequences that methods with data measure on."""
        return self.uncut.calibration()

    @cached_property
    def graph(self) -> evolvenet.WidthGraph:
        """Stream, heads and inner units."""
        return evolvenet.trace(self.uncut.model, self.uncut.example, "logits", heads=True)

    @cached_property
    def inner(self) -> evolvenet.WidthGraph:
        """The graph in which the inner units of the feed-forward parts alone can change."""
        others = [width.name for width in self.graph.resizable if ".mlp." not in width.name]
        return freeze(self.graph, fixed=others)

    @cached_property
    def statistics(self) -> ActivationMoments:
        """Of all widths."""
        return collect(self.uncut.model, self.graph, self.batches)

    @cached_property
    def allocation(self) -> Allocation:
        """Of all widths; its trials serve all targets."""
        target = round(0.9 * self.graph.parameters)
        return evolvenet.allocate(self.uncut.model, self.graph, target, self.batches)

    def sizes(self, graph: evolvenet.WidthGraph, target: int) -> dict[str, int]:
        """As `evolvenet.allocate` chooses them for all widths of the graph or for some."""
        curves = self.allocation.curves
        return allocate_by(graph, {width.name: curves[width.name] for width in graph.resizable}, target)


Cut = Callable[[Study, nn.Module, int], tuple[nn.Module, str]]
"""(study, a copy of the uncut network, most parameters) → the network that is left, and what is to be known about it."""


@dataclass(frozen=True)
class Method:
    """A way to make a network smaller.

    Args:
        label: of its row.
        cut: makes it so.
        ours: whether its results depend on the package's sources.
        inner: whether it cuts inner units of the feed-forward parts alone.
    """

    label: str
    cut: Cut
    ours: bool = True
    inner: bool = False


def widths(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
    """Stream, heads and inner units."""
    return _pruned(study, study.graph, model, target)


def inner_units(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
    """Inner units of the feed-forward parts."""
    return _pruned(study, study.inner, model, target)


def _pruned(study: Study, graph: evolvenet.WidthGraph, model: nn.Module, target: int) -> tuple[nn.Module, str]:
    sizes = study.sizes(graph, target)
    evolvenet.prune(model, graph, sizes, batches=study.batches)
    return model, str(sizes)


def bare(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
    """The units that `widths` leaves, with their weights as they were."""
    sizes = study.sizes(study.graph, target)
    evolvenet.resize(model, study.graph, choose(model, study.graph, sizes, study.statistics))
    return model, str(sizes)


def ranks(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
    """`evolvenet.factorize`."""
    model = peers.with_dense_layers(model)
    return model, str(evolvenet.factorize(model, kinds="svd", batches=study.batches, parameters=target))


def both(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
    """`evolvenet.compress`."""
    model = peers.with_dense_layers(model)
    report = evolvenet.compress(
        model, study.uncut.example, study.batches, parameters=target, outputs="logits", lowrank=True
    )
    return model, str(report)


def torch_pruning(inner: bool) -> Cut:
    """Units by Torch-Pruning's importance, one share of all widths."""

    def cut(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
        graph = study.inner if inner else study.graph
        sizes = peers.equal_shares(graph, target)
        evolvenet.resize(model, graph, best(graph, peers.torch_pruning_scores(model, graph), sizes))
        return model, str(sizes)

    return cut


def published(method: Callable[..., nn.Module]) -> Cut:
    """A minimal implementation of a paper's method."""

    def cut(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
        return method(peers.with_dense_layers(model), study.uncut.kind, study.batches, target), ""

    return cut


def result(study: Study, method: Method, target: int) -> tuple[nn.Module, str]:
    """The network that a method leaves, in eval mode.

    Raises:
        ValueError: if a peer cannot make it so small.
        EvolveNetError: likewise.
    """
    model, report = method.cut(study, copied(study.uncut.model), target)
    return model.eval(), report


METHODS = {
    "ffn": Method("**ours, inner units**", inner_units, inner=True),
    "tp_ffn": Method("Torch-Pruning's magnitude, inner units", torch_pruning(True), ours=False, inner=True),
    "svd_llm": Method("ranks as in SVD-LLM", published(peers.svd_llm), ours=False),
    "slicegpt": Method("rotated stream as in SliceGPT", published(peers.slicegpt), ours=False),
    "tp_llm": Method("Torch-Pruning's recipe for LLMs", torch_pruning(False), ours=False),
    "widths": Method("**ours, all widths with heads**", widths),
    "bare": Method("ours, all widths, not fitted", bare),
    "ranks": Method("ours, ranks (`factorize`)", ranks),
    "both": Method("**ours, widths and ranks (`compress`)**", both),
}
"""The order is that of the runs: what takes longest comes last."""
