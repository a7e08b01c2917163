"""Small models that the tests of measuring, pruning and growing share, all in float64.

The builders return Any: the type of a part of an `nn.Sequential` is not known to a type checker.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> Any:
    """Dense layers with an activation after each but the last."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1]).double()


def convnet(bias: bool = False) -> Any:
    """Convolution, batch norm, ReLU, unpadded convolution, ReLU, flatten, dense; input `[b, 3, 6, 6]`."""
    return used(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 16, 5),
        )
    )


def wide(width: int = 48) -> nn.Sequential:
    """Three convolutions and a dense layer of one width each, in float32; input `[b, 1, h, w]`."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5),
    )  # fmt: skip


class Residual(nn.Module):
    """A trunk with two producers and two consumers; input `[b, 3, 6, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 5, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Stem, one block with a shortcut, mean over positions, head."""
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Two branches of different width, concatenated; the second is read by one dense layer; input `[b, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 5)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Left beside right, then the head."""
        return self.head(torch.cat([self.left(x).relu(), self.right(x).relu()], dim=-1))


class Recurrent(nn.Module):
    """An LSTM and a dense layer on every step; input `[b, t, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The head on every step."""
        return self.head(self.cell(x)[0])


def mobile() -> Any:
    """A depthwise and a grouped convolution between pointwise ones; input `[b, 3, 6, 6]`."""
    return used(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 12, 3, groups=3),
            nn.ReLU(),
            nn.Conv2d(12, 4, 1),
        )
    )


def used(model: Any) -> Any:
    """In float64 and eval mode, every norm with scales, shifts and running moments as after some training."""
    model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(count: int = 64) -> Tensor:
    """Random inputs `[count, 3, 6, 6]`."""
    return torch.randn(count, 3, 6, 6, dtype=torch.float64)
