"""A graph from before the last change of widths is refused, before anything is changed or measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet import Evolver, IndexMap, ResizeError, Threshold, WidthGraph
from evolvenet.graph.current import check_current

BATCHES = [torch.randn(16, 6) for _ in range(2)]
INPUTS = torch.zeros(2, 6)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


PAIRS = [(batch, torch.zeros(16, 3)) for batch in BATCHES]
Call = Callable[[nn.Module, WidthGraph], object]
CALLS: dict[str, Call] = {
    "prune the same width": lambda model, graph: evolvenet.prune(model, graph, {"0": 9}),
    "prune another width": lambda model, graph: evolvenet.prune(model, graph, {"2": 9}),
    "prune to the size in the graph": lambda model, graph: evolvenet.prune(model, graph, {"0": 12}),
    "prune nothing": lambda model, graph: evolvenet.prune(model, graph, {}),
    "prune and fit": lambda model, graph: evolvenet.prune(model, graph, {"2": 9}, batches=BATCHES),
    "prune a width of another name": lambda model, graph: evolvenet.prune(model, graph, {"nothing": 9}),
    "grow": lambda model, graph: evolvenet.grow(model, graph, {"2": 14}),
    "grow by gradients": lambda model, graph: evolvenet.grow(
        model, graph, {"2": 14}, "gradmax", batches=PAIRS, loss=loss
    ),
    "resize by a map of the old size": lambda model, graph: evolvenet.resize(model, graph, {"0": IndexMap.grow(12, 1)}),
    "resize by a map of the new size": lambda model, graph: evolvenet.resize(model, graph, {"0": IndexMap.grow(8, 1)}),
    "resize nothing": lambda model, graph: evolvenet.resize(model, graph, {}),
    "spectra": evolvenet.spectra,
    "spectra of activations": lambda model, graph: evolvenet.spectra(model, graph, BATCHES),
    "output_spectra": lambda model, graph: evolvenet.output_spectra(model, graph, BATCHES),
    "block_spectra": lambda model, graph: evolvenet.block_spectra(model, graph, INPUTS),
    "allocate": lambda model, graph: evolvenet.allocate(model, graph, parameters=150),
    "allocate by trials": lambda model, graph: evolvenet.allocate(model, graph, parameters=150, batches=BATCHES),
    "Evolver": lambda model, graph: Evolver(model, None, Threshold(), INPUTS, graph=graph),
}
CHANGES: dict[str, Call] = {
    "pruned": lambda model, graph: evolvenet.prune(model, graph, {"0": 8}),
    "grown": lambda model, graph: evolvenet.grow(model, graph, {"0": 15}),
    "compressed": lambda model, _: evolvenet.compress(model, INPUTS, BATCHES, parameters=150, lowrank=False),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))


@pytest.mark.parametrize("call", CALLS)
def test_a_graph_from_before_a_cut_is_refused_before_anything_changes(call: str) -> None:
    model = network()
    graph = evolvenet.trace(model, INPUTS)
    evolvenet.prune(model, graph, {"0": 8})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = r"with '0.weight' of shape \(8, 6\), got one with \(12, 6\).* use the graph that prune returned"
    with pytest.raises(ResizeError, match=expected):
        CALLS[call](model, graph)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_from_before_any_change_is_refused(change: str) -> None:
    model = network()
    graph = evolvenet.trace(model, INPUTS)
    CHANGES[change](model, graph)
    with pytest.raises(ResizeError, match="use the graph that prune returned"):
        evolvenet.prune(model, graph, {"2": 5})


def test_the_returned_graph_and_one_of_the_same_sizes_are_taken() -> None:
    model = network()
    first = evolvenet.trace(model, INPUTS)
    second = evolvenet.prune(model, first, {"0": 8})
    evolvenet.spectra(model, second)
    third = evolvenet.prune(model, second, {"2": 7})
    evolvenet.grow(model, third, {"0": 12, "2": 10})
    # Of the sizes that it says, it is the model's graph again.
    assert evolvenet.prune(model, first, {"0": 6}).sizes == {"0": 6, "2": 10}


def test_a_graph_of_layers_that_were_replaced_is_refused() -> None:
    model = network()
    graph = evolvenet.trace(model, INPUTS)
    evolvenet.factorize(model, {"2": 3})
    with pytest.raises(ResizeError, match="layers were replaced or renamed since it was made: trace the model again"):
        evolvenet.prune(model, graph, {"0": 8})


def test_a_buffer_that_grows_by_itself_makes_no_graph_stale() -> None:
    class Cached(nn.Sequential):
        seen: Tensor

        def forward(self, input: Tensor) -> Tensor:
            self.register_buffer("seen", torch.cat([self.seen, input.new_zeros(1)]))
            return super().forward(input)

    model = Cached(*network())
    model.register_buffer("seen", torch.zeros(2))
    graph = evolvenet.trace(model, INPUTS)
    model(INPUTS)
    assert "0.bias" in check_current(model, graph)
    assert evolvenet.prune(model, graph, {"0": 8}).sizes["0"] == 8
