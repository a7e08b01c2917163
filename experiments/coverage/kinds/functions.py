"""Networks that stand for functions: solutions of equations, densities, operators, and networks that make networks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


class Pinn(nn.Module):
    """A field and the residual of the heat equation, whose derivatives are computed as the network runs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, width), nn.Tanh()
        )
        self.out = nn.Linear(width, 1)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, 2]` (place, time) → the field and the residual, `[b, 1]` each."""
        with torch.enable_grad():
            points = points.detach().clone().requires_grad_(True)
            u = self.out(self.net(points))
            first = torch.autograd.grad(u, points, torch.ones_like(u), create_graph=True)[0]
            u_x, u_t = first[:, 0:1], first[:, 1:2]
            u_xx = torch.autograd.grad(u_x, points, torch.ones_like(u_x), create_graph=True)[0][:, 0:1]
        return u, u_t - 0.1 * u_xx


class KanLayer(nn.Module):
    """Liu et al. 2024: a spline per pair of an input and an output, on a grid per input, beside a plain layer."""

    grid: Tensor

    def __init__(self, in_features: int, out_features: int, grid_size: int = 5, spline_order: int = 3) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spline_order = in_features, out_features, spline_order
        h = 2 / grid_size
        grid = (torch.arange(-spline_order, grid_size + spline_order + 1) * h - 1).expand(in_features, -1).contiguous()
        self.register_buffer("grid", grid)
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features) * 0.3)
        self.spline_weight = nn.Parameter(torch.randn(out_features, in_features, grid_size + spline_order) * 0.1)

    def b_splines(self, x: Tensor) -> Tensor:
        """`[b, in]` → `[b, in, grid_size + spline_order]`."""
        grid = self.grid
        x = x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.spline_order + 1):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * bases[:, :, :-1]
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:(-k)]) * bases[:, :, 1:]
            bases = left + right
        return bases

    def forward(self, x: Tensor) -> Tensor:
        """`[b, in]` → `[b, out]`."""
        base = functional.linear(functional.silu(x), self.base_weight)
        spline = functional.linear(self.b_splines(x).flatten(1), self.spline_weight.view(self.out_features, -1))
        return base + spline


class Kan(nn.Module):
    """Three layers of splines."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([KanLayer(4, 12), KanLayer(12, 10), KanLayer(10, 2)])

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 4]` → `[b, 2]`."""
        for layer in self.layers:
            x = layer(x)
        return x


class MaskedLinear(nn.Linear):
    """A dense layer some of whose weights are held at zero."""

    mask: Tensor

    def __init__(self, fan_in: int, fan_out: int, mask: Tensor) -> None:
        super().__init__(fan_in, fan_out)
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor) -> Tensor:
        """`[b, fan_in]` → `[b, fan_out]`."""
        return functional.linear(input, self.mask * self.weight, self.bias)


class Made(nn.Module):
    """Germain et al. 2015: each output depends on the inputs before it alone."""

    def __init__(self, inputs: int = 6, hidden: tuple[int, ...] = (20, 16)) -> None:
        super().__init__()
        degrees = [torch.arange(inputs), *(torch.arange(width) % (inputs - 1) for width in hidden)]
        layers: list[nn.Module] = []
        for one, two in itertools.pairwise(degrees):
            layers += [MaskedLinear(len(one), len(two), (two[:, None] >= one[None, :]).float()), nn.ReLU()]
        out = torch.arange(inputs).repeat(2)
        layers.append(MaskedLinear(hidden[-1], 2 * inputs, (out[:, None] > degrees[-1][None, :]).float()))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, 6]` → the sample and its log-determinant."""
        m, log_std = self.net(x).chunk(2, dim=1)
        u = (x - m) * torch.exp(-log_std)
        return u, -log_std.sum(dim=1)


class SpectralConv(nn.Module):
    """Li et al. 2021: the lowest frequencies are multiplied by complex weights."""

    def __init__(self, fan_in: int, fan_out: int, modes: int) -> None:
        super().__init__()
        self.fan_out, self.modes = fan_out, modes
        self.weights = nn.Parameter(torch.rand(fan_in, fan_out, modes, dtype=torch.cfloat) / (fan_in * fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, fan_in, n]` → `[b, fan_out, n]`."""
        transformed = torch.fft.rfft(x)
        out = torch.zeros(
            len(x), self.fan_out, x.size(-1) // 2 + 1, device=x.device, dtype=torch.complex(x[:1], x[:1]).dtype
        )
        weights = self.weights.to(out.dtype)
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", transformed[:, :, : self.modes], weights)
        return torch.fft.irfft(out, n=x.size(-1))


class RealSpectralConv(nn.Module):
    """The same with complex weights as pairs of real ones, which every optimizer takes, and zeros for the rest."""

    def __init__(self, fan_in: int, fan_out: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.pairs = nn.Parameter(torch.rand(fan_in, fan_out, modes, 2) / (fan_in * fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, fan_in, n]` → `[b, fan_out, n]`."""
        low = torch.fft.rfft(x)[..., : self.modes]
        out = torch.einsum("bix,iox->box", low, torch.view_as_complex(self.pairs))
        return torch.fft.irfft(functional.pad(out, (0, x.size(-1) // 2 + 1 - self.modes)), n=x.size(-1))


class Fno(nn.Module):
    """A lift, two Fourier layers beside convolutions over one place, a projection."""

    def __init__(self, conv: type[nn.Module] = SpectralConv, width: int = 12, modes: int = 5) -> None:
        super().__init__()
        self.fc0 = nn.Linear(2, width)
        self.conv0, self.conv1 = conv(width, width, modes), conv(width, width, modes)
        self.w0, self.w1 = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, n, 2]` → `[b, n, 1]`."""
        x = self.fc0(x).permute(0, 2, 1)
        x = functional.gelu(self.conv0(x) + self.w0(x))
        x = functional.gelu(self.conv1(x) + self.w1(x)).permute(0, 2, 1)
        return self.fc2(functional.gelu(self.fc1(x)))


class HyperNetwork(nn.Module):
    """Ha et al. 2017: a small network makes the weights of another from a description of the task."""

    def __init__(self, task: int = 4, fan_in: int = 5, hidden: int = 8, fan_out: int = 3) -> None:
        super().__init__()
        self.fan_in, self.hidden, self.fan_out = fan_in, hidden, fan_out
        self.trunk = nn.Sequential(nn.Linear(task, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
        self.w1, self.b1 = nn.Linear(16, hidden * fan_in), nn.Linear(16, hidden)
        self.w2, self.b2 = nn.Linear(16, fan_out * hidden), nn.Linear(16, fan_out)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """`[b, 5]` and `[b, 4]` → `[b, 3]`."""
        z = self.trunk(task)
        w1 = self.w1(z).view(-1, self.hidden, self.fan_in)
        w2 = self.w2(z).view(-1, self.fan_out, self.hidden)
        h = torch.relu(torch.bmm(w1, x.unsqueeze(-1)).squeeze(-1) + self.b1(z))
        return torch.bmm(w2, h.unsqueeze(-1)).squeeze(-1) + self.b2(z)


class FilmNetwork(nn.Module):
    """Perez et al. 2018: another input scales and shifts the channels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 20, 3, padding=1)
        self.film1, self.film2 = nn.Linear(6, 2 * width), nn.Linear(6, 40)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`[b, 3, h, w]` and `[b, 6]` → `[b, 4]`."""
        for conv, film in ((self.conv1, self.film1), (self.conv2, self.film2)):
            gamma, beta = film(condition)[:, :, None, None].chunk(2, 1)
            x = functional.relu(gamma * conv(x) + beta)
        return self.head(x.mean((2, 3)))
