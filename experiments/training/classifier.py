"""A plain LightningModule for image classification, without EvolveNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics.classification import MulticlassAccuracy


class Classifier(lightning.LightningModule):
    """Cross entropy, accuracy, any optimizer, and a learning rate that warms up and then falls as a cosine.

    Args:
        model: images → logits `[N, classes]`.
        optimizer: parameters → optimizer; its learning rate is the highest of the run.
        scheduler: optimizer, steps of the run → learning rate of each step, see `experiments.training.schedules`; None for the
            cycles below.
        classes: number of classes.
        label_smoothing: share of the target spread over all classes (training only), 0 … 1.
        warmup: share of each cycle in which the learning rate rises, 0 … 1.
        cycles: relative lengths of the cycles of the learning rate, one after the other; one over the whole run by default.
        heights: of those cycles, relative to the optimizer's learning rate, each once; all the same by default.
        soft: weight of the distillation loss towards the teacher's outputs, once there is a teacher, 0 … 1; that of the labels
            is 1 − soft.
        temperature: by which both networks' outputs are divided in the distillation loss (Hinton et al. 2015).
        channels_last: whether images and weights have the channels-last layout, which is faster on CPUs and tensor cores.
        bf16_above: number of parameters above which training runs under autocast to bfloat16; small networks gain no time by
            it and lose accuracy. None for never.
    """

    def __init__(  # noqa: PLR0913  one per entry of its Hydra config
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        classes: int = 10,
        label_smoothing: float = 0.0,
        warmup: float = 0.15,
        cycles: Sequence[float] = (1,),
        heights: Sequence[float] | None = None,
        soft: float = 0.0,
        temperature: float = 1.0,
        channels_last: bool = False,
        bf16_above: int | None = None,
    ) -> None:
        super().__init__()
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]  its stub knows 4-d only
        self.bf16_above = bf16_above
        self.cycles, self.heights = cycles, heights
        self.soft, self.temperature = soft, temperature
        # A function and not a module: it is neither trained nor saved, nor taken for a replica of the network.
        self.teacher: Callable[[Tensor], Tensor] | None = None
        self.optimizer, self.scheduler, self.warmup = optimizer, scheduler, warmup
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.loss = nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, channels, height, width]` → logits `[N, classes]`."""
        return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.layout))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._half()):
            logits = self._logits(images)
        logits = logits.float()
        loss = self.train_loss(logits, labels)
        if self.teacher is not None and self.soft:
            targets = self.teacher(images.contiguous(memory_format=self.layout))
            loss = (1 - self.soft) * loss + self.soft * self._divergence(logits, targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _half(self) -> bool:
        if self.bf16_above is None:
            return False
        return sum(parameter.numel() for parameter in self.model.parameters()) > self.bf16_above

    def _divergence(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The Kullback-Leibler divergence of softened outputs `[N, classes]`, times the temperature squared."""
        ours, theirs = (functional.log_softmax(each / self.temperature, dim=1) for each in (logits, targets))
        return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Logs `val/loss` and `val/acc`, over the whole split."""
        images, labels = batch
        logits = self._logits(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", self.loss(logits, labels), batch_size=len(labels))
        self.log("val/acc", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Logs `test/acc`, over the whole split."""
        images, labels = batch
        self.test_accuracy(self._logits(images), labels)
        self.log("test/acc", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        """The optimizer, and in each cycle a rise and a cosine's fall of the learning rate, stepped every batch.

        The shape of a cycle is that of Smith and Topin (2018); the cycles are warm restarts (Loshchilov and Hutter 2017).
        """
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is not None:
            chosen = self.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": chosen, "interval": "step"}}
        shape = Cycles(int(self.trainer.estimated_stepping_batches), self.cycles, self.warmup, self.heights)
        # LambdaLR saves no state of a function: a resumed run has the cycles of its own configuration, not the checkpoint's.
        schedule = LambdaLR(optimizer, lambda step: shape(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Cycles:
    """The factor of the learning rate by step: in each cycle it rises from 1/25 to 1, then falls to nearly 0.

    Args:
        steps: of the whole run.
        lengths: of the cycles, relative to each other.
        warmup: share of a cycle in which it rises, 0 … 1.
        heights: of the cycles, 1 by default.

    >>> cycles = Cycles(steps=100, lengths=(1, 3), warmup=0.2)
    >>> [round(cycles(step), 3) for step in (0, 5, 24, 25, 40, 99)]
    [0.04, 1.0, 0.0, 0.04, 1.0, 0.0]
    """

    def __init__(
        self, steps: int, lengths: Sequence[float], warmup: float, heights: Sequence[float] | None = None
    ) -> None:
        ends = [round(steps * done / sum(lengths)) for done in accumulate(lengths)]
        self.spans, self.warmup = list(pairwise([0, *ends])), warmup
        self.heights = [1.0] * len(lengths) if heights is None else list(heights)

    def __call__(self, step: int) -> float:
        """The factor of one step."""
        place = next((place for place, (_, end) in enumerate(self.spans) if step < end), len(self.spans) - 1)
        begin, end = self.spans[place]
        rise = max(1, round(self.warmup * (end - begin)))
        done = step - begin
        if done < rise:
            return self.heights[place] * (0.04 + 0.96 * done / rise)
        return (
            self.heights[place]
            * 0.5
            * (1 + math.cos(math.pi * min(1.0, (done - rise) / max(1, end - begin - 1 - rise))))
            + 1e-6
        )
