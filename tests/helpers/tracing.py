"""What the tests of tracing share: code between two layers, and a graph that is used as well as read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs, shuffled, without_reasons

Code = Callable[..., Tensor]


class Between(nn.Module):
    """A dense layer `a` from 5 to 8 units, code between, and a dense layer `b` to 3."""

    def __init__(self, code: Code, reads: int = 8, **modules: nn.Module) -> None:
        super().__init__()
        self.code = code
        self.a, self.b = nn.Linear(5, 8), nn.Linear(reads, 3)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.code(self, x, self.a(x)))


def shuffle_and_widen(model: nn.Module, graph: WidthGraph, inputs: Any, **how: Any) -> WidthGraph:
    """Exchange the units of every width, then add three to each that no op mixes: the outputs stay.

    Returns the graph of the changed model, which is what a fresh trace finds, given the same `how`.
    """
    expected = outputs(model, inputs)
    graph = evolvenet.resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    assert distance(outputs(model, inputs), expected) < 1e-9
    wider = {width.name: IndexMap.grow(width.size, 3) for width in graph.resizable if width.mixed is None}
    graph = evolvenet.resize(model, graph, wider)
    assert distance(outputs(model, inputs), expected) < 1e-9
    assert without_reasons(graph) == without_reasons(trace(model, inputs, **how))
    return graph


def check_units(model: nn.Module, graph: WidthGraph, inputs: Any, names: list[str]) -> WidthGraph:
    """Units in another order, with new ones between, change nothing; the first of the last width goes alone.

    What is left computes the same as with zeros where the unit was consumed.
    """
    expected = outputs(model, inputs)
    for name in names:
        size = graph.sizes[name]
        graph = evolvenet.resize(model, graph, {name: IndexMap.of([1, -1, *range(2, size), 0, -1], size)})
    assert distance(outputs(model, inputs), expected) < 1e-9
    with torch.no_grad():
        for tie in graph.widths[names[-1]].consumers:
            model.get_parameter(tie.tensor).narrow(tie.dim, tie.start, tie.repeat).zero_()
    without = outputs(model, inputs)
    assert distance(without, expected) > 1e-6
    size = graph.sizes[names[-1]]
    graph = evolvenet.resize(model, graph, {names[-1]: IndexMap.keep(range(1, size), size)})
    assert distance(outputs(model, inputs), without) < 1e-12
    return graph
