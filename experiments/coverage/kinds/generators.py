"""Networks that make images: generators, decoders, and a transformer that removes noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class DcganGenerator(nn.Module):
    """Radford et al. 2016."""

    def __init__(self, latent: int = 16, width: int = 8) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(latent, width * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(width * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """`[b, 16]` → `[b, 3, 32, 32]`."""
        return self.main(z[:, :, None, None])


class EqualLinear(nn.Module):
    """A dense layer whose weights are scaled as it runs, so that all have the same learning rate."""

    def __init__(self, fan_in: int, fan_out: int, lr_mul: float = 1.0, bias_init: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in) / lr_mul)
        self.bias = nn.Parameter(torch.full((fan_out,), bias_init))
        self.scale, self.lr_mul = lr_mul / math.sqrt(fan_in), lr_mul

    def forward(self, x: Tensor) -> Tensor:
        """`[b, fan_in]` → `[b, fan_out]`."""
        return functional.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class ModulatedConv(nn.Module):
    """Karras et al. 2020: a style scales the input channels of a kernel, which is then normalised per output channel."""

    def __init__(self, fan_in: int, fan_out: int, style: int, kernel: int = 3, demodulate: bool = True) -> None:
        super().__init__()
        self.fan_out, self.kernel, self.demodulate = fan_out, kernel, demodulate
        self.weight = nn.Parameter(torch.randn(1, fan_out, fan_in, kernel, kernel))
        self.scale = 1 / math.sqrt(fan_in * kernel**2)
        self.modulation = EqualLinear(style, fan_in, bias_init=1.0)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """`[b, fan_in, h, w]` → `[b, fan_out, h, w]`."""
        batch, channels, height, width = x.shape
        weight = self.scale * self.weight * self.modulation(style).view(batch, 1, channels, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(batch, self.fan_out, 1, 1, 1)
        weight = weight.view(batch * self.fan_out, channels, self.kernel, self.kernel)
        x = x.reshape(1, batch * channels, height, width)
        out = functional.conv2d(x, weight, padding=self.kernel // 2, groups=batch)
        return out.view(batch, self.fan_out, height, width)


class StyleGan(nn.Module):
    """A mapping network, a learned constant, two modulated convolutions and one to colours."""

    def __init__(self, latent: int = 12, style: int = 16, width: int = 24) -> None:
        super().__init__()
        self.mapping = nn.Sequential(
            EqualLinear(latent, style, 0.01), nn.LeakyReLU(0.2), EqualLinear(style, style, 0.01), nn.LeakyReLU(0.2)
        )
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))
        self.conv1, self.conv2 = ModulatedConv(width, width, style), ModulatedConv(width, 16, style)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(1, width, 1, 1)), nn.Parameter(torch.zeros(1, 16, 1, 1))
        self.to_rgb = ModulatedConv(16, 3, style, kernel=1, demodulate=False)

    def forward(self, z: Tensor) -> Tensor:
        """`[b, 12]` → `[b, 3, 8, 8]`."""
        z = z * torch.rsqrt(z.pow(2).mean(1, keepdim=True) + 1e-8)
        style = self.mapping(z)
        x = self.constant.repeat(len(z), 1, 1, 1)
        x = functional.leaky_relu(self.conv1(x, style) + self.bias1, 0.2)
        x = functional.interpolate(x, scale_factor=2, mode="bilinear")
        x = functional.leaky_relu(self.conv2(x, style) + self.bias2, 0.2)
        return self.to_rgb(x, style)


class AdaIn(nn.Module):
    """Instance norm whose scale and shift come from a style."""

    def __init__(self, channels: int, style: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.style = nn.Linear(style, channels * 2)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """`[b, channels, h, w]` → the same."""
        gamma, beta = self.style(style).unsqueeze(2).unsqueeze(3).chunk(2, 1)
        return (1 + gamma) * self.norm(x) + beta


class AdaInGenerator(nn.Module):
    """StyleGAN's first version: AdaIN after each convolution, noise added with a learned scale per channel."""

    def __init__(self, latent: int = 12, style: int = 16, width: int = 20) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(latent, style), nn.LeakyReLU(0.2), nn.Linear(style, style))
        self.start = nn.Sequential(nn.Linear(latent, width * 16), nn.Unflatten(1, (width, 4, 4)))
        self.conv1, self.ada1 = nn.Conv2d(width, width, 3, padding=1), AdaIn(width, style)
        self.conv2, self.ada2 = nn.Conv2d(width, 12, 3, padding=1), AdaIn(12, style)
        self.noise = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.to_rgb = nn.Conv2d(12, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        """`[b, 12]` → `[b, 3, 8, 8]`."""
        style = self.mapping(z)
        x = self.conv1(self.start(z))
        if self.training:
            x = x + self.noise * torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        x = functional.leaky_relu(self.ada1(x, style), 0.2)
        x = functional.interpolate(x, scale_factor=2)
        x = functional.leaky_relu(self.ada2(self.conv2(x), style), 0.2)
        return self.to_rgb(x)


class ConvAutoencoder(nn.Module):
    """An image to a code and back, with Flatten and Unflatten between convolutions and dense layers."""

    def __init__(self, code: int = 10) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, code),
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, 16 * 4 * 4),
            nn.ReLU(),
            nn.Unflatten(1, (16, 4, 4)),
            nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 3, stride=2, padding=1, output_padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 1, 16, 16]` → the same."""
        return self.decoder(self.encoder(x))


class Vae(nn.Module):
    """Kingma and Welling 2014: mean and log-variance of a code, a sample of it in train mode, the image."""

    def __init__(self, pixels: int = 64, hidden: int = 32, latent: int = 6) -> None:
        super().__init__()
        self.fc1, self.fc_mu, self.fc_logvar = nn.Linear(pixels, hidden), *(nn.Linear(hidden, latent) for _ in "ab")
        self.fc3, self.fc4 = nn.Linear(latent, hidden), nn.Linear(hidden, pixels)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """A sample; the mean in eval mode."""
        if not self.training:
            return mu
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, 1, 8, 8]` → `[b, 64]` and the divergence `[b]`."""
        h1 = functional.relu(self.fc1(x.flatten(1)))
        mu, logvar = self.fc_mu(h1), self.fc_logvar(h1)
        h3 = functional.relu(self.fc3(self.reparameterize(mu, logvar)))
        divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)
        return torch.sigmoid(self.fc4(h3)), divergence


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift every token alike."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DitBlock(nn.Module):
    """Peebles and Xie 2023: norms without affine, whose scales, shifts and gates come from the step."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        gates = nn.Linear(width, 6 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), gates)
        nn.init.zeros_(gates.weight)
        nn.init.zeros_(gates.bias)

    def attention(self, x: Tensor) -> Tensor:
        """Attention of all heads, as timm's code has it."""
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """`[b, n, width]` → the same."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Dit(nn.Module):
    """Patches, an embedding of the step, two blocks, patches back to an image."""

    def __init__(self, width: int = 24, heads: int = 4, patch: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.step = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([DitBlock(width, heads) for _ in range(2)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`[b, 3, 16, 16]` and steps `[b]` → `[b, 3, 16, 16]`."""
        half = torch.exp(-math.log(10000) * torch.arange(16, device=x.device) / 16)
        angles = t[:, None].to(x.dtype) * half
        c = self.step(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        x = self.head(modulate(self.norm(x), shift, scale))
        x = x.reshape(len(x), 4, 4, self.patch, self.patch, self.channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.channels, 16, 16)
