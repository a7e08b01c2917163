"""The points of a front, each of which teaches the next one with the average of its weights."""

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
"""Training batches on which the statistics of an average's batch norms are taken."""


class AveragedPoints(Points):
    """Saves the network at the end of each span, and makes averages of its weights over an epoch the teacher.

    A span may so end while the learning rate is high: the network itself is no good teacher then, the average is
    (stochastic weight averaging, Izmailov et al. 2018).

    Args:
        spans: their relative lengths; each ends at the end of the nearest epoch.
        directory: where the checkpoints go; `evolvenet.load(model, path)` reads them.
        lessons: relative lengths of the spans at whose ends a new average begins to teach; those of the points by default.
            So a network can be taught by its own past before the first point.
    """

    def __init__(self, spans: Sequence[float], directory: str | Path, lessons: Sequence[float] | None = None) -> None:
        super().__init__(spans, directory)
        self.lessons = spans if lessons is None else lessons
        self._means: list[Tensor] = []
        self._steps = 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Average anew."""
        self._means, self._steps = [], 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the last epoch of a span: take the weights into the average, which begins anew where widths have changed."""
        assert isinstance(pl_module, Classifier)
        if not self._teaches(trainer):
            return
        weights = [parameter.detach() for parameter in pl_module.model.parameters()]
        if [mean.shape for mean in self._means] != [weight.shape for weight in weights]:
            self._means, self._steps = [weight.clone() for weight in weights], 0
        self._steps += 1
        for mean, weight in zip(self._means, weights, strict=True):
            mean.lerp_(weight, 1 / self._steps)

    def _lesson(self, trainer: lightning.Trainer, pl_module: Classifier) -> None:
        if self._teaches(trainer) and trainer.current_epoch + 1 != trainer.max_epochs:
            loader = trainer.datamodule.train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
            self._teach(pl_module, averaged(pl_module.model, self._means, islice(loader, BATCHES)))

    def _teach(self, pl_module: Classifier, past: nn.Module) -> None:
        super()._teach(pl_module, past)
        pl_module.teacher = teacher(past, half=pl_module.bf16_above is not None)

    def _teaches(self, trainer: lightning.Trainer) -> bool:
        """Whether the average of this epoch's weights will teach."""
        return trainer.current_epoch + 1 in span_ends(self.lessons, trainer.max_epochs or 0)


def averaged(model: nn.Module, means: Sequence[Tensor], batches: Iterable[Any]) -> nn.Module:
    """A copy of the network with other weights, the statistics of its batch norms taken anew.

    Args:
        model: stays as it is.
        means: a value for each of its parameters.
        batches: tuples that begin with images.
    """
    past = frozen(model)
    for parameter, mean in zip(past.parameters(), means, strict=True):
        parameter.copy_(mean)
    device = next(past.parameters()).device
    update_bn(batches, past, device)
    return past.eval()
