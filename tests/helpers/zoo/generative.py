"""Autoencoders, adversarial networks, diffusion."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.zoo.entry import Entry, images, loader, points


class AutoEncoder(LightningModule):
    """Lightning's own first example."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = F.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class VAE(LightningModule):
    def __init__(self, latent: int = 16, beta: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
        )
        self.mu, self.log_var = nn.Linear(64, latent), nn.Linear(64, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 512), nn.ReLU(), nn.Unflatten(1, (32, 4, 4)),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def reparametrize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, log_var = self.mu(h), self.log_var(h)
        return self.decoder(self.reparametrize(mu, log_var)), mu, log_var

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        x_hat, mu, log_var = self(x)
        reconstruction = F.mse_loss(x_hat, x)
        kl = -0.5 * torch.mean(1 + log_var - mu.pow(2) - log_var.exp())
        loss = reconstruction + self.hparams["beta"] * kl
        self.log_dict({"reconstruction": reconstruction, "kl": kl, "loss": loss})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class GradientReversalGAN(LightningModule):
    """One optimizer and one loss: the generator gets the discriminator's gradient with its sign reversed."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(16, 64), nn.LeakyReLU(0.2), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        real, _ = batch
        fake = self.generator(torch.randn(real.size(0), self.latent, device=self.device))
        on_real = self.discriminator(real)
        on_fake = self.discriminator(_Reverse.apply(fake))
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def train_dataloader(self) -> Any:
        return loader(*points())


class GAN(LightningModule):
    """Two optimizers, as in Lightning's examples."""

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent, 64), nn.BatchNorm1d(64), nn.LeakyReLU(0.2), nn.Linear(64, 128), nn.BatchNorm1d(128),
            nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )
        self.validation_z = torch.randn(8, latent)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).view(-1, 1, 8, 8)

    def adversarial_loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch: Any) -> None:
        imgs, _ = batch
        optimizer_g, optimizer_d = self.optimizers()  # type: ignore[misc]
        z = torch.randn(imgs.shape[0], self.hparams["latent"])
        z = z.type_as(imgs)

        self.toggle_optimizer(optimizer_g)
        self.generated_imgs = self(z)
        valid = torch.ones(imgs.size(0), 1).type_as(imgs)
        g_loss = self.adversarial_loss(self.discriminator(self(z).flatten(1)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(imgs.flatten(1)), valid)
        fake = torch.zeros(imgs.size(0), 1).type_as(imgs)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).flatten(1).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self) -> Any:
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        return [opt_g, opt_d], []

    def train_dataloader(self) -> Any:
        return loader(*images())


class WGANGP(LightningModule):
    """The gradient penalty differentiates the critic with respect to its inputs, inside the step."""

    def __init__(self, latent: int = 8, penalty: float = 10.0, critic_steps: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)
        )
        self.critic = nn.Sequential(
            nn.Linear(16, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )

    def gradient_penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        alpha = torch.rand(real.size(0), 1, device=self.device)
        mixed = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        scores = self.critic(mixed)
        (gradients,) = torch.autograd.grad(
            outputs=scores, inputs=mixed, grad_outputs=torch.ones_like(scores), create_graph=True, retain_graph=True
        )
        return ((gradients.norm(2, dim=1) - 1) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        g_opt, d_opt = self.optimizers()  # type: ignore[misc]
        fake = self.generator(torch.randn(real.size(0), self.hparams["latent"], device=self.device)).detach()
        d_loss = self.critic(fake).mean() - self.critic(real).mean()
        d_loss = d_loss + self.hparams["penalty"] * self.gradient_penalty(real, fake)
        d_opt.zero_grad()
        self.manual_backward(d_loss)
        d_opt.step()
        if (batch_idx + 1) % self.hparams["critic_steps"] == 0:
            g_loss = -self.critic(self.generator(torch.randn(real.size(0), self.hparams["latent"]))).mean()
            g_opt.zero_grad()
            self.manual_backward(g_loss)
            g_opt.step()
        self.log("critic", d_loss)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-4, betas=(0.0, 0.9)),
            torch.optim.Adam(self.critic.parameters(), lr=1e-4, betas=(0.0, 0.9)),
        )

    def train_dataloader(self) -> Any:
        return loader(*points())


class Denoiser(nn.Module):
    """Predicts the noise in a point at a time step."""

    def __init__(self, features: int, width: int, steps: int) -> None:
        super().__init__()
        self.time = nn.Embedding(steps, width)
        self.inp = nn.Linear(features, width)
        self.mid = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.out = nn.Linear(width, features)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.inp(x) + self.time(t))
        return self.out(h + self.mid(h))


class Diffusion(LightningModule):
    """DDPM, with an exponential moving average of the denoiser for sampling."""

    alpha_bar: Tensor

    def __init__(self, steps: int = 50, decay: float = 0.99) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Denoiser(16, 64, steps)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.register_buffer("alpha_bar", torch.cumprod(1 - torch.linspace(1e-4, 0.1, steps), 0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        t = torch.randint(0, self.hparams["steps"], (x.size(0),), device=self.device)
        noise = torch.randn_like(x)
        a = self.alpha_bar[t].unsqueeze(1)
        loss = F.mse_loss(self.model(a.sqrt() * x + (1 - a).sqrt() * noise, t), noise)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.hparams["decay"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30), "interval": "step"}
        ]

    def train_dataloader(self) -> Any:
        return loader(*points())


GENERATIVE = {
    "autoencoder": Entry(AutoEncoder, ("encoder.0", "encoder.2", "decoder.0")),
    "vae": Entry(VAE, ("encoder", "mu", "decoder.0", "decoder.2", "decoder.5")),
    "gan with gradient reversal": Entry(GradientReversalGAN, ("generator", "discriminator")),
    "gan with two optimizers": Entry(GAN, ("generator", "discriminator")),
    "wgan-gp": Entry(WGANGP, ("generator", "critic")),
    "diffusion with ema": Entry(Diffusion, ("model", "ema")),
}
