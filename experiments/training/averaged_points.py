"""The points of a front, where the teacher of each span is an average of weights over the last epoch of the span before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from experiments.training.classifier import Classifier
from experiments.training.points import Points, frozen, span_ends, teacher

BATCHES = 20
"""Training batches from which the running statistics of an average's batch norms are estimated."""


class AveragedPoints(Points):
    """Saves the network at the end of each span; the teacher is an average of its weights over an epoch.

    A span may then end while the learning rate is high: at that rate the average is more accurate than the network itself
    (stochastic weight averaging, Izmailov et al. 2018).

    Args:
        spans: their relative lengths; each ends at the end of the nearest epoch.
        directory: where the checkpoints go; `evolvenet.load(model, path)` reads them.
        teacher_spans: relative lengths of the spans at whose ends the average becomes the new teacher, by default `spans`.
            With shorter ones there is a teacher before the first point.
    """

    def __init__(
        self, spans: Sequence[float], directory: str | Path, teacher_spans: Sequence[float] | None = None
    ) -> None:
        super().__init__(spans, directory, teachers=[None] * len(spans))  # no point teaches, averages do
        self.teacher_spans = spans if teacher_spans is None else teacher_spans
        self._means: list[Tensor] = []
        self._steps = 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin a new average."""
        self._means, self._steps = [], 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the last epoch of a teacher span: add the weights to the average; a change of widths begins a new one."""
        assert isinstance(pl_module, Classifier)
        if not self._ends_teacher_span(trainer):
            return
        weights = [parameter.detach() for parameter in pl_module.model.parameters()]
        if [mean.shape for mean in self._means] != [weight.shape for weight in weights]:
            self._means, self._steps = [weight.clone() for weight in weights], 0
        self._steps += 1
        for mean, weight in zip(self._means, weights, strict=True):
            mean.lerp_(weight, 1 / self._steps)

    def _update_teacher(self, trainer: lightning.Trainer, pl_module: Classifier) -> None:
        if self._ends_teacher_span(trainer) and trainer.current_epoch + 1 != trainer.max_epochs:
            loader = trainer.datamodule.train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
            self._keep_teacher(pl_module, 0, averaged(pl_module.model, self._means, islice(loader, BATCHES)))

    def _keep_teacher(self, pl_module: Classifier, place: int, past: nn.Module) -> None:
        """The latest average replaces the one before and teaches at once; there is no choice by span."""
        super()._keep_teacher(pl_module, place, past)
        pl_module.teacher = self._outputs[place] = teacher(past, half=pl_module.bf16_above is not None)

    def _ends_teacher_span(self, trainer: lightning.Trainer) -> bool:
        """Whether this epoch is the last of a teacher span, so that the average of its weights becomes the teacher."""
        return trainer.current_epoch + 1 in span_ends(self.teacher_spans, trainer.max_epochs or 0)


def averaged(model: nn.Module, means: Sequence[Tensor], batches: Iterable[Any]) -> nn.Module:
    """A copy of the network with other weights and re-estimated statistics of its batch norms.

    Args:
        model: stays as it is.
        means: a value for each of its parameters.
        batches: tuples whose first entry is the images.
    """
    past = frozen(model)
    for parameter, mean in zip(past.parameters(), means, strict=True):
        parameter.copy_(mean)
    device = next(past.parameters()).device
    update_bn(batches, past, device)
    return past.eval()
