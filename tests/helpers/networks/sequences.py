"""Networks over words and steps: embeddings, recurrence, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BagOfWords(nn.Module):
    """Embeddings, averaged, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.hidden = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens).mean(1))))


class Recurrent(nn.Module):
    """A recurrent layer over the steps and a dense head on the last one."""

    def __init__(self, kind: Callable[..., nn.Module], outputs: int, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.cell = kind(input_size=4, batch_first=True, **{"hidden_size": 5, **options})
        self.head = nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(F.relu(self.embed(x)))[0][:, -1])


class Attention(nn.Module):
    """Multi-head self-attention beside a convolution and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(F.relu(self.hidden(x)).mean(1))


def transformer() -> nn.Module:
    """An encoder layer between dense ones."""
    return nn.Sequential(
        nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True), nn.Linear(8, 3)
    )
