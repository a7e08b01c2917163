"""Reinforcement learning, equations, dynamics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from tests.helpers.zoo.entry import BATCH, BATCHES, Entry, loader, points


def transitions() -> tuple[Tensor, ...]:
    """States, actions, rewards, next states and whether the episode ended."""
    generator = torch.Generator().manual_seed(6)
    count = BATCHES * BATCH
    state = torch.randn(count, 8, generator=generator)
    action = torch.randint(4, (count,), generator=generator)
    following = 0.9 * state + 0.1 * F.one_hot(action, 8).float()
    return state, action, following.sum(1), following, (torch.rand(count, generator=generator) < 0.1).float()


class ActorCritic(LightningModule):
    """A shared trunk with a policy and a value head; actions are sampled from the policy."""

    def __init__(self, gamma: float = 0.95) -> None:
        super().__init__()
        self.gamma = gamma
        self.shared = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, state: Tensor) -> tuple[Categorical, Tensor]:
        h = self.shared(state)
        return Categorical(logits=self.actor(h)), self.critic(h).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state, _, reward, following, done = batch
        policy, value = self(state)
        action = policy.sample()
        with torch.no_grad():
            target = reward + self.gamma * (1 - done) * self(following)[1]
        advantage = (target - value).detach()
        actor_loss = -(policy.log_prob(action) * advantage).mean()
        loss = actor_loss + 0.5 * F.mse_loss(value, target) - 0.01 * policy.entropy().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*transitions())


class DQN(LightningModule):
    """Double Q-learning; the target network is synchronised every few steps."""

    def __init__(self, gamma: float = 0.95, sync: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.target_net = copy.deepcopy(self.net)

    def forward(self, state: Tensor) -> Tensor:
        return self.net(state)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state, action, reward, following, done = batch
        value = self.net(state).gather(1, action.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            best = self.net(following).argmax(1, keepdim=True)
            later = self.target_net(following).gather(1, best).squeeze(-1)
        loss = nn.SmoothL1Loss()(value, reward + self.hparams["gamma"] * (1 - done) * later)
        if self.global_step % self.hparams["sync"] == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*transitions())


class PINN(LightningModule):
    """u'' + u = 0 with u(0) = 0 and u'(0) = 1: the loss differentiates the network with respect to its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, t: Tensor) -> Tensor:
        return self.net(t)

    def derivative(self, y: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(y, t, grad_outputs=torch.ones_like(y), create_graph=True)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        t = batch[0].requires_grad_(True)
        u = self(t)
        residual = self.derivative(self.derivative(u, t), t) + u
        zero = torch.zeros(1, 1, requires_grad=True)
        start = self(zero)
        boundary = start.pow(2) + (self.derivative(start, zero) - 1).pow(2)
        loss = residual.pow(2).mean() + boundary.mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(6 * torch.rand(BATCHES * BATCH, 1, generator=torch.Generator().manual_seed(7)))


class NeuralODE(LightningModule):
    """An encoder, Runge-Kutta steps of a learned vector field, a decoder."""

    def __init__(self, width: int = 32, steps: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.encoder = nn.Linear(16, width)
        self.field = nn.Sequential(nn.Linear(width + 1, 64), nn.Tanh(), nn.Linear(64, width))
        self.decoder = nn.Linear(width, 3)

    def slope(self, t: float, h: Tensor) -> Tensor:
        return self.field(torch.cat([h, torch.full_like(h[:, :1], t)], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        h, dt = self.encoder(x), 1 / self.steps
        for k in range(self.steps):
            t = k * dt
            k1 = self.slope(t, h)
            k2 = self.slope(t + dt / 2, h + dt / 2 * k1)
            k3 = self.slope(t + dt / 2, h + dt / 2 * k2)
            k4 = self.slope(t + dt, h + dt * k3)
            h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.decoder(h)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*points())


CONTROL = {
    "actor-critic": Entry(ActorCritic, ("shared", "actor", "critic"), not_exported="Categorical"),
    "dqn": Entry(DQN, ("net", "target_net")),
    "pinn": Entry(PINN, ("net",)),
    "neural ode": Entry(NeuralODE, ("encoder", "field", "decoder")),
}
