"""A plain LightningModule for image classification. It knows nothing of EvolveNet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics.classification import MulticlassAccuracy


class Classifier(lightning.LightningModule):
    """Cross entropy, accuracy, any optimizer, and a learning rate that warms up and then falls as a cosine.

    Args:
        model: images → logits `[N, classes]`.
        optimizer: parameters → optimizer; its learning rate is the highest of the run.
        classes: number of classes.
        label_smoothing: share of the target spread over all classes (training only), 0 … 1.
        warmup: share of the run in which the learning rate rises, 0 … 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        classes: int = 10,
        label_smoothing: float = 0.0,
        warmup: float = 0.15,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer, self.warmup = optimizer, warmup
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.loss = nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, channels, height, width]` → logits `[N, classes]`."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        loss = self.train_loss(self.model(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Logs `val/loss` and `val/acc`, over the whole split."""
        images, labels = batch
        logits = self.model(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", self.loss(logits, labels), batch_size=len(labels))
        self.log("val/acc", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Logs `test/acc`, over the whole split."""
        images, labels = batch
        self.test_accuracy(self.model(images), labels)
        self.log("test/acc", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        """The optimizer, and a one-cycle schedule (Smith & Topin 2018) over the whole run, stepped every batch."""
        optimizer = self.optimizer(self.parameters())
        schedule = OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=self.warmup,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
