"""A small vision transformer, whose queries, keys and values come from one dense layer. It does not import EvolveNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class AttentionBlock(nn.Module):
    """Self-attention and a dense part of two layers, LayerNorm before each, x added to each (Dosovitskiy et al. 2021).

    Args:
        width: channels in and out.
        heads: of the attention.
        inside: units between the two dense layers.

    >>> AttentionBlock(8, 2, 16)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inside)
        self.fc2 = nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, tokens, width]` → the same shape."""
        qkv = self.qkv(self.norm1(x))
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches as tokens, `AttentionBlock`s, the mean over all tokens, dense output.

    Args:
        channels: of the images.
        size: height and width of the images, a multiple of `patch`.
        patch: height and width of a patch.
        classes: number of outputs.
        width: channels of a token.
        depth: number of blocks.
        heads: of each block.
        expansion: units inside of a block's dense part for each of its channels.

    >>> VisionTransformer(channels=1, size=28, patch=7, width=16, depth=1, heads=2)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        patch: int = 4,
        classes: int = 10,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads, expansion * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, channels, size, size]` → logits `[N, classes]`."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))
