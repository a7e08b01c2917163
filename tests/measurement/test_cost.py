"""Costs against counting by hand, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from evolvenet.engine.functional import resize
from evolvenet.errors import TraceError
from evolvenet.graph.index_map import IndexMap
from evolvenet.measurement.cost import macs, parameters, size_in_bytes
from experiments.coverage.small_networks import Tied
from tests.helpers import networks
from tests.helpers.cases import CASES, Case, graph_of, run
from tests.helpers.states import State

BY_NAME = {case.name: case for case in CASES}
OTHER_PRODUCTS = ("own_parameters", "attention", "transformer", "rnn", "lstm", "gru")
LAYERED = [case for case in CASES if not case.name.startswith(OTHER_PRODUCTS)]


def by_hand(model: nn.Module, inputs: object, samples: int) -> int:
    """For every dense layer and convolution: its outputs times the inputs of each."""
    total = 0

    def count(module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> None:
        nonlocal total
        if isinstance(module, _ConvTransposeNd):
            total += given[0].numel() * module.weight[0].numel()
        elif isinstance(module, (nn.Linear, _ConvNd)):
            total += answer.numel() * module.weight[0].numel()

    handles = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        run(model.eval(), inputs)
    for handle in handles:
        handle.remove()
    return total // samples


@pytest.mark.parametrize("case", LAYERED, ids=str)
def test_multiply_accumulates(case: Case) -> None:
    model, inputs = case.model().train(), case.inputs()
    before = State.of(model)
    counted = macs(model, inputs)
    assert before.differences(model) == []
    assert counted == by_hand(model, inputs, 2)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "lstm"])
def test_a_resized_model_costs_what_one_built_so_does(name: str) -> None:
    case = BY_NAME[name]
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    full = macs(model, inputs)
    graph = resize(model, graph, {name: IndexMap.keep([0, 1], size) for name, size in graph.sizes.items()})
    assert macs(model, inputs) < full
    assert parameters(model) == graph.parameters
    resize(model, graph, {name: IndexMap.grow(2, size - 2) for name, size in graph_of(case).sizes.items()})
    assert macs(model, inputs) == full


def test_of_one_sample_whatever_the_batch() -> None:
    model = networks.ConvNet()
    assert macs(model, torch.zeros(1, 3, 8, 8)) == macs(model, torch.zeros(7, 3, 8, 8))
    # A matrix of products: 5 steps of 4 → 3.
    assert macs(nn.Linear(4, 3), torch.zeros(2, 5, 4)) == 60


def test_a_recurrent_layer() -> None:
    """Four gates of 6 units, each reading 4 inputs and 6 states, over 3 steps."""
    assert macs(nn.LSTM(4, 6, batch_first=True), torch.zeros(2, 3, 4)) == 3 * 4 * 6 * (4 + 6)


def test_parameters_and_bytes() -> None:
    assert parameters(nn.Linear(4, 3)) == 15
    assert size_in_bytes(nn.Linear(4, 3)) == 60
    # Weight, bias, mean and variance of 5, and a count of batches in 8 bytes.
    assert size_in_bytes(nn.BatchNorm1d(5)) == 4 * 5 * 4 + 8
    assert size_in_bytes(nn.BatchNorm1d(5).half()) == 4 * 5 * 2 + 8
    tied = Tied(tokens=20, size=6, inner=9)
    assert parameters(tied) == sum(p.numel() for p in tied.parameters()) == 20 * 6 + 6 * 9 + 9 + 9 * 6 + 6


def test_a_model_that_needs_values() -> None:
    """It is run on copies then, and the inputs are not written into."""

    class Needy(networks.Peeking):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1.0))

    x = torch.zeros(2, 5)
    assert macs(Needy(), x) == 5 * 8 + 8 * 6 + 6 * 3
    assert torch.equal(x, torch.zeros(2, 5))


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(TraceError, match="does not run on the example inputs: RuntimeError"):
        macs(nn.Linear(4, 3), torch.zeros(2, 5))
