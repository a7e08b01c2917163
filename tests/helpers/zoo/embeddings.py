"""Self-supervised and metric learning: two views of a sample, or several samples, through one network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.zoo.entry import Entry, images, loader, points


def augmented(x: Tensor) -> Tensor:
    return x * (0.8 + 0.4 * torch.rand(x.size(0), *[1] * (x.dim() - 1))) + 0.1 * torch.randn_like(x)


def encoder(width: int = 32, out: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class SimCLR(LightningModule):
    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoder = encoder()
        self.projector = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

    def info_nce(self, features: Tensor) -> Tensor:
        similarity = F.cosine_similarity(features[:, None, :], features[None, :, :], dim=-1)
        itself = torch.eye(similarity.shape[0], dtype=torch.bool, device=similarity.device)
        similarity.masked_fill_(itself, -9e15)
        positive = itself.roll(shifts=similarity.shape[0] // 2, dims=0)
        similarity = similarity / self.temperature
        return (-similarity[positive] + torch.logsumexp(similarity, dim=-1)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.cat([augmented(batch[0]), augmented(batch[0])], dim=0)
        loss = self.info_nce(self.projector(self.encoder(x)))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-4, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)]

    def train_dataloader(self) -> Any:
        return loader(*images())


class BarlowTwins(LightningModule):
    """The loss reads the correlations of the projector's units."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = encoder()
        self.projector = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
        self.bn = nn.BatchNorm1d(64, affine=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z1 = self.projector(self.backbone(augmented(batch[0])))
        z2 = self.projector(self.backbone(augmented(batch[0])))
        c = self.bn(z1).T @ self.bn(z2) / z1.shape[0]
        on_diag = (torch.diagonal(c) - 1).pow(2).sum()
        off_diag = (c - torch.diag(torch.diagonal(c))).pow(2).sum()
        return on_diag + 5e-3 * off_diag

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class BYOL(LightningModule):
    """The target network follows the online network by a moving average."""

    def __init__(self, tau: float = 0.95) -> None:
        super().__init__()
        self.tau = tau
        self.online = nn.Sequential(encoder(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
        self.predictor = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
        self.target = copy.deepcopy(self.online)
        for parameter in self.target.parameters():
            parameter.requires_grad = False

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 2 - 2 * F.cosine_similarity(prediction, target.detach(), dim=-1).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = augmented(batch[0]), augmented(batch[0])
        p1, p2 = self.predictor(self.online(one)), self.predictor(self.online(two))
        with torch.no_grad():
            z1, z2 = self.target(one), self.target(two)
        loss = (self.loss(p1, z2) + self.loss(p2, z1)) / 2
        self.log("loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
                target.data.mul_(self.tau).add_(online.data, alpha=1 - self.tau)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.online.parameters(), *self.predictor.parameters()], lr=0.05, momentum=0.9)

    def train_dataloader(self) -> Any:
        return loader(*images())


class DINO(LightningModule):
    """Student and teacher with a centre, the teacher a moving average of the student, updated inside the step."""

    center: Tensor

    def __init__(self, out: int = 32, momentum: float = 0.95) -> None:
        super().__init__()
        self.momentum = momentum
        self.student_backbone, self.student_head = (
            encoder(),
            nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, out)),
        )
        self.teacher_backbone, self.teacher_head = (
            copy.deepcopy(self.student_backbone),
            copy.deepcopy(self.student_head),
        )
        for module in (self.teacher_backbone, self.teacher_head):
            module.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, out))

    def update_momentum(self, student: nn.Module, teacher: nn.Module) -> None:
        with torch.no_grad():
            for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
                t.data = t.data * self.momentum + s.data * (1 - self.momentum)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.update_momentum(self.student_backbone, self.teacher_backbone)
        self.update_momentum(self.student_head, self.teacher_head)
        one, two = augmented(batch[0]), augmented(batch[0])
        with torch.no_grad():
            t1 = self.teacher_head(self.teacher_backbone(one))
            t2 = self.teacher_head(self.teacher_backbone(two))
        s1, s2 = self.student_head(self.student_backbone(one)), self.student_head(self.student_backbone(two))
        loss = (self.cross_entropy(s1, t2) + self.cross_entropy(s2, t1)) / 2
        self.center = 0.9 * self.center + 0.1 * torch.cat([t1, t2]).mean(0, keepdim=True)
        self.log("loss", loss)
        return loss

    def cross_entropy(self, student: Tensor, teacher: Tensor) -> Tensor:
        probabilities = F.softmax((teacher - self.center) / 0.04, dim=-1)
        return -(probabilities * F.log_softmax(student / 0.1, dim=-1)).sum(-1).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.student_backbone.parameters(), *self.student_head.parameters()], lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class Siamese(LightningModule):
    """Pairs, with a contrastive loss on the distance of their embeddings."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin
        self.embed = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(one), self.embed(two)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        one, two = self(x, x.flip(0))
        same = (y == y.flip(0)).float()
        distance = F.pairwise_distance(one, two)
        loss = (same * distance.pow(2) + (1 - same) * F.relu(self.margin - distance).pow(2)).mean()
        self.log("contrastive", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*points())


class Triplet(LightningModule):
    """Hard negatives are mined inside the batch."""

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.backbone, self.head = encoder(), nn.Linear(64, 32)
        self.criterion = nn.TripletMarginLoss(margin=margin)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(x)), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z = self(x)
        distance = torch.cdist(z, z)
        same = y[:, None] == y[None, :]
        positive = distance.masked_fill(~same, -1.0).argmax(1)
        negative = distance.masked_fill(same, float("inf")).argmin(1)
        loss = self.criterion(z, z[positive], z[negative])
        self.log("triplet", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


EMBEDDINGS = {
    "simclr": Entry(SimCLR, ("encoder", "projector")),
    "barlow twins": Entry(BarlowTwins, ("backbone", "projector")),
    "byol": Entry(BYOL, ("online", "predictor")),
    "dino": Entry(DINO, ("student_backbone", "student_head", "teacher_backbone", "teacher_head")),
    "siamese": Entry(Siamese, ("embed",)),
    "triplet": Entry(Triplet, ("backbone",)),
}
