"""Networks in pairs, generated weights, codebooks, flows, point sets."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.zoo.control import transitions
from tests.helpers.zoo.entry import BATCH, BATCHES, Entry, images, loader, points, tokens


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, two in itertools.pairwise(sizes):
        layers += [nn.Linear(one, two), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class CycleGAN(LightningModule):
    """Two generators and two discriminators of the same shapes, all of them trained."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g_ab, self.g_ba = mlp(16, 64, 64, 16), mlp(16, 64, 64, 16)
        self.d_a, self.d_b = mlp(16, 64, 32, 1), mlp(16, 64, 32, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        a = batch[0]
        b = a.flip(1) * 0.5
        opt_g, opt_d = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(opt_g)
        fake_b, fake_a = self.g_ab(a), self.g_ba(b)
        loss = (self.d_b(fake_b) - 1).square().mean() + (self.d_a(fake_a) - 1).square().mean()
        loss = loss + 10 * (F.l1_loss(self.g_ba(fake_b), a) + F.l1_loss(self.g_ab(fake_a), b))
        loss = loss + 5 * (F.l1_loss(self.g_ba(a), a) + F.l1_loss(self.g_ab(b), b))
        opt_g.zero_grad()
        self.manual_backward(loss)
        opt_g.step()
        self.untoggle_optimizer(opt_g)
        self.toggle_optimizer(opt_d)
        loss = (self.d_a(a) - 1).square().mean() + self.d_a(fake_a.detach()).square().mean()
        loss = loss + (self.d_b(b) - 1).square().mean() + self.d_b(fake_b.detach()).square().mean()
        opt_d.zero_grad()
        self.manual_backward(loss)
        opt_d.step()
        self.untoggle_optimizer(opt_d)

    def configure_optimizers(self) -> Any:
        generators = itertools.chain(self.g_ab.parameters(), self.g_ba.parameters())
        discriminators = itertools.chain(self.d_a.parameters(), self.d_b.parameters())
        return torch.optim.Adam(generators, lr=2e-4), torch.optim.Adam(discriminators, lr=2e-4)

    def train_dataloader(self) -> Any:
        return loader(*points())


class VQVAE(LightningModule):
    """The nearest entries of a codebook, with the gradient passed straight through."""

    def __init__(self, codes: int = 32, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, width, 1))
        self.codebook = nn.Embedding(codes, width)
        self.decoder = nn.Sequential(
            nn.Conv2d(width, 32, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1)
        )

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.permute(0, 2, 3, 1)
        distance = (
            flat.square().sum(-1, keepdim=True)
            - 2 * flat @ self.codebook.weight.T
            + self.codebook.weight.square().sum(1)
        )
        quantized = self.codebook(distance.argmin(-1)).permute(0, 3, 1, 2)
        loss = F.mse_loss(quantized, z.detach()) + 0.25 * F.mse_loss(z, quantized.detach())
        return z + (quantized - z).detach(), loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        quantized, commitment = self.quantize(self.encoder(batch[0]))
        return F.mse_loss(self.decoder(quantized), batch[0]) + commitment

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class RealNVP(LightningModule):
    """A normalising flow of affine couplings: each scales and shifts one half by a function of the other."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(mlp(8, 64, 64, 16) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for net in self.couplings:
            one, two = x.chunk(2, dim=1)
            scale, shift = net(one).chunk(2, dim=1)
            scale = torch.tanh(scale)
            x = torch.cat([two * scale.exp() + shift, one], dim=1)
            log_det = log_det + scale.sum(1)
        return x, log_det

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, log_det = self(batch[0])
        loss = (0.5 * z.square().sum(1) + 0.5 * z.size(1) * math.log(2 * math.pi) - log_det).mean()
        self.log("nll", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*points())


class CLIP(LightningModule):
    """An image and a text encoder meet in one space; the temperature is learned."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU())
        self.embedding, self.text = nn.Embedding(12, 32), nn.LSTM(32, 48, batch_first=True)
        self.to_image, self.to_text = nn.Linear(48, width, bias=False), nn.Linear(48, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, text = batch
        i = F.normalize(self.to_image(self.visual(image)), dim=-1)
        t = F.normalize(self.to_text(self.text(self.embedding(text))[1][0][-1]), dim=-1)
        logits = self.logit_scale.exp() * i @ t.T
        labels = torch.arange(len(logits), device=self.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)

    def train_dataloader(self) -> Any:
        return loader(images()[0], tokens(6))


class HyperNetwork(LightningModule):
    """A small network computes the weights of the layer that the features go through."""

    def __init__(self) -> None:
        super().__init__()
        self.features = mlp(16, 64, 8)
        self.hyper = mlp(4, 64, 8 * 3 + 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weights = self.hyper(x[:, :4])
        matrix, bias = weights[:, :24].view(-1, 3, 8), weights[:, 24:]
        logits = torch.bmm(matrix, self.features(x).unsqueeze(2)).squeeze(2) + bias
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*points())


class PointNet(LightningModule):
    """A learned transform of the points, a shared network, a maximum over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.ReLU()
        )
        self.to_matrix = nn.Linear(64, 9)
        self.shared = nn.Sequential(nn.Conv1d(3, 64, 1), nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, 64, 1), nn.ReLU())
        self.head = mlp(64, 32, 2)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.to_matrix(self.transform(x).amax(2)).view(-1, 3, 3) + torch.eye(3, device=x.device)
        return self.head(torch.max(self.shared(matrix @ x), 2)[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        x = torch.randn(BATCHES * BATCH, 3, 12, generator=torch.Generator().manual_seed(10))
        return loader(x, (x.amax(2).sum(1) > 5).long())


class SAC(LightningModule):
    """A stochastic actor, two critics of the same shape, and a moving average of each."""

    def __init__(self, tau: float = 0.05) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tau = tau
        self.actor = mlp(8, 64, 64, 4)
        self.q1, self.q2 = mlp(10, 64, 64, 1), mlp(10, 64, 64, 1)
        self.q1_target, self.q2_target = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def act(self, state: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(state).chunk(2, dim=-1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        raw = normal.rsample()
        return raw.tanh(), (normal.log_prob(raw) - torch.log(1 - raw.tanh() ** 2 + 1e-6)).sum(-1, keepdim=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state, chosen, reward, following, done = batch
        action = F.one_hot(chosen, 4)[:, :2].float()
        for_actor, for_critics = self.optimizers()  # type: ignore[misc]
        with torch.no_grad():
            next_action, log_prob = self.act(following)
            both = torch.cat([following, next_action], 1)
            value = torch.min(self.q1_target(both), self.q2_target(both)) - self.log_alpha.exp() * log_prob
            target = reward[:, None] + 0.95 * (1 - done[:, None]) * value
        both = torch.cat([state, action], 1)
        loss = F.mse_loss(self.q1(both), target) + F.mse_loss(self.q2(both), target)
        for_critics.zero_grad()
        self.manual_backward(loss)
        for_critics.step()
        action, log_prob = self.act(state)
        both = torch.cat([state, action], 1)
        loss = (self.log_alpha.exp() * log_prob - torch.min(self.q1(both), self.q2(both))).mean()
        for_actor.zero_grad()
        self.manual_backward(loss)
        for_actor.step()
        with torch.no_grad():
            for slow, fast in ((self.q1_target, self.q1), (self.q2_target, self.q2)):
                for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                    old.mul_(1 - self.tau).add_(new, alpha=self.tau)

    def configure_optimizers(self) -> Any:
        critics = [*self.q1.parameters(), *self.q2.parameters()]
        return torch.optim.Adam([*self.actor.parameters(), self.log_alpha], lr=1e-3), torch.optim.Adam(critics, lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*transitions())


FURTHER = {
    "cyclegan": Entry(CycleGAN, ("g_ab", "g_ba", "d_a", "d_b")),
    "vq-vae": Entry(VQVAE, ("encoder", "codebook", "decoder")),
    "realnvp": Entry(RealNVP, ("couplings.0", "couplings.3")),
    "clip": Entry(CLIP, ("visual", "text", "to_image", "to_text")),
    "hypernetwork": Entry(HyperNetwork, ("features", "hyper")),
    "pointnet": Entry(PointNet, ("transform", "shared", "head")),
    "sac": Entry(SAC, ("actor", "q1", "q2", "q1_target", "q2_target")),
}
