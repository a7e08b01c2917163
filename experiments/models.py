"""A plain ResNet, every width of which is an argument. It knows nothing of EvolveNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """conv-norm-ReLU-conv-norm plus a shortcut, ReLU after the sum (He et al. 2016, post-activation).

    Args:
        inputs: channels that come in.
        width: channels inside and out.
        stride: of the first convolution; the shortcut is a strided 1 × 1 convolution where the shape changes.
    """

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` → `[N, width, H / stride, W / stride]`."""
        inside = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inside)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of `BasicBlock`s, global average pool, one hidden dense layer, dense output.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        widths: channels of each stage; the stem has the first stage's.
        blocks: number of blocks in each stage.
        strides: of the first block of each stage.
        stem_stride: of the stem.
        hidden: units of the hidden dense layer.

    Raises:
        ValueError: if `widths`, `blocks` and `strides` differ in length.

    >>> ResNet(in_channels=1, widths=(8, 16), blocks=(1, 1), strides=(1, 2), hidden=8)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        widths: Sequence[int] = (64, 128, 256),
        blocks: Sequence[int] = (2, 2, 2),
        strides: Sequence[int] = (1, 2, 2),
        stem_stride: int = 1,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        if not len(widths) == len(blocks) == len(strides):
            raise ValueError(
                f"ResNet: expected one entry a stage in each of widths, blocks and strides, "
                f"got {len(widths)}, {len(blocks)} and {len(strides)}."
            )
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stride=stem_stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages = [
            BasicBlock(inputs if first else width, width, stride if first else 1)
            for inputs, width, count, stride in zip((widths[0], *widths), widths, blocks, strides, strict=False)
            for first in [True, *[False] * (count - 1)]
        ]
        self.blocks = nn.Sequential(*stages)
        self.hidden = nn.Linear(widths[-1], hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` → logits `[N, classes]`."""
        features = self.blocks(torch.relu(self.norm(self.stem(images))))
        return self.head(torch.relu(self.hidden(features.mean(dim=(2, 3)))))
