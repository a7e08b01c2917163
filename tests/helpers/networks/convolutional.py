"""Convolutional networks in one, two and three dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Sequential):
    """Convolution, batch norm, pooling, and a dense head on the flattened map: one channel, four inputs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 7),
            nn.ReLU(),
            nn.Linear(7, 4),
        )


class Block(nn.Module):
    """A post-activation residual block, with a 1×1 shortcut where stride or width change."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three blocks of two strides, a mean over positions and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(6, 6), Block(6, 8, 2), Block(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseNet(nn.Module):
    """Every layer reads all earlier ones side by side, through pre-activation norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10)])
        self.convs = nn.ModuleList([nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 5, 3, padding=1)])
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Scales every channel by what a small network makes of all channels' means."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(scale))))


class MobileNet(nn.Module):
    """An inverted residual: expand, depthwise convolution, squeeze and excite, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.excite = SqueezeExcite(8, 3)
        self.project = nn.Conv2d(8, 4, 1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        inner = F.hardswish(self.norm1(self.expand(x)))
        inner = self.excite(F.relu6(self.norm2(self.depthwise(inner))))
        x = x + self.project(inner)
        return self.head(x.mean((2, 3)))


class ResNeXt(nn.Module):
    """Grouped convolutions, also with more outputs than inputs, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.mix = nn.Conv2d(12, 6, 1)
        self.upward = nn.ConvTranspose2d(6, 9, 2, 2, groups=3)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix(F.relu(self.grouped(F.relu(self.stem(x))))))
        return self.head(F.relu(self.upward(x)).mean((2, 3)))


class GroupNormNet(nn.Sequential):
    """Groups of two channels, one group of all, and instance norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(4, 8),
            nn.SiLU(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.GroupNorm(1, 6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 1),
            nn.InstanceNorm2d(5, affine=True),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 2),
        )


class SuperResolution(nn.Sequential):
    """Pixel shuffle: four channels become one of twice the size."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.PReLU(12),
            nn.PixelShuffle(2),
            nn.Conv2d(3, 5, 3, padding=1),
            nn.PReLU(),
            nn.Conv2d(5, 2, 1),
        )


class Sounds(nn.Sequential):
    """One-dimensional convolutions with padding and pooling."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(2, 6, 3, stride=2),
            nn.BatchNorm1d(6),
            nn.LeakyReLU(),
            nn.ConstantPad1d(1, 0.0),
            nn.Conv1d(6, 5, 3, dilation=2),
            nn.AdaptiveAvgPool1d(2),
            nn.Flatten(),
            nn.Linear(10, 3),
        )


class Volumes(nn.Sequential):
    """Three-dimensional convolutions, down and up."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(1, 4, 3, padding=1),
            nn.BatchNorm3d(4),
            nn.ELU(),
            nn.MaxPool3d(2),
            nn.ConvTranspose3d(4, 5, 2, 2),
            nn.Conv3d(5, 2, 1),
        )


def factorized() -> nn.Module:
    """Convolutions and a dense layer, each replaced by a chain."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    # Networks are unpickled where evolvenet is not imported.
    from evolvenet.lowrank.factorize import factorize

    factorize(model, {"0": ("cp", 4), "3": ("tucker", (4, 5)), "7": 3})
    return model
