"""Networks over sequences: recurrent, convolutional, and with attention, retention, a scan or experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ActorCritic(nn.Module):
    """A recurrent policy whose state is zeroed where an episode ended; values and action logits."""

    def __init__(self, observation: int = 6, hidden: int = 16, actions: int = 4) -> None:
        super().__init__()
        self.hidden = hidden
        self.encoder = nn.Sequential(nn.Linear(observation, 24), nn.Tanh())
        self.core = nn.LSTMCell(24, hidden)
        self.actor = nn.Sequential(nn.Linear(hidden, 20), nn.Tanh(), nn.Linear(20, actions))
        self.critic = nn.Sequential(nn.Linear(hidden, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, observations: Tensor, dones: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, steps, 6]` and `[b, steps]` → `[b, steps, 4]` and `[b, steps]`."""
        x = self.encoder(observations)
        h = torch.zeros(len(x), self.hidden, dtype=x.dtype, device=x.device)
        c = torch.zeros_like(h)
        outs = []
        for t in range(x.shape[1]):
            alive = (1.0 - dones[:, t].to(x.dtype)).unsqueeze(-1)
            h, c = self.core(x[:, t], (h * alive, c * alive))
            outs.append(h)
        out = torch.stack(outs, dim=1)
        return self.actor(out), self.critic(out).squeeze(-1)


class ConvLstmCell(nn.Module):
    """Shi et al. 2015: an LSTM whose products are convolutions."""

    def __init__(self, fan_in: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.conv = nn.Conv2d(fan_in + hidden_dim, 4 * hidden_dim, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """One step."""
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], dim=1)), self.hidden_dim, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def init_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros."""
        shape = (len(x), self.hidden_dim, *x.shape[-2:])
        return torch.zeros(shape, dtype=x.dtype, device=x.device), torch.zeros(shape, dtype=x.dtype, device=x.device)


class ConvLstm(nn.Module):
    """Two layers over a few frames, and the next frame."""

    def __init__(self, widths: tuple[int, int] = (8, 12)) -> None:
        super().__init__()
        fans = (2, *widths[:-1])
        self.cells = nn.ModuleList([ConvLstmCell(fan, width) for fan, width in zip(fans, widths, strict=True)])
        self.head = nn.Conv2d(widths[-1], 2, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """`[b, t, 2, h, w]` → `[b, 2, h, w]`."""
        outs = list(frames.unbind(1))
        for cell in self.cells:
            assert isinstance(cell, ConvLstmCell)
            state = cell.init_hidden(frames)
            for t, x in enumerate(outs):
                state = cell(x, state)
                outs[t] = state[0]
        return self.head(outs[-1])


class NBeatsBlock(nn.Module):
    """Oreshkin et al. 2020: what a block explains of the past is subtracted, its forecast is added."""

    def __init__(self, past: int, future: int, width: int, thetas: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(past, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.theta_b, self.theta_f = nn.Linear(width, thetas, bias=False), nn.Linear(width, thetas, bias=False)
        self.backcast, self.forecast = nn.Linear(thetas, past), nn.Linear(thetas, future)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, past]` → `[b, past]`, `[b, future]`."""
        x = self.fc(x)
        return self.backcast(self.theta_b(x)), self.forecast(self.theta_f(x))


class SeasonalBlock(nn.Module):
    """The same with a fixed basis of cosines and sines."""

    def __init__(self, past: int, future: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(past, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.theta = nn.Linear(width, 8, bias=False)
        self.register_buffer("back", self.basis(past))
        self.register_buffer("fore", self.basis(future))

    @staticmethod
    def basis(length: int) -> Tensor:
        """Cosines and sines of two frequencies, `[4, length]`."""
        t = torch.arange(length) / length
        rows = [f(2 * torch.pi * k * t) for k in (1, 2) for f in (torch.cos, torch.sin)]
        return torch.stack(rows)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, past]` → `[b, past]`, `[b, future]`."""
        theta = self.theta(self.fc(x))
        return theta[:, :4] @ self.back, theta[:, 4:] @ self.fore


class NBeats(nn.Module):
    """Two generic blocks and a seasonal one."""

    def __init__(self, past: int = 12, future: int = 4) -> None:
        super().__init__()
        self.future = future
        self.blocks = nn.ModuleList([NBeatsBlock(past, future, 24, 6) for _ in range(2)])
        self.blocks.append(SeasonalBlock(past, future, 16))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 12]` → `[b, 4]`."""
        forecast = torch.zeros(len(x), self.future, dtype=x.dtype, device=x.device)
        for block in self.blocks:
            back, fore = block(x)
            x, forecast = x - back, forecast + fore
        return forecast


class WaveNet(nn.Module):
    """van den Oord et al. 2016: dilated causal convolutions, gates, a residual stream and a sum of skips."""

    def __init__(self, residual: int = 12, skip: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, residual, 1)
        self.dilations = [2**k for k in range(layers)]
        self.filters = nn.ModuleList([nn.Conv1d(residual, 2 * residual, 2, dilation=d) for d in self.dilations])
        self.residuals = nn.ModuleList([nn.Conv1d(residual, residual, 1) for _ in self.dilations])
        self.skips = nn.ModuleList([nn.Conv1d(residual, skip, 1) for _ in self.dilations])
        self.end1, self.end2 = nn.Conv1d(skip, 20, 1), nn.Conv1d(20, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 1, t]` → `[b, 8, t]`."""
        x = self.start(x)
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for d, conv, res, skip in zip(self.dilations, self.filters, self.residuals, self.skips, strict=True):
            f, g = conv(functional.pad(x, (d, 0))).chunk(2, dim=1)
            z = torch.tanh(f) * torch.sigmoid(g)
            total = total + skip(z)
            x = x + res(z)
        return self.end2(functional.relu(self.end1(functional.relu(total))))


class Perceiver(nn.Module):
    """Jaegle et al. 2021: a few learned latents attend to the input, then to each other."""

    def __init__(self, channels: int = 6, latents: int = 5, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.embed = nn.Linear(channels, 16)
        self.cross = nn.MultiheadAttention(width, heads, kdim=16, vdim=16, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.block = nn.TransformerEncoderLayer(width, heads, 40, batch_first=True, norm_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, n, 6]` → `[b, 3]`."""
        x = self.embed(x)
        z = self.latents.unsqueeze(0).expand(len(x), -1, -1)
        z = z + self.cross(self.norm1(z), x, x, need_weights=False)[0]
        z = z + self.mlp(self.norm2(z))
        return self.head(self.block(z).mean(1))


class MixtureOfExperts(nn.Module):
    """Each token goes to the two experts that a router picks, as Mixtral's code has it."""

    def __init__(self, width: int = 16, inner: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width)) for _ in range(experts)]
        )
        self.head = nn.Linear(width, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b, t]` → `[b, t, 50]`."""
        x = self.embed(tokens)
        flat = self.norm(x).view(-1, x.shape[-1])
        weights, chosen = functional.softmax(self.gate(flat), dim=1).topk(2, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, slot, None])
        return self.head(x + out.view_as(x))


class SoftMixture(nn.Module):
    """Every expert runs, in one product over all of them; those that are not picked have the weight zero."""

    def __init__(self, width: int = 16, inner: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, width), nn.Linear(width, experts)
        self.w1 = nn.Parameter(torch.randn(experts, width, inner) * 0.2)
        self.w2 = nn.Parameter(torch.randn(experts, inner, width) * 0.2)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, t, 6]` → `[b, t, 3]`."""
        x = self.embed(x)
        logits = self.router(x)
        top, chosen = logits.topk(2, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))
        inner = functional.gelu(torch.einsum("btd,edh->bteh", x, self.w1))
        out = torch.einsum("bteh,ehd->bted", inner, self.w2)
        return self.head(x + (gates.unsqueeze(-1) * out).sum(2))


class Retention(nn.Module):
    """Sun et al. 2023: queries and keys with a decay over the distance, a group norm over heads, a gate."""

    decay: Tensor

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.embed = nn.Embedding(50, width)
        self.q, self.k, self.v, self.g, self.out = (nn.Linear(width, width, bias=False) for _ in range(5))
        self.norm, self.group_norm = nn.LayerNorm(width), nn.GroupNorm(heads, width)
        self.register_buffer("decay", torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float))))
        self.head = nn.Linear(width, 50)

    def split(self, x: Tensor) -> Tensor:
        """`[b, t, width]` → `[b, heads, t, head_dim]`."""
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b, t]` → `[b, t, 50]`."""
        x = self.embed(tokens)
        inner = self.norm(x)
        steps = torch.arange(x.shape[1], device=x.device)
        distance = steps[:, None] - steps[None, :]
        mask = torch.exp(distance * self.decay[:, None, None]).masked_fill(distance < 0, 0).to(x.dtype)
        q, k, v = self.split(self.q(inner)), self.split(self.k(inner)) * self.head_dim**-0.5, self.split(self.v(inner))
        out = (q @ k.transpose(-1, -2) * mask) @ v
        out = out.transpose(1, 2).reshape(-1, self.heads * self.head_dim)
        out = self.group_norm(out).view_as(x)
        return self.head(x + self.out(functional.silu(self.g(inner)) * out))


class SelectiveScan(nn.Module):
    """Gu and Dao 2023, the scan as a loop: steps, inputs and outputs of a linear recurrence depend on the token."""

    def __init__(self, width: int = 12, state: int = 4, rank: int = 3) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = 2 * width, state, rank
        self.embed, self.norm = nn.Embedding(50, width), nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, 3, groups=self.d_inner, padding=2)
        self.x_proj = nn.Linear(self.d_inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, self.d_inner)
        a = torch.arange(1, state + 1, dtype=torch.float).repeat(self.d_inner, 1)
        self.A_log, self.D = nn.Parameter(torch.log(a)), nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, width, bias=False)
        self.head = nn.Linear(width, 50)

    def scan(self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """`[b, t, d_inner]` → the same."""
        a = -torch.exp(self.A_log)
        x = torch.zeros(u.shape[0], u.shape[2], a.shape[1], dtype=u.dtype, device=u.device)
        ys = []
        for t in range(u.shape[1]):
            x = torch.exp(dt[:, t].unsqueeze(-1) * a) * x + (dt[:, t] * u[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
            ys.append((x * c[:, t].unsqueeze(1)).sum(-1))
        return torch.stack(ys, dim=1) + u * self.D

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b, t]` → `[b, t, 50]`."""
        x = self.embed(tokens)
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        u = functional.silu(self.conv1d(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = self.scan(u, functional.softplus(self.dt_proj(dt)), b, c)
        return self.head(x + self.out_proj(y * functional.silu(z)))
