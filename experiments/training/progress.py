"""Display of an experiment's progress: a bar in a terminal, one log line an epoch anywhere else."""

from __future__ import annotations

import logging
import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

log = logging.getLogger(__name__)


class Console(logging.StreamHandler):
    """Writes log lines above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=self.stream)


class Progress(TQDMProgressBar):
    """Epoch, accuracy and parameters: a bar in a terminal; in a pipe or a file a log line an epoch."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        super().__init__(refresh_rate=1 if self.terminal else 0)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """The values at the end of the bar."""
        metrics = {
            name.replace("/", " "): f"{float(value):.4f}"
            for name, value in trainer.progress_bar_metrics.items()
            if not name.startswith("evolve/")
        }
        return {**metrics, "parameters": f"{_parameters(pl_module):,}"}

    def on_train_epoch_start(self, trainer: lightning.Trainer, *unused: Any) -> None:
        """Describe the bar by the epoch's number from 1."""
        super().on_train_epoch_start(trainer, *unused)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The line of one epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self.terminal:
            # `WidthEvolution` adds a rounded number of its own.
            found = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "params"}
            metrics = "  ".join(f"{name} {value}" for name, value in found.items())
            log.info("epoch %d/%s  %s", trainer.current_epoch + 1, trainer.max_epochs, metrics)


def _parameters(module: lightning.LightningModule) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
