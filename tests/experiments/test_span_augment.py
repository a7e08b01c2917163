"""Augmentation by span: what a batch looks like in each epoch of a run, also of a resumed one."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from torch import nn

from experiments.data.images import Augment, DataError, DigitsData
from experiments.data.span_augment import SpanAugment
from experiments.training.classifier import Classifier

WHOLE = Augment(shift=2, rotation=10, flip=True, stretch=0.5)


class Seen(lightning.Callback):
    """What the data module's augmentation was at each batch."""

    def __init__(self) -> None:
        self.augments: list[Augment] = []

    def on_train_batch_end(self, trainer: Any, *_args: Any, **_kwargs: Any) -> None:
        self.augments.append(trainer.datamodule.augment)


def fit(
    epochs: int, path: str | None = None, stop: int | None = None, **options: Any
) -> tuple[lightning.Trainer, list[Augment]]:
    seen = Seen()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_train_batches=1, limit_val_batches=0,
        callbacks=[SpanAugment([1, 2, 1], [1, 0.5, 0]), seen, Stop(stop)],
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module = Classifier(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer.fit(module, datamodule=DigitsData(batch_size=32, val_size=10, augment=WHOLE), ckpt_path=path, **options)
    return trainer, seen.augments


class Stop(lightning.Callback):
    """Ends a run after so many epochs of those that it was meant to have."""

    def __init__(self, after: int | None) -> None:
        self.after = after

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.after


def test_each_span_has_its_strength_and_flips_stay() -> None:
    half, none = Augment(shift=1, rotation=5, flip=True, stretch=0.25), Augment(flip=True)
    assert fit(4)[1] == [WHOLE, half, half, none]


def test_a_resumed_run_has_the_strengths_of_the_uninterrupted_one(tmp_path: Any) -> None:
    trainer, first = fit(4, stop=2)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    _, second = fit(4, path=str(tmp_path / "stopped.ckpt"), weights_only=True)
    assert first + second == fit(4)[1]


@pytest.mark.parametrize("strengths", [[1], [1, 0.5, -1], []])
def test_one_strength_for_each_span(strengths: list[float]) -> None:
    with pytest.raises(DataError, match="one strength, 0 or more, for each of 3 spans"):
        SpanAugment([1, 1, 1], strengths)
