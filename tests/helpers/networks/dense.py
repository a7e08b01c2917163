"""Dense networks: plain, normed, gated, with a layer that is used twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Sequential):
    """Dense layers with GELU and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(5, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 9), nn.GELU(), nn.Dropout(0.2), nn.Linear(9, 3)
        )


class LayerNormMlp(nn.Module):
    """A residual stream under layer norm and RMS norm, with a hidden layer that no norm touches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.head(self.norm2(x))


class Gated(nn.Module):
    """GLU: one half of a layer's units gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 12)
        self.hidden = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.glu(self.gate(x), dim=-1))))


class Reused(nn.Module):
    """One layer applied twice, so what it makes is also what it reads, and a branch that shares a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.step = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        for _ in range(2):
            x = x + torch.relu(self.step(x))
        return self.head(x)
