"""A stand-in for gromo, which is installed in the environment of the comparisons alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn


class Gromo(nn.Module):
    """What the comparisons use of gromo's `GrowingMLP`, with new units whose output is `scale` times the input's first entry."""

    def __init__(self, inputs: int, outputs: int, hidden: int, count: int, activation: nn.Module, device: Any) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * count, outputs]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
        self.activation, self.scale, self.calls = activation, 0.0, []
        self.applied = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.extended_forward(x, self.applied)

    def extended_forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = x.flatten(1)
        extra = x[:, :1] * (self.scale if scale is None else scale)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x) + extra * torch.eye(10)[3]

    def set_scaling_factor(self, scale: float) -> None:
        self.scale = scale

    def update_computation(self) -> None:
        gradient = self.layers[-1].bias.grad
        assert isinstance(gradient, Tensor)
        self.calls.append(("update_computation", gradient.clone()))

    def apply_change(self) -> None:
        self.applied += self.scale
        self.calls.append(("applied", self.scale))

    def __getattr__(self, name: str) -> Any:
        recorded = ("set_growing_layers", "init_computation", "compute_optimal_updates")
        if name in (*recorded, "reset_computation", "dummy_select_update"):
            return lambda **options: self.calls.append((name, options))
        return super().__getattr__(name)
