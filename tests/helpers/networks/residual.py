"""Networks with residual streams under norms, as transformers and image models have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """One of torch's encoder layers between two dense ones, the norms before or after the branches."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 20, norm_first=norm_first, batch_first=True, dropout=0.0)
        self.norm = nn.LayerNorm(16) if norm_first else nn.Identity()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x))))


class ResidualMlp(nn.Module):
    """Two branches behind norms; with a second consumer of the stream that has no norm, on demand."""

    def __init__(self, norm: Callable[[int], nn.Module], size: int = 12, bare: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, size), nn.Linear(size, 3)
        self.norms = nn.ModuleList(norm(size) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(size, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, size) for _ in range(2))
        self.pooler = nn.Linear(size, 3) if bare else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.nn.functional.gelu(up(norm(x))))
        out = self.head(self.norms[2](x))
        return out if self.pooler is None else out + self.pooler(x)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of images, `[samples, channels, rows, columns]`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A stem, a block with a depthwise convolution and layer scale, and a head."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = ChannelNorm(8, eps=1e-6), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.scale = nn.Parameter(torch.full((8, 1, 1), scale))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = self.down(torch.nn.functional.gelu(self.up(self.norm(self.depthwise(x)))))
        x = x + self.scale * branch
        return self.head(self.last(x.mean((2, 3))))


class PatchMerging(nn.Module):
    """A stream of which pairs of places are laid side by side under one norm, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.merged, self.reduce = nn.LayerNorm(16), nn.Linear(16, 10)
        self.last, self.head = nn.LayerNorm(10), nn.Linear(10, 3)
        self.inner, self.branch = nn.LayerNorm(10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.up(self.norm(x))
        x = self.reduce(self.merged(torch.cat([x[:, ::2], x[:, 1::2]], -1)))
        x = x + self.branch(self.inner(x))
        return self.head(self.last(x))
