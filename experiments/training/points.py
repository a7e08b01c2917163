"""The points of a front: the network at the end of each span of the run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from evolvenet.measurement.cost import macs
from evolvenet.surgery.checkpoint import find_record, fit_shapes
from experiments.training.classifier import Classifier


@dataclass(frozen=True)
class Point:
    """One network of the front; accuracies are shares, seconds count from the beginning of the run."""

    parameters: int
    macs: int
    epoch: int
    seconds: float
    val_acc: float
    path: str
    test_acc: float | None = None


def span_ends(spans: Sequence[float], epochs: int) -> list[int]:
    """The numbers of the epochs, from 1, after which spans of these relative lengths end.

    >>> span_ends([1, 2, 2], epochs=10)
    [2, 6, 10]
    """
    return [round(epochs * done / sum(spans)) for done in accumulate(spans)]


class Points(lightning.Callback):
    """Saves the network at the end of each span; the network of the first span is the teacher of the others.

    Checkpoints contain the points so far and the teacher, so a resumed run continues with both.

    Args:
        spans: their relative lengths; each ends at the end of the nearest epoch.
        directory: where the checkpoints go; `evolvenet.load(model, path)` reads them.
    """

    def __init__(self, spans: Sequence[float], directory: str | Path) -> None:
        self.spans, self.directory = spans, Path(directory)
        self.found: list[Point] = []
        self._began = self._before = 0.0
        # No attribute holds the teacher itself: EvolveNet would find it as a replica of the network.
        self._teacher_state: Callable[[], dict[str, Any]] | None = None
        self._resumed: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The points so far, the seconds up to now, and the teacher's state dict, None without a teacher."""
        return {
            "found": [asdict(point) for point in self.found],
            "seconds": self._seconds(),
            "teacher": None if self._teacher_state is None else self._teacher_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the points and the seconds; the teacher is built when training starts, from a copy of the model."""
        self.found = [Point(**point) for point in state_dict["found"]]
        self._before, self._resumed = state_dict["seconds"], state_dict["teacher"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock; in a resumed run, build the teacher again."""
        assert isinstance(pl_module, Classifier)
        self._began = time.perf_counter()
        if self._resumed is not None:
            past = frozen(pl_module.model)
            fit_shapes(past, self._resumed, record=find_record(self._resumed))
            past.load_state_dict(self._resumed)
            self._set_teacher(pl_module, past)
            self._resumed = None

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """At the end of a span: save the network; at the end of the first one, make it the teacher."""
        assert isinstance(pl_module, Classifier)
        # Before the checkpoint is written, since it contains the teacher.
        self._update_teacher(trainer, pl_module)
        if trainer.current_epoch + 1 in span_ends(self.spans, trainer.max_epochs or 0):
            self._save(trainer, pl_module)

    def _update_teacher(self, trainer: lightning.Trainer, pl_module: Classifier) -> None:
        if self._teacher_state is None and trainer.current_epoch + 1 in span_ends(self.spans, trainer.max_epochs or 0):
            self._set_teacher(pl_module, frozen(pl_module.model))

    def _set_teacher(self, pl_module: Classifier, past: nn.Module) -> None:
        self._teacher_state, pl_module.teacher = past.state_dict, teacher(past)

    def _save(self, trainer: lightning.Trainer, pl_module: Classifier) -> None:
        images = next(iter(trainer.datamodule.val_dataloader()))[0][:1]  # pyright: ignore[reportAttributeAccessIssue]
        count = sum(parameter.numel() for parameter in pl_module.model.parameters())
        path = self.directory / f"{len(self.found)}-{count}.ckpt"
        point = Point(
            count, macs(pl_module.model, images.to(pl_module.device)), trainer.current_epoch + 1, self._seconds(),
            float(trainer.callback_metrics["val/acc"]), str(path),
        )  # fmt: skip
        self.found.append(point)
        trainer.save_checkpoint(path)

    def _seconds(self) -> float:
        return self._before + (time.perf_counter() - self._began if self._began else 0.0)


def frozen(model: nn.Module) -> nn.Module:
    """A copy of the network as it is now, in evaluation mode and without gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def teacher(past: nn.Module, half: bool = False) -> Callable[[Tensor], Tensor]:
    """The function images → outputs (float32) of a frozen network; under autocast to bfloat16 if `half`."""

    def outputs(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            return past(images).float()

    return outputs


def tested(points: Sequence[Point], test: Callable[[str], float]) -> list[dict[str, Any]]:
    """The points as plain data, each with its accuracy on the test split, measured once."""
    return [{**asdict(point), "test_acc": test(point.path)} for point in points]
