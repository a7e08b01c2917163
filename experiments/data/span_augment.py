"""Augmentation of a strength for each span of a front: small networks need less of it than large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import lightning

from experiments.data.images import Augment, DataError, ImageData
from experiments.training.points import span_ends


class SpanAugment(lightning.Callback):
    """Scales the data module's shift, rotation and stretching by a factor for each span.

    Args:
        spans: their relative lengths; each ends at the end of the nearest epoch.
        strengths: a factor for each span, 0 or more; 0 leaves only mirroring.

    Raises:
        DataError: if there is not one strength, 0 or more, for each span.
    """

    def __init__(self, spans: Sequence[float], strengths: Sequence[float]) -> None:
        if len(spans) != len(strengths) or min(strengths, default=0) < 0:
            raise DataError(
                f"SpanAugment: expected one strength, 0 or more, for each of {len(spans)} spans, got {list(strengths)}."
            )
        self.spans, self.strengths = spans, strengths
        self._whole: Augment | None = None

    def strength(self, epoch: int, epochs: int) -> float:
        """The factor in an epoch, numbered from 0, of a run of `epochs` epochs.

        >>> callback = SpanAugment(spans=[1, 2, 1], strengths=[1, 0.5, 0])
        >>> [callback.strength(epoch, 8) for epoch in range(8)]
        [1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0]
        """
        ends = span_ends(self.spans, epochs)
        return next((one for end, one in zip(ends, self.strengths, strict=True) if epoch < end), self.strengths[-1])

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set this epoch's augmentation, by the epoch's number alone, so that a resumed run gets the same images."""
        data: ImageData = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._whole = self._whole or data.augment
        strength = self.strength(trainer.current_epoch, trainer.max_epochs or 1)
        whole = self._whole
        data.augment = replace(
            whole,
            shift=round(strength * whole.shift),
            rotation=strength * whole.rotation,
            stretch=strength * whole.stretch,
        )
