"""A residual network with dense convolutions at high resolution and ConvNeXt's blocks at low resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.models.resnet import BasicBlock


class MixerBlock(nn.Module):
    """A 3 × 3 convolution of each channel by itself, LayerNorm over channels, two dense layers with a GELU between; plus x.

    ConvNeXt's block (Liu et al. 2022) with a small kernel and without its layer scale.

    Args:
        width: channels in and out.
        inside: units between the two dense layers.

    >>> MixerBlock(8, 16)(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, inside)
        self.project = nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, width, H, W]` → the same shape."""
        inside = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.project(functional.gelu(self.expand(inside))).permute(0, 3, 1, 2)


class HybridResNet(nn.Module):
    """Stem, stages of a `BasicBlock` and some `MixerBlock`s, global average pool, dense output.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        widths: channels of each stage; the stem has the first stage's. Every stage but the first halves the resolution.
        mixers: number of `MixerBlock`s in each stage.
        expansion: units inside of a `MixerBlock` for each of its channels.
        stem_stride: of the stem, whose kernel is larger by 2.

    Raises:
        ValueError: if `widths` and `mixers` differ in length.

    >>> HybridResNet(widths=(8, 16), mixers=(0, 1))(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        widths: Sequence[int] = (32, 64, 128, 256),
        mixers: Sequence[int] = (0, 0, 1, 1),
        expansion: int = 4,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if len(widths) != len(mixers):
            raise ValueError(
                f"HybridResNet: expected one entry a stage in widths and mixers, got {len(widths)} and {len(mixers)}."
            )
        self.stem = nn.Conv2d(in_channels, widths[0], stem_stride + 2, stride=stem_stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        for stage, (inputs, width, count) in enumerate(zip((widths[0], *widths), widths, mixers, strict=False)):
            stages.append(BasicBlock(inputs, width, 2 if stage else 1))
            stages += [MixerBlock(width, expansion * width) for _ in range(count)]
        self.blocks = nn.Sequential(*stages)
        self.last = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` → logits `[N, classes]`."""
        features = self.blocks(torch.relu(self.norm(self.stem(images))))
        return self.head(torch.relu(self.last(features)).mean(dim=(2, 3)))
