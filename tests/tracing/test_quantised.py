"""Quantised models: that no width can change is said as what it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from evolvenet.errors import TraceError
from evolvenet.tracing.trace import trace

X = torch.randn(2, 16)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


class Codes(nn.Module):
    """A dense layer whose weight is a buffer of bytes."""

    codes: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("codes", (layer.weight.detach() / 0.01).round().to(torch.int8))
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * 0.01, self.bias)


def of_codes() -> nn.Module:
    return nn.Sequential(*(Codes(each) if isinstance(each, nn.Linear) else each for each in network()))


def of_torchao() -> nn.Module:
    quantize_(model := network(), Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("make", [of_codes, of_torchao])
def test_a_quantised_model_is_refused_by_that_name(make: object) -> None:
    with pytest.raises(TraceError, match=r"quantised: 2 layers, '0' "):
        trace(make(), X)  # pyright: ignore


def test_what_is_not_quantised_beside_it_still_changes() -> None:
    layers = network()
    model = nn.Sequential(*copy.deepcopy(layers), nn.Tanh(), Codes(nn.Linear(4, 3)))
    assert trace(model, X).sizes["0"] == 32


def test_a_model_without_widths_that_is_not_quantised_is_traced() -> None:
    assert not trace(nn.Linear(16, 4), X).resizable


def test_a_model_that_does_not_run_names_the_line() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.ones(5)  # the line

    with pytest.raises(TraceError, match=r"test_quantised.py:\d+: return self.fc\(x\)"):
        trace(Broken(), X)
