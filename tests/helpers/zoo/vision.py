"""Images: segmentation, detection, perceptual loss, distillation, fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.zoo.entry import Entry, images, loader


def block(inp: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(LightningModule):
    """Segmentation with a loss at each scale (deep supervision)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(1, 16), block(16, 32), block(32, 48)
        self.up2, self.up1 = nn.ConvTranspose2d(48, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge2, self.merge1 = block(64, 32), block(32, 16)
        self.out1, self.out2, self.out3 = nn.Conv2d(16, 2, 1), nn.Conv2d(32, 2, 1), nn.Conv2d(48, 2, 1)

    def forward(self, x: Tensor) -> Any:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.bottom(F.max_pool2d(two, 2))
        back2 = self.merge2(torch.cat([self.up2(three), two], dim=1))
        back1 = self.merge1(torch.cat([self.up1(back2), one], dim=1))
        if not self.training:
            return self.out1(back1)
        return self.out1(back1), self.out2(back2), self.out3(three)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        mask = (x[:, 0] > 0.4).long()
        loss = torch.zeros((), device=self.device)
        for weight, logits in zip((1.0, 0.5, 0.25), self(x), strict=True):
            logits = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=False)
            probability = logits.softmax(1)[:, 1]
            dice = 1 - (2 * (probability * mask).sum() + 1) / (probability.sum() + mask.sum() + 1)
            loss = loss + weight * (F.cross_entropy(logits, mask) + dice)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class Detector(LightningModule):
    """One box and one class at each place of the grid; targets are assigned by Python code in the loss."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.SiLU(),
        )  # fmt: skip
        self.neck = nn.Conv2d(64, 64, 1)
        self.cls_head = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, classes, 1))
        self.box_head = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 1))
        self.obj_head = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.neck(self.backbone(x))
        return {"cls": self.cls_head(h), "box": self.box_head(h), "obj": self.obj_head(h)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        size = out["obj"].shape[-1]
        places = x[:, 0].flatten(1).argmax(1)
        rows, columns = places // x.shape[-1] // 2, places % x.shape[-1] // 2
        objectness = torch.zeros_like(out["obj"])
        boxes, logits = [], []
        for i in range(x.size(0)):
            row, column = int(rows[i]), int(columns[i])
            objectness[i, 0, row, column] = 1.0
            boxes.append(out["box"][i, :, row, column])
            logits.append(out["cls"][i, :, row, column])
        target = torch.stack(
            [columns / size, rows / size, torch.full_like(rows, 0.25, dtype=torch.float32), 0.25 + 0 * rows], 1
        )
        losses = {
            "obj": F.binary_cross_entropy_with_logits(out["obj"], objectness),
            "box": F.smooth_l1_loss(torch.stack(boxes).sigmoid(), target.float()),
            "cls": F.cross_entropy(torch.stack(logits), y),
        }
        self.log_dict(losses)
        return losses["obj"] + 5 * losses["box"] + losses["cls"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def train_dataloader(self) -> Any:
        return loader(*images())


class SuperResolution(LightningModule):
    """Perceptual loss: the features of a frozen network, read by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 4, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.vgg = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1)
        )
        self.vgg.eval().requires_grad_(False)
        self.features: dict[str, Tensor] = {}
        for name in ("1", "3"):
            self.vgg.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.features[name] = output

        return hook

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def perceptual(self, one: Tensor, two: Tensor) -> Tensor:
        self.vgg(one)
        first = dict(self.features)
        self.vgg(two)
        return torch.stack([F.mse_loss(first[name], self.features[name]) for name in first]).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sharp = batch[0]
        restored = self(F.avg_pool2d(sharp, 2))
        loss = F.l1_loss(restored, sharp) + 0.1 * self.perceptual(restored, sharp)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class Distillation(LightningModule):
    """A frozen teacher's logits and features guide a student."""

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
        self.student = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
        )
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            soft = self.teacher(x)
        logits = self(x)
        t = self.temperature
        kd = F.kl_div(F.log_softmax(logits / t, -1), F.softmax(soft / t, -1), reduction="batchmean") * t * t
        loss = 0.5 * kd + 0.5 * F.cross_entropy(logits, y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


class FineTuning(LightningModule):
    """A pretrained backbone that is frozen and kept in eval mode, with a head that is trained."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
        ]
        self.feature_extractor = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.feature_extractor.requires_grad_(False)
        self.classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        self.feature_extractor.eval()
        with torch.no_grad():
            representations = self.feature_extractor(x).flatten(1)
        return self.classifier(representations)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*images())


VISION = {
    "unet with deep supervision": Entry(UNet, ("down1", "down2", "bottom", "merge1", "merge2")),
    "detector": Entry(Detector, ("backbone", "neck", "cls_head", "box_head")),
    "perceptual loss": Entry(SuperResolution, ("net",)),
    "distillation": Entry(Distillation, ("student",)),
    "fine-tuning": Entry(FineTuning, ("classifier",)),
}
