"""Small networks of our own for `experiments.coverage.run`: one for every kind of structure that widths occur in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

Entry = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], tuple[int, ...]]
"""(how to make it, shapes of its inputs without the batch, vocabulary of each or 0)."""


class UNet(nn.Module):
    """Down and up, skips concatenated; up once by a transposed convolution, once by interpolation."""

    def __init__(
        self, down: tuple[int, int, int] = (16, 24, 32), up: tuple[int, int] = (20, 16), last: int = 12
    ) -> None:
        super().__init__()
        one, two, bottom = down
        self.down1, self.down2 = nn.Conv2d(3, one, 3, padding=1), nn.Conv2d(one, two, 3, padding=1)
        self.bottom = nn.Conv2d(two, bottom, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(bottom, up[0], 2, 2)
        self.merge2 = nn.Conv2d(up[0] + two, two, 3, padding=1)
        self.up1 = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(two, up[1], 1))
        self.merge1 = nn.Conv2d(up[1] + one, last, 3, padding=1)
        self.head = nn.Conv2d(last, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 3, h, w]` → `[b, 2, h, w]`."""
        one = functional.relu(self.down1(x))
        two = functional.relu(self.down2(functional.max_pool2d(one, 2)))
        x = functional.relu(self.bottom(functional.max_pool2d(two, 2)))
        x = functional.relu(self.merge2(torch.cat([self.up2(x), two], 1)))
        x = functional.relu(self.merge1(torch.cat([self.up1(x), one], 1)))
        return self.head(x)


class Dense(nn.Module):
    """DenseNet style: the inputs of each layer are all the earlier outputs, concatenated."""

    def __init__(self, growth: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        fans = [16 + growth * k for k in range(layers)]
        self.norms = nn.ModuleList([nn.BatchNorm2d(fan) for fan in fans])
        self.convs = nn.ModuleList([nn.Conv2d(fan, growth, 3, padding=1) for fan in fans])
        self.head = nn.Linear(16 + growth * layers, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 3, h, w]` → `[b, 5]`."""
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(functional.relu(norm(torch.cat(parts, 1)))))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


class Mixer(nn.Module):
    """One MLP-Mixer block: an MLP over positions, then one over channels."""

    def __init__(self, positions: int = 16, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(positions, 20), nn.GELU(), nn.Linear(20, positions))
        self.channels = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 3, 16, 16]` → `[b, 5]`."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """A dense layer, a recurrent stack, and a head on its last step."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1, both: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.cell = kind(10, 16, num_layers=layers, bidirectional=both, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(32 if both else 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, steps, 6]` → `[b, 3]`."""
        return self.head(self.cell(torch.tanh(self.embed(x)))[0][:, -1])


class Encoder(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, steps, 6]` → `[b, 3]`."""
        return self.head(self.encoder(self.embed(x)).mean(1))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, tokens: int = 50, size: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, size)
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size)
        self.head = nn.Linear(size, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b, steps]` → `[b, steps, 50]`."""
        x = self.embed(tokens)
        return self.head(x + self.down(functional.relu(self.up(x))))


class Reused(nn.Module):
    """One module called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.step, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 6]` → `[b, 3]`."""
        x = functional.relu(self.embed(x))
        for _ in range(3):
            x = x + functional.relu(self.step(x))
        return self.head(x)


class LowRank(nn.Module):
    """LoRA as a parametrization: the weight plus a product of two thin matrices."""

    def __init__(self, rows: int, columns: int, rank: int = 4) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(rank, columns)), nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """`[rows, columns]` → the same."""
        return weight + self.up @ self.down


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def weight_norm() -> nn.Module:
    """Every layer's weight as direction times length."""
    model = _perceptron()
    for layer in (model[0], model[2], model[4]):
        parametrizations.weight_norm(layer)
    return model


def spectral_norm() -> nn.Module:
    """The inner layers' weights divided by their largest singular value."""
    model = _perceptron()
    for layer in (model[0], model[2]):
        parametrizations.spectral_norm(layer)
    return model


def lora() -> nn.Module:
    """Frozen weights with trainable low-rank additions."""
    model = _perceptron()
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.requires_grad_(False)
            parametrize.register_parametrization(layer, "weight", LowRank(layer.out_features, layer.in_features))
    return model


class SwiGlu(nn.Module):
    """A block as language models have it: RMS norm and a gated MLP on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm1, self.norm2 = nn.RMSNorm(16), nn.RMSNorm(16)
        self.gate, self.up, self.down = (nn.Linear(16, 40, bias=False), nn.Linear(16, 40), nn.Linear(40, 16))
        self.head = nn.Linear(16, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b, steps]` → `[b, steps, 50]`."""
        x = self.embed(tokens)
        inner = self.norm1(x)
        x = x + self.down(functional.silu(self.gate(inner)) * self.up(inner))
        return self.head(self.norm2(x))


class Inverted(nn.Module):
    """A MobileNet block: expand, depthwise, squeeze and excite, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 36, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(36), nn.BatchNorm2d(36)
        self.depthwise = nn.Conv2d(36, 36, 3, padding=1, groups=36, bias=False)
        self.squeeze, self.excite = nn.Conv2d(36, 9, 1), nn.Conv2d(9, 36, 1)
        self.project, self.head = nn.Conv2d(36, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 3, h, w]` → `[b, 5]`."""
        x = functional.hardswish(self.stem(x))
        inner = functional.relu6(self.norm2(self.depthwise(functional.hardswish(self.norm1(self.expand(x))))))
        scale = torch.sigmoid(self.excite(functional.relu(self.squeeze(inner.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(inner * scale)).mean((2, 3)))


def _pooled(*layers: nn.Module, width: int, space: int = 2) -> nn.Sequential:
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[space - 1](1)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(width, 4))


def transposed() -> nn.Module:
    """A decoder: transposed convolutions from a vector to an image, one of them grouped."""
    return nn.Sequential(
        nn.Unflatten(1, (-1, 1, 1)),
        nn.ConvTranspose2d(8, 24, 4),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 4, 2, 1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )


def sounds() -> nn.Module:
    """One-dimensional convolutions."""
    return _pooled(
        nn.Conv1d(2, 16, 5, 2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 24, 3), nn.ReLU(), width=24, space=1
    )


def volumes() -> nn.Module:
    """Three-dimensional convolutions."""
    layers = (nn.Conv3d(1, 12, 3), nn.BatchNorm3d(12), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(12, 16, 3), nn.ReLU())
    return _pooled(*layers, width=16, space=3)


def pixel_shuffle() -> nn.Module:
    """Four channels become one of twice the size."""
    up = (nn.Conv2d(3, 32, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(8), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
    return nn.Sequential(*up, nn.Conv2d(12, 3, 1))


def grouped() -> nn.Module:
    """Convolutions in four groups, then depthwise ones with two kernels a channel."""
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 16, 1))
    return _pooled(*layers, nn.ReLU(), nn.Conv2d(16, 32, 3, groups=16), nn.ReLU(), width=32)


def group_norm() -> nn.Module:
    """Group norm with several groups, with one, and instance norm."""
    layers = (nn.Conv2d(3, 16, 3), nn.GroupNorm(8, 16), nn.SiLU(), nn.Conv2d(16, 12, 3), nn.GroupNorm(1, 12), nn.ReLU())
    return _pooled(*layers, nn.Conv2d(12, 10, 1), nn.InstanceNorm2d(10, affine=True), nn.ReLU(), width=10)


def glu() -> nn.Module:
    """One half of a layer's units gates the other."""
    return nn.Sequential(nn.Linear(6, 32), nn.GLU(), nn.Linear(16, 24), nn.GLU(), nn.Linear(12, 3))


IMAGE, STEPS, VECTOR = ((3, 16, 16),), ((7, 6),), ((6,),)
NETWORKS: dict[str, Entry] = {
    "unet": (UNet, IMAGE, (0,)),
    "dense_style": (Dense, IMAGE, (0,)),
    "mlp_mixer": (Mixer, IMAGE, (0,)),
    "lstm": (partial(Recurrent, nn.LSTM), STEPS, (0,)),
    "lstm_two_layers_both_ways": (partial(Recurrent, nn.LSTM, 2, True), STEPS, (0,)),
    "gru": (partial(Recurrent, nn.GRU), STEPS, (0,)),
    "gru_two_layers_both_ways": (partial(Recurrent, nn.GRU, 2, True), STEPS, (0,)),
    "transformer_encoder": (Encoder, STEPS, (0,)),
    "tied_weights": (Tied, ((7,),), (50,)),
    "shared_module": (Reused, VECTOR, (0,)),
    "weight_norm": (weight_norm, VECTOR, (0,)),
    "spectral_norm": (spectral_norm, VECTOR, (0,)),
    "lora": (lora, VECTOR, (0,)),
    "conv_transpose": (transposed, ((8,),), (0,)),
    "conv1d": (sounds, ((2, 40),), (0,)),
    "conv3d": (volumes, ((1, 10, 10, 10),), (0,)),
    "pixel_shuffle": (pixel_shuffle, IMAGE, (0,)),
    "grouped_and_depthwise": (grouped, IMAGE, (0,)),
    "inverted_residual_squeeze_excite": (Inverted, IMAGE, (0,)),
    "group_norm": (group_norm, IMAGE, (0,)),
    "glu": (glu, VECTOR, (0,)),
    "swiglu_rms_norm_embedding": (SwiGlu, ((7,),), (50,)),
}
"""Every network by name."""
