"""Networks whose own code does something unusual: several inputs, fixed numbers, writes in place, a lock."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TwoInputs(nn.Module):
    """An image and a vector in; a class and a vector of the vector's size out."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 6, 3)
        self.read = nn.Linear(4, 5)
        self.join = nn.Linear(11, 8)
        self.label, self.echo = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Any]:
        seen = F.relu(self.see(image)).amax((2, 3))
        joined = F.relu(self.join(torch.cat([seen, F.relu(self.read(vector))], 1)))
        return {"label": self.label(joined), "rest": [self.echo(joined) + vector, 3.0]}


class Auxiliary(nn.Module):
    """A second head that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.extra = nn.Linear(8, 6)
        self.extra_head = nn.Linear(6, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.body(x))
        if not self.training:
            return self.head(x)
        return self.head(x), self.extra_head(F.relu(self.extra(x)))


class HardCoded(nn.Module):
    """`view(b, 6, 16)`: the number of channels is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Linear(16, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).view(len(x), 6, 16)
        return self.head(F.relu(self.mix(x)).mean(1))


class OwnParameters(nn.Module):
    """A module with parameters of its own: a scale, a shift, a matrix, and a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.shift = nn.Parameter(torch.randn(1, 8))
        self.matrix = nn.Parameter(torch.randn(8, 6))
        self.register_buffer("scale", torch.rand(8))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(((self.embed(x) + self.shift) * self.scale) @ self.matrix))


class InPlace(nn.Module):
    """In-place additions, multiplications and activations, also into a tensor that the code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(5, 8)
        self.gate = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y.add_(self.two(x)).mul_(2.0).relu_()
        gate = self.gate(y).unsqueeze_(1).transpose_(1, 2).squeeze_(2)
        total = torch.zeros_like(gate)
        total += torch.sigmoid(gate)
        return self.head(total)


class Locked(nn.Module):
    """Holds a lock, so it cannot be deep-copied, and counts its calls in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.calls = 0
        self.seen: list[torch.Size] = []
        self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
            self.seen.append(x.shape)
        return self.body(x)


class Peeking(nn.Module):
    """Looks at values, which shadows without data do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().numpy().max()) + x.abs().sum().item()
        return self.head(F.relu(self.hidden(F.relu(self.body(x / scale)))))
