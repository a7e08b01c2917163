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

from evolvenet.engine.saving import load
from evolvenet.errors import EvolveNetError
from evolvenet.measurement.cost import macs
from evolvenet.surgery.checkpoint import find_record, fit_shapes
from experiments.training.classifier import Classifier


class PointsError(EvolveNetError):
    """The teachers of a front do not fit its spans, or one is missing."""


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
    """Saves the network at the end of each span; networks of earlier spans teach in later ones.

    Checkpoints contain the points so far and the teachers that are still needed, so a resumed run continues with both.

    Args:
        spans: their relative lengths; each ends at the end of the nearest epoch.
        directory: where the checkpoints go; `evolvenet.load(model, path)` reads them.
        teachers: for each span the number of the span (from 0) whose last network teaches in it, None for no teacher. By
            default the first one teaches in all that follow.

    Raises:
        PointsError: if there is not one entry for each span, or one that names no earlier span; when training starts, if a
            resumed run's teacher is neither in the checkpoint nor in its point's file.
    """

    def __init__(
        self, spans: Sequence[float], directory: str | Path, teachers: Sequence[int | None] | None = None
    ) -> None:
        self.spans, self.directory = spans, Path(directory)
        self.teachers = [None, *[0] * (len(spans) - 1)] if teachers is None else list(teachers)
        _check_teachers(len(spans), self.teachers)
        self.found: list[Point] = []
        self._began = self._before = 0.0
        # Functions and not modules: EvolveNet would find those as replicas of the network.
        self._states: dict[int, Callable[[], dict[str, Any]]] = {}
        self._outputs: dict[int, Callable[[Tensor], Tensor]] = {}
        self._resumed: Mapping[int, Mapping[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The points so far, the seconds up to now, and the state dict of each teacher by the number of its span."""
        return {
            "found": [asdict(point) for point in self.found],
            "seconds": self._seconds(),
            "teachers": {place: state() for place, state in self._states.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the points and the seconds; teachers are built when training starts, from copies of the model.

        In checkpoints from before there was a choice of them, the network of the first span is the only teacher.
        """
        self.found = [Point(**point) for point in state_dict["found"]]
        first = state_dict.get("teacher")
        self._before = state_dict["seconds"]
        self._resumed = state_dict.get("teachers", {} if first is None else {0: first})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock; in a resumed run, build the teachers again."""
        assert isinstance(pl_module, Classifier)
        self._began = time.perf_counter()
        for place, state in self._resumed.items():
            past = frozen(pl_module.model)
            fit_shapes(past, state, record=find_record(state))
            past.load_state_dict(state)
            self._keep_teacher(pl_module, place, past)
        self._resumed = {}
        points, left = {point.epoch: point for point in self.found}, self._left(trainer)
        for place, end in enumerate(span_ends(self.spans, trainer.max_epochs or 0)):
            # Spans that end in the same epoch share its point, and one without an epoch has none.
            point = points.get(end)
            if point is not None and place not in self._states and place in left:
                self._keep_teacher(pl_module, place, _read(point.path, pl_module.model))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the teacher of this epoch's span; forget those that no later span has."""
        assert isinstance(pl_module, Classifier)
        left = self._left(trainer)
        for place in set(self._states) - set(left):
            del self._states[place], self._outputs[place]
        # In a run of fewer epochs than spans, a span that has no epoch leaves no network.
        pl_module.teacher = None if left[0] is None else self._outputs.get(left[0])

    def _left(self, trainer: lightning.Trainer) -> list[int | None]:
        """The teachers of the present span and of those after it."""
        ends = span_ends(self.spans, trainer.max_epochs or 0)
        return self.teachers[next((at for at, end in enumerate(ends) if trainer.current_epoch < end), len(ends) - 1) :]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """At the end of a span: save the network, and keep a copy of it if it will teach."""
        assert isinstance(pl_module, Classifier)
        # Before the checkpoint is written, since it contains the teachers.
        self._update_teacher(trainer, pl_module)
        if trainer.current_epoch + 1 in span_ends(self.spans, trainer.max_epochs or 0):
            self._save(trainer, pl_module)

    def _update_teacher(self, trainer: lightning.Trainer, pl_module: Classifier) -> None:
        for place, end in enumerate(span_ends(self.spans, trainer.max_epochs or 0)):
            if end == trainer.current_epoch + 1 and place in self.teachers[place + 1 :]:
                self._keep_teacher(pl_module, place, frozen(pl_module.model))

    def _keep_teacher(self, pl_module: Classifier, place: int, past: nn.Module) -> None:
        self._states[place], self._outputs[place] = past.state_dict, teacher(past)

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


def _check_teachers(spans: int, teachers: Sequence[int | None]) -> None:
    wrong = [place for place, one in enumerate(teachers) if one is not None and not 0 <= one < place]
    if len(teachers) != spans or wrong:
        raise PointsError(
            f"Points: expected teachers to have an entry for each of {spans} spans, each null or the number of an earlier span "
            f"(from 0), got {list(teachers)}. Set points.teachers."
        )


def _read(path: str, like: nn.Module) -> nn.Module:
    """A teacher that the checkpoint does not hold, since it was written with other `teachers`: from its point's file."""
    if not Path(path).is_file():
        raise PointsError(
            f"Points: expected a teacher in the checkpoint or in its point's file, got neither: there is no {path}. Resume with "
            "the points.teachers that the run had, or put the file back."
        )
    past = frozen(like)
    load(past, path)
    return past


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
