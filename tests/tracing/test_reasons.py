"""Reasons of frozen widths: the op, its module and the line of the model's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet.tracing.trace import trace
from tests.helpers.tracing import Between


def test_a_reason_names_the_op_and_the_line_of_the_models_code() -> None:
    def code(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        return h.softmax(-1)  # this line

    frozen = trace(Between(code), torch.zeros(2, 5)).widths["a"].frozen
    assert frozen is not None
    reason, _, line = frozen.partition(" at ")
    assert reason == "aten::_softmax in Between makes its units compete"
    assert line.startswith("tracing/test_reasons.py:")
    assert line.endswith(": return h.softmax(-1)  # this line")


def test_a_model_of_torchs_own_code_alone_has_no_line() -> None:
    graph = trace(nn.Sequential(nn.Linear(5, 8), nn.Softmax(-1), nn.Linear(8, 2)), torch.zeros(2, 5))
    assert graph.widths["0"].frozen == "aten::_softmax in 1 (Softmax) makes its units compete"


class Averaged(nn.Linear):
    """A layer whose own code divides by a number of units."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / len(self.weight)


def test_an_op_that_computes_other_numbers_is_named_with_its_line() -> None:
    torch.manual_seed(0)
    graph = trace(nn.Sequential(Averaged(5, 8), nn.Tanh(), nn.Linear(8, 2)), torch.ones(2, 5))
    frozen = str(graph.widths["0"].frozen)
    assert frozen.startswith("aten::div in 0 (Averaged) computes other values once units of zeros are added")
    assert frozen.endswith(": return super().forward(input) / len(self.weight)")


class Indexed(nn.Module):
    """A width whose gate picks by an index that is computed from it."""

    def __init__(self, pick: Callable[[nn.Linear, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.gate, self.out, self.pick = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3), pick

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x) * self.gate) + self.pick(self.inner, self.gate, x).mean()


@pytest.mark.parametrize(
    ("pick", "reason"),
    [
        (lambda inner, gate, x: x.new_ones(8, 6)[gate > 0], "picks by a mask that is computed from them"),
        (lambda inner, gate, x: inner(x)[:, gate > 0][:, :2], "picks them by an index"),
        (lambda inner, gate, x: inner.weight[gate > 0] * gate[gate > 0][:, None], "picks them by an index"),
        (lambda inner, gate, x: x.new_ones(8, 6)[gate.long()[None]], "picks by an index of 2 dimensions"),
        (lambda inner, gate, x: x.new_ones(8, 8)[gate.long(), gate.long()], "picks by several indices at once"),
    ],
)
def test_units_that_an_index_is_computed_from_are_frozen_with_what_the_index_is(pick: Any, reason: str) -> None:
    torch.manual_seed(0)
    model = Indexed(pick)
    with torch.no_grad():
        model.gate[::3] = 0.0
    graph = trace(model, torch.ones(5, 6))
    # The line that follows holds the expected text as well.
    assert str(graph.widths["inner"].frozen).startswith(f"aten::index in Indexed {reason} at ")
