"""Plain residual networks, every width of which is an argument. They know nothing of EvolveNet."""

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


class SeparableBlock(nn.Module):
    """A 3 × 3 convolution of each channel by itself, then two 1 × 1 with a ReLU between, plus a shortcut.

    The parts of MobileNet V1 and V2 (Howard et al. 2017, Sandler et al. 2018). Nothing follows the sum.

    Args:
        inputs: channels that come in.
        inside: channels between the two 1 × 1 convolutions.
        width: channels that go out.
        stride: of the 3 × 3 convolution; the shortcut is averaged over as many places.
    """

    def __init__(self, inputs: int, inside: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.expand = nn.Conv2d(inputs, inside, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inside)
        self.project = nn.Conv2d(inside, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        shortcut: list[nn.Module] = [nn.AvgPool2d(stride, ceil_mode=True)] if stride != 1 else []
        if inputs != width:
            shortcut += [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` → `[N, width, H / stride, W / stride]`."""
        inside = torch.relu(self.norm2(self.expand(self.norm1(self.depthwise(x)))))
        return self.norm3(self.project(inside)) + self.shortcut(x)


class SeparableResNet(nn.Module):
    """Stem and 2 × 2 max pool, stages of `SeparableBlock`s, global average pool, dense output.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        widths: channels of each stage; the stem has the first stage's.
        blocks: number of blocks in each stage; the first one of each but the first stage halves the resolution.
        expansion: channels inside of a block for each that goes out.

    Raises:
        ValueError: if `widths` and `blocks` differ in length.

    >>> SeparableResNet(in_channels=1, widths=(8, 16), blocks=(1, 1))(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        widths: Sequence[int] = (64, 320),
        blocks: Sequence[int] = (2, 3),
        expansion: int = 4,
    ) -> None:
        super().__init__()
        if len(widths) != len(blocks):
            raise ValueError(
                f"SeparableResNet: expected one entry a stage in widths and blocks, got {len(widths)} and {len(blocks)}."
            )
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(2)
        stages = [
            SeparableBlock(inputs if first else width, expansion * width, width, 2 if first and stage else 1)
            for stage, (inputs, width, count) in enumerate(zip((widths[0], *widths), widths, blocks, strict=False))
            for first in [True, *[False] * (count - 1)]
        ]
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` → logits `[N, classes]`."""
        features = self.blocks(self.pool(torch.relu(self.norm(self.stem(images)))))
        return self.head(torch.relu(features).mean(dim=(2, 3)))
