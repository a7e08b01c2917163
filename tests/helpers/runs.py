"""Small real runs of Lightning: modules, data that can be resumed in the middle of an epoch, trainers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn


class Batches:
    """Batches that depend on the epoch and their place in it alone, and can be taken up anywhere.

    Args:
        count: batches in an epoch.
        rank, ranks: which process this is of how many; each has data of its own.
    """

    def __init__(self, count: int = 8, rank: int = 0, ranks: int = 1, size: int = 32) -> None:
        self.count, self.rank, self.ranks, self.size = count, rank, ranks, size
        self.epoch, self.place = 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Lightning stops at the length and leaves the iterator unfinished.
        if self.place >= self.count:
            self.epoch, self.place = self.epoch + 1, 0
        while self.place < self.count:
            index = (self.epoch * self.count + self.place) * self.ranks + self.rank
            self.place += 1
            yield batch(index, self.size)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


def batch(index: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs of six numbers each; the label is how many of the first two are positive."""
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(index), device="cpu")
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Classifier(lightning.LightningModule):
    """Dense layers, batch norm and dropout, without a line about EvolveNet."""

    def __init__(self, width: int = 16, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test/loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


class User(Classifier):
    """The classifier without logging and with one plain Adam."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(folder: Path, callbacks: Sequence[Any] = (), **options: Any) -> lightning.Trainer:
    """A trainer on the CPU that prints nothing."""
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})


def fresh(**options: Any) -> Classifier:
    """A classifier with the same weights each time."""
    torch.manual_seed(5)
    return Classifier(**options)
