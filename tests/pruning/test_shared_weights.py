"""Weights that are used several times, recurrent ones too, are refitted after a cut: to the moments of all their inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.measurement.output_error import output_error


class Again(nn.Module):
    """A residual block that runs four times, as ALBERT's layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 40), nn.Linear(40, 12)
        self.norm, self.last = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(4):
            h = self.norm(h + self.down(self.up(h).relu()))
        return self.last(h)


class Recurrent(nn.Module):
    """Its weights run once a step."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.steps, self.last = kind(6, 24, batch_first=True), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.steps(x)[0][:, -1])


def rows(count: int, *steps: int) -> Tensor:
    """Inputs of which three directions vary."""
    return torch.randn(count, *steps, 3) @ torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "width", "steps"),
    [(Again(), "up", ()), (Recurrent(nn.LSTM), "steps", (8,)), (Recurrent(nn.GRU), "steps", (8,))],
    ids=["again", "lstm", "gru"],
)
def test_shared_weights_make_up_for_what_is_cut(model: nn.Module, width: str, steps: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore
    samples, others = rows(512, *steps), rows(200, *steps)
    graph = evolvenet.trace(model, samples[:2])
    size = int(0.7 * graph.sizes[width])
    with torch.no_grad():
        expected = [model(others)]
        errors = []
        for batches in (None, [samples]):
            evolvenet.prune(cut := copy.deepcopy(model), graph, {width: size}, batches=batches)
            errors.append(output_error(expected, [cut(others)]))
    assert errors[1] < 0.1 * errors[0]
