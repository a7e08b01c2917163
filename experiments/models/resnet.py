"""Plain residual networks, every width of which is an argument. They do not import EvolveNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

CROPPED = (-2, -2, -2, -2)
"""Padding that crops as two 3 × 3 convolutions without padding do: left, right, top, bottom."""


class BasicBlock(nn.Module):
    """conv-norm-ReLU-conv-norm plus a shortcut, ReLU after the sum (He et al. 2016, post-activation).

    Args:
        inputs: channels in.
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


def activated(x: Tensor, negative_slope: float, silu: bool) -> Tensor:
    """SiLU of `x`, or its leaky ReLU.

    >>> activated(torch.tensor([-1.0, 2.0]), negative_slope=0.5, silu=False)
    tensor([-0.5000,  2.0000])
    """
    return functional.silu(x) if silu else functional.leaky_relu(x, negative_slope)


class UnpaddedBlock(nn.Module):
    """Twice a 3 × 3 convolution of each channel by itself, a 1 × 1 and a norm, plus the cropped input; then ReLU.

    He et al. 2016's basic block with Chollet's separable convolutions (2017).

    Args:
        width: channels in and out.
        inside: channels between.
        negative_slope: of the leaky ReLUs (Maas et al. 2013), inside and at the end; 0 makes them ReLUs.
        silu: SiLUs (Elfwing et al. 2018) in place of them.
    """

    def __init__(self, width: int, inside: int, negative_slope: float = 0.0, silu: bool = False) -> None:
        super().__init__()
        self.negative_slope, self.silu = negative_slope, silu
        self.depthwise1 = nn.Conv2d(width, width, 3, groups=width, bias=False)
        self.pointwise1 = nn.Conv2d(width, inside, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inside)
        self.depthwise2 = nn.Conv2d(inside, inside, 3, groups=inside, bias=False)
        self.pointwise2 = nn.Conv2d(inside, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, width, H, W]` → `[N, width, H − 4, W − 4]`."""
        inside = activated(self.norm1(self.pointwise1(self.depthwise1(x))), self.negative_slope, self.silu)
        outside = self.norm2(self.pointwise2(self.depthwise2(inside)))
        # Not a slice: its gradient would lose `channels_last`, which slows the backward pass.
        return activated(outside + functional.pad(x, CROPPED), self.negative_slope, self.silu)


class UnpaddedResNet(nn.Module):
    """Stem, 2 × 2 max pool, `UnpaddedBlock`s, global average pool, dense output.

    Without padding there are no artificial edges at the borders; 28 × 28 pixels become 13 × 13, 9 × 9 and 5 × 5.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        width: channels of the stem and between the blocks.
        inside: channels inside of each block.
        negative_slope: of all leaky ReLUs; 0 makes them ReLUs.
        silu: SiLUs in place of them.

    >>> UnpaddedResNet(width=8, inside=(8, 8))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        width: int = 256,
        inside: Sequence[int] = (1024, 1024),
        negative_slope: float = 0.0,
        silu: bool = False,
    ) -> None:
        super().__init__()
        self.negative_slope, self.silu = negative_slope, silu
        self.stem = nn.Conv2d(in_channels, width, 3, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(UnpaddedBlock(width, count, negative_slope, silu) for count in inside))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` → logits `[N, classes]`."""
        features = self.norm(self.pool(self.stem(images)))
        features = self.blocks(activated(features, self.negative_slope, self.silu))
        return self.head(features.mean(dim=(2, 3)))
