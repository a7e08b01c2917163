"""Attention in which several heads of queries share a head of keys and values, in the ways that people write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLACES = 8
"""Places of a head."""


def expanded(keys: Tensor, repeats: int) -> Tensor:
    """Each head several times, one after the other, as in transformers' `repeat_kv`."""
    batch, heads, length, places = keys.shape
    return keys[:, :, None].expand(batch, heads, repeats, length, places).reshape(batch, -1, length, places)


def interleaved(keys: Tensor, repeats: int) -> Tensor:
    """The same by `repeat_interleave`."""
    return keys.repeat_interleave(repeats, 1)


REPEAT: dict[str, Callable[[Tensor, int], Tensor]] = {"expand": expanded, "repeat_interleave": interleaved}


def half_turns(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of places d and d + half, by an angle `[length, half]` each."""
    one, two = x.chunk(2, -1)
    angles = torch.cat([angles, angles], -1)
    return x * angles.cos() + torch.cat([-two, one], -1) * angles.sin()


def neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of places 2d and 2d + 1."""
    one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([one * angles.cos() - two * angles.sin(), one * angles.sin() + two * angles.cos()], -1)
    return turned.flatten(-2)


def no_turns(x: Tensor, angles: Tensor) -> Tensor:
    """No positions."""
    return x


TURN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"half": half_turns, "pairs": neighbours, "none": no_turns}


class GroupedAttention(nn.Module):
    """A block of grouped-query attention between two dense layers, as large language models have it.

    Args:
        heads: of queries.
        groups: heads of keys and values.
        repeat: how keys and values are repeated; "enable_gqa" leaves that to the fused attention of torch.
        turn: the kind of rotary embedding; its frequencies are a buffer.
        product: whether the code multiplies positions and frequencies as matrices, as transformers does before release 5.
        norm: whether queries and keys are normalized, each head by itself with weights that all share.
        sinks: whether each head of queries has a sink: a score that takes a share of its softmax and has no value (GPT-OSS).
    """

    def __init__(
        self,
        heads: int = 4,
        groups: int = 2,
        repeat: str = "expand",
        turn: str = "half",
        norm: bool = False,
        sinks: bool = False,
        product: bool = False,
    ) -> None:
        super().__init__()
        self.product = product
        self.places, self.repeats, self.repeat, self.turn = PLACES, heads // groups, repeat, turn
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.k, self.v = (nn.Linear(12, n * PLACES) for n in (heads, groups, groups))
        self.o = nn.Linear(heads * PLACES, 12)
        self.norm_q, self.norm_k = (nn.RMSNorm(PLACES) if norm else nn.Identity() for _ in range(2))
        self.sinks = nn.Parameter(torch.randn(heads)) if sinks else None
        self.register_buffer("frequencies", 0.3 ** torch.arange(PLACES // 2))

    def forward(self, x: Tensor) -> Tensor:
        """From `[batch, length, 5]` to `[batch, length, 3]`."""
        x = self.first(x).relu()
        queries, keys, values = (
            layer(x).view(len(x), x.shape[1], -1, self.places).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        positions, frequencies = torch.arange(x.shape[1], device=x.device)[:, None], self.get_buffer("frequencies")
        angles = (frequencies[:, None] @ positions.mT.to(x)).mT if self.product else positions * frequencies
        queries = TURN[self.turn](self.norm_q(queries), angles)
        keys = TURN[self.turn](self.norm_k(keys), angles)
        if self.repeat == "enable_gqa":
            found = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
        else:
            keys, values = (REPEAT[self.repeat](each, self.repeats) for each in (keys, values))
            scores = (queries @ keys.mT) * self.places**-0.5
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks.view(1, -1, 1, 1).expand(len(x), -1, x.shape[1], -1)], -1)
            found = scores.softmax(-1)[..., : x.shape[1]] @ values
        return self.last(x + self.o(found.transpose(1, 2).flatten(2)))
