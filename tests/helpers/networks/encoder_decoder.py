"""A transformer of encoder and decoder that returns more than its logits, as those of libraries do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Heads of 4 places, written with matrix products and a softmax; the keys and values may be those of other tokens."""

    def __init__(self, stream: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(stream, 4 * heads) for _ in range(3))
        self.output = nn.Linear(4 * heads, stream)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (
            project(each).unflatten(-1, (self.heads, 4)).transpose(1, 2)
            for project, each in ((self.query, x), (self.key, other), (self.value, other))
        )
        found = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.output(found.transpose(1, 2).flatten(2)), (k, v)


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a norm and added to the stream."""

    def __init__(self, stream: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(stream) for _ in range(2))
        self.attend = SelfAttention(stream, heads)
        self.up, self.down = nn.Linear(stream, hidden), nn.Linear(hidden, stream)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        normed = self.norms[0](x)
        found, kept = self.attend(normed, normed if other is None else other)
        x = x + found
        return x + self.down(self.up(self.norms[1](x)).relu()), kept


class EncoderDecoder(nn.Module):
    """Streams of 12 and 16; returns logits, the encoder's states, and the keys and values of the decoder."""

    def __init__(self, words: int = 20, classes: int = 5) -> None:
        super().__init__()
        self.words, self.others = nn.Embedding(words, 12), nn.Embedding(words, 16)
        self.encoder = nn.ModuleList([Layer(12, 2, 24)])
        self.between = nn.Linear(12, 16)
        self.decoder = nn.ModuleList([Layer(16, 3, 20)])
        self.head = nn.Linear(16, classes)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        x, y = self.words(tokens), self.others(tokens.flip(1))
        for layer in self.encoder:
            x, _ = layer(x)
        memory, past = self.between(x), []
        for layer in self.decoder:
            y, kept = layer(y, memory)
            past.append(kept)
        return {"logits": self.head(y), "encoder": {"states": x, "mask": None}, "past": past}
