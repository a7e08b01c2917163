"""A mixture of experts whose weights lie in one tensor each, multiplied group by group of rows as transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Feed-forward networks `[experts, …]`, of which a router selects `most` for each row.

    Args:
        experts: how many.
        stored: "out in" or "in out", the order of the weights' last two axes.
        bias: whether each expert has biases.
        slow: whether expert after expert is run in a loop, without the op.
    """

    def __init__(
        self,
        size: int = 16,
        inner: int = 24,
        experts: int = 4,
        most: int = 2,
        stored: str = "out in",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.most, self.stored, self.slow = experts, most, stored, False
        self.router = nn.Linear(size, experts, bias=bias)
        shapes = [(experts, 2 * inner, size), (experts, size, inner)]
        first, second = (torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)
        turned = stored == "in out"
        self.up = nn.Parameter(first.mT.contiguous() if turned else first)
        self.down = nn.Parameter(second.mT.contiguous() if turned else second)
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * inner)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(experts, size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        shares, chosen = torch.topk(self.router(rows).softmax(-1), self.most, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        ids, order = torch.sort(chosen.reshape(-1))
        sizes = torch.histc(ids.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = torch.cumsum(sizes, 0, dtype=torch.int32)
        h = self.product(rows[order // self.most], self.up, ends, self.up_bias, ids)
        gate, value = h.chunk(2, dim=-1)
        h = self.product(nn.functional.silu(gate) * value, self.down, ends, self.down_bias, ids)
        h = h * shares.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return h[back].view(len(rows), self.most, -1).sum(1).view(x.shape)

    def product(self, x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        weight = weight if self.stored == "in out" else weight.mT
        if self.slow:
            parts = zip(x.tensor_split(ends[:-1].tolist()), weight, strict=True)
            out = torch.cat([rows @ matrix for rows, matrix in parts])
        else:
            out = torch.ops.aten._grouped_mm(x, weight, ends)
        return out if bias is None else out.add_(bias[ids])


class Mixture(nn.Module):
    """Words embedded, two residual blocks of experts after norms, and a head."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 16)
        self.norms = nn.ModuleList(nn.RMSNorm(16, eps=1e-6) for _ in range(2))
        self.blocks = nn.ModuleList(Experts(**options) for _ in range(2))  # pyright: ignore[reportArgumentType]
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor) -> Tensor:
        h = self.words(words)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h))
        return self.head(h)

    def slowly(self) -> Mixture:
        """The same network, computed without the op."""
        for block in self.blocks:
            setattr(block, "slow", True)  # noqa: B010
        return self


class PickedExperts(nn.Module):
    """Experts of one matrix each, multiplied in another way than group by group.

    Args:
        way: "index": `weight[places]`; "one": the best alone, by `argmax`; "embedding": the matrices looked up as rows of a
            table; "groups": as "index", of the two groups of two experts whose sums are largest; "scatter" and "one_hot": all
            experts run, and shares of 0 for those that are not selected; "code": as "index", and the places are computed with;
            "output": as "index", and the places are an output.
    """

    def __init__(self, way: str, size: int = 5, experts: int = 6, most: int = 2) -> None:
        super().__init__()
        self.way, self.most, self.number, self.n_groups = way, most, experts, experts // 2
        self.first = nn.Linear(4, size)
        self.router = nn.Linear(size, experts)
        self.weight = nn.Parameter(torch.randn(experts, size, size))
        self.last = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x).tanh()
        shares = self.router(h).softmax(-1)
        if self.way == "groups":
            grid = shares.view(len(shares), self.n_groups, -1)
            best = grid.topk(2, -1)[0].sum(-1).topk(2, -1)[1]
            mask = torch.zeros_like(grid[..., 0]).scatter(1, best, 1)
            shares = shares.masked_fill(mask.unsqueeze(-1).expand_as(grid).reshape(shares.shape) == 0, 0.0)
        if self.way == "one":
            places = shares.argmax(-1, keepdim=True)
            values = shares.gather(-1, places).ceil()
        else:
            values, places = shares.topk(self.most, -1)
            values = values / values.sum(-1, keepdim=True)
        if self.way in ("scatter", "one_hot"):
            dense = torch.zeros_like(shares).scatter_(-1, places, values)
            if self.way == "one_hot":
                chosen = nn.functional.one_hot(places, self.number).to(values.dtype)
                dense = (chosen * values.unsqueeze(-1)).sum(1)
            mixed = torch.einsum("te,teo->to", dense, torch.einsum("ti,eio->teo", h, self.weight))
        else:
            table = self.weight.flatten(1)
            picked = nn.functional.embedding(places, table) if self.way == "embedding" else table[places]
            picked = picked.unflatten(-1, (h.shape[-1], -1))
            mixed = (torch.einsum("ti,tkio->tko", h, picked) * values.unsqueeze(-1)).sum(1)
        out = self.last(mixed.relu())
        if self.way == "code":
            out = out + places.to(out.dtype).mean(-1, keepdim=True)
        return (out, places) if self.way == "output" else out
