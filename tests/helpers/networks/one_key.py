"""Multi-query attention: heads of queries that share one head of keys and values, in the ways that people write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.networks.grouped_attention import PLACES, TURN


def by_sizes(fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all heads, then a key and a value, split by their sizes."""
    queries, key, value = fused.split((heads * PLACES, PLACES, PLACES), -1)
    return queries.unflatten(-1, (heads, PLACES)), key[:, :, None], value[:, :, None]


def last_first(fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The key and the value stand before the queries."""
    key, value, queries = fused.split((PLACES, PLACES, heads * PLACES), -1)
    return queries.unflatten(-1, (heads, PLACES)), key[:, :, None], value[:, :, None]


def as_heads(fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """All are heads, of which the last two are the key and the value (Falcon)."""
    every = fused.unflatten(-1, (heads + 2, PLACES))
    return every[:, :, :-2], every[:, :, [-2]], every[:, :, [-1]]


SPLIT: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]] = {
    "sizes": by_sizes, "last first": last_first, "as heads": as_heads,
}  # fmt: skip


def product(queries: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Matrix products that broadcast the key over the heads."""
    return ((queries @ key.mT) * PLACES**-0.5 + bias).softmax(-1) @ value


def sums(queries: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """`einsum`, of a key without an axis of heads."""
    scores = torch.einsum("bhnd,bmd->bhnm", queries, key[:, 0]) * PLACES**-0.5
    return torch.einsum("bhnm,bmd->bhnd", (scores + bias).softmax(-1), value[:, 0])


def folded(queries: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Heads and positions on one axis (the first code of GPTBigCode)."""
    batch, heads, length, places = queries.shape
    scores = queries.transpose(1, 2).reshape(batch, length * heads, places) @ key[:, 0].mT * PLACES**-0.5
    shares = (scores.view(batch, length, heads, length) + bias.transpose(-3, -2)).softmax(-1)
    found = shares.view(batch, length * heads, length) @ value[:, 0]
    return found.view(batch, length, heads, places).transpose(1, 2)


def fused(queries: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The attention of torch."""
    heads = queries.shape[1]
    return F.scaled_dot_product_attention(
        queries, key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1), attn_mask=bias
    )


ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "product": product, "sums": sums, "folded": folded, "fused": fused,
}  # fmt: skip


class OneKey(nn.Module):
    """A block of multi-query attention, of which one layer makes queries, key and value, between two dense layers.

    Args:
        split: how the results of that layer are divided.
        attend: how scores and sums of values are computed.
        turn: the kind of rotary embedding; its frequencies are a buffer.
        norm: whether queries and keys are normalized, each head by itself with weights that all share.
        bias: whether each head has a table that is added to its scores (T5).
        heads: of queries.
        length: of the samples.
    """

    def __init__(
        self,
        split: str,
        attend: str,
        turn: str,
        norm: bool = False,
        bias: bool = False,
        heads: int = 6,
        length: int = 6,
    ) -> None:
        super().__init__()
        self.split, self.attend, self.turn, self.heads = split, attend, turn, heads
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.qkv, self.o = nn.Linear(12, (heads + 2) * PLACES), nn.Linear(heads * PLACES, 12)
        self.norm_q, self.norm_k = (nn.RMSNorm(PLACES) if norm else nn.Identity() for _ in range(2))
        self.bias = nn.Parameter(torch.randn(heads, length, length)) if bias else None
        self.register_buffer("frequencies", 0.3 ** torch.arange(PLACES // 2))

    def forward(self, x: Tensor) -> Tensor:
        """From `[batch, length, 5]` to `[batch, length, 3]`."""
        x = self.first(x).relu()
        queries, key, value = (part.transpose(1, 2) for part in SPLIT[self.split](self.qkv(x), self.heads))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.get_buffer("frequencies")
        queries = TURN[self.turn](self.norm_q(queries), angles)
        key = TURN[self.turn](self.norm_k(key), angles)
        bias = x.new_zeros(1, x.shape[1], x.shape[1]) if self.bias is None else self.bias
        return self.last(x + self.o(ATTEND[self.attend](queries, key, value, bias).transpose(1, 2).flatten(2)))
