"""A mixture of experts whose weights lie in one tensor each, multiplied group by group of rows as transformers does."""

from __future__ import annotations

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
