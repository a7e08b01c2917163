"""Small networks of every kind of structure, for the table in `cases`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Sequential):
    """Dense layers with GELU and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(5, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 9), nn.GELU(), nn.Dropout(0.2), nn.Linear(9, 3)
        )


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


class UNet(nn.Module):
    """Down and up again, once by a transposed convolution and once by interpolation, with concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 5, 3, padding=1)
        self.down2 = nn.Conv2d(5, 6, 3, padding=1)
        self.bottom = nn.Conv2d(6, 7, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(7, 4, 2, 2)
        self.merge2 = nn.Conv2d(10, 6, 3, padding=1)
        self.up1 = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(6, 4, 1))
        self.merge1 = nn.Conv2d(9, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        x = F.relu(self.bottom(F.max_pool2d(two, 2)))
        x = F.relu(self.merge2(torch.cat([self.up2(x), two], 1)))
        x = F.relu(self.merge1(torch.cat([self.up1(x), one], 1)))
        return self.head(x)


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


class LayerNormMlp(nn.Module):
    """A residual stream under layer norm and RMS norm, with a hidden layer that no norm touches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.head(self.norm2(x))


class BagOfWords(nn.Module):
    """Embeddings, averaged, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.hidden = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens).mean(1))))


class TiedLanguageModel(nn.Module):
    """The embedding's weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(F.relu(self.up(x))))


class Recurrent(nn.Module):
    """A recurrent layer over the steps and a dense head on the last one."""

    def __init__(self, kind: Callable[..., nn.Module], outputs: int, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.cell = kind(input_size=4, batch_first=True, **{"hidden_size": 5, **options})
        self.head = nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(F.relu(self.embed(x)))[0][:, -1])


class Gated(nn.Module):
    """GLU: one half of a layer's units gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 12)
        self.hidden = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.glu(self.gate(x), dim=-1))))


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


class Reused(nn.Module):
    """One layer applied twice, so what it makes is also what it reads, and a branch that shares a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.step = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        for _ in range(2):
            x = x + torch.relu(self.step(x))
        return self.head(x)


class TwoInputs(nn.Module):
    """An image and a vector in; a class and a vector of the vector's size out."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 6, 3)
        self.read = nn.Linear(4, 5)
        self.join = nn.Linear(11, 8)
        self.label, self.echo = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Any]:
        seen = F.relu(self.see(image)).amax((2, 3))
        joined = F.relu(self.join(torch.cat([seen, F.relu(self.read(vector))], 1)))
        return {"label": self.label(joined), "rest": [self.echo(joined) + vector, 3.0]}


class Auxiliary(nn.Module):
    """A second head that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.extra = nn.Linear(8, 6)
        self.extra_head = nn.Linear(6, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.body(x))
        if not self.training:
            return self.head(x)
        return self.head(x), self.extra_head(F.relu(self.extra(x)))


class HardCoded(nn.Module):
    """`view(b, 6, 16)`: the number of channels is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Linear(16, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).view(len(x), 6, 16)
        return self.head(F.relu(self.mix(x)).mean(1))


class OwnParameters(nn.Module):
    """A module with parameters of its own: a scale, a shift, a matrix, and a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.shift = nn.Parameter(torch.randn(1, 8))
        self.matrix = nn.Parameter(torch.randn(8, 6))
        self.register_buffer("scale", torch.rand(8))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(((self.embed(x) + self.shift) * self.scale) @ self.matrix))


class InPlace(nn.Module):
    """In-place additions, multiplications and activations, also into a tensor that the code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(5, 8)
        self.gate = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y.add_(self.two(x)).mul_(2.0).relu_()
        gate = self.gate(y).unsqueeze_(1).transpose_(1, 2).squeeze_(2)
        total = torch.zeros_like(gate)
        total += torch.sigmoid(gate)
        return self.head(total)


class Locked(nn.Module):
    """Holds a lock, so it cannot be deep-copied, and counts its calls in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.calls = 0
        self.seen: list[torch.Size] = []
        self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
            self.seen.append(x.shape)
        return self.body(x)


class Peeking(nn.Module):
    """Looks at values, which shadows without data do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().numpy().max()) + x.abs().sum().item()
        return self.head(F.relu(self.hidden(F.relu(self.body(x / scale)))))


class Attention(nn.Module):
    """Multi-head self-attention beside a convolution and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(F.relu(self.hidden(x)).mean(1))


def transformer() -> nn.Module:
    """An encoder layer between dense ones."""
    return nn.Sequential(
        nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True), nn.Linear(8, 3)
    )
