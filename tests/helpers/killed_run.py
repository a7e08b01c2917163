"""Lives of a run that is killed: one process imports everything and forks a child for each life.

A script of its own, since a process can be forked safely only while nothing has started threads in it. It reads an order a
line and answers each with how the life ended. Memory that both share says what the child was at, also when it is dead.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import mmap
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evolvenet  # isort: skip  before lightning: its mend precedes torchvision

import lightning
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers.resuming import Randomness, evolution
from tests.helpers.runs import Batches, fresh, trainer

SEEN = struct.Struct("cqqq")
"""What the child is at, the steps of the run that are done, the step saved last, and the steps of this life."""
IDLE, TRAINING, EVENT, SAVING = b".", b"t", b"e", b"s"
BLINK = 2e-4
"""Seconds between two looks at what the child is at."""


class Witness(lightning.Callback):
    """Says in shared memory how far the run is, and through a pipe that it has begun."""

    def __init__(self, seen: mmap.mmap, pipe: int) -> None:
        self.seen, self.pipe = seen, pipe
        self.phase, self.done, self.saved, self.lived = IDLE, 0, 0, 0

    def note(self, **values: Any) -> None:
        vars(self).update(values)
        SEEN.pack_into(self.seen, 0, self.phase, self.done, self.saved, self.lived)

    def during(self, phase: bytes, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self.phase
            self.note(phase=phase)
            result = function(*args, **kwargs)
            self.note(phase=before, **({"saved": self.done} if phase == SAVING else {}))
            return result

        return watched

    def on_train_start(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self.note(phase=TRAINING, done=trainer.global_step)
        os.write(self.pipe, b"!")

    def on_train_batch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self.note(done=trainer.global_step, lived=self.lived + 1)

    def on_train_end(self, *args: Any) -> None:
        self.note(phase=IDLE)


class Epochs(lightning.Callback):
    """Counts the epoch that a resumed run begins with.

    Lightning (2.6.6) forgets to after a checkpoint of an epoch's last batch. What it saves in that epoch then looks as if
    the epoch were over: resumed from there it begins the epoch anew, and does not load the loader's state.
    """

    def on_train_batch_start(self, trainer: lightning.Trainer, *rest: Any) -> None:
        progress: Any = trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):
            counts.ready = counts.started = counts.processed + 1


def nothing(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Die before the call."""


def all_of_it(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Die after the call."""
    function(*args, **kwargs)


class Full(io.BytesIO):
    """A buffer that is not there any more when the second record is written."""

    def write(self, data: Any) -> int:
        return die() if self.tell() else super().write(data)


def serialized_by_half(save: Callable[..., Any], checkpoint: Any, *args: Any) -> None:
    save(checkpoint, Full())


def written_by_half(write: Callable[..., Any], file: LocalFileOpener, data: bytes) -> None:
    write(file, data[: len(data) // 2])
    file.f.flush()  # type: ignore[union-attr]


def copied_by_half(copy: Callable[..., Any], source: str, target: str, **options: Any) -> None:
    data = Path(source).read_bytes()
    Path(target).write_bytes(data[: len(data) // 2])


TRAPS: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "before an event": (evolvenet.Evolver, "step", nothing),
    "among the exchanged tensors": (sys.modules["evolvenet.surgery.resize_model"], "exchange", nothing),
    "between model and optimizer": (sys.modules["evolvenet.engine.functional"], "apply_state", nothing),
    "after an event": (evolvenet.Evolver, "step", all_of_it),
    "before torch.save": (torch, "save", nothing),
    "in torch.save": (torch, "save", serialized_by_half),
    "in the file": (LocalFileOpener, "write", written_by_half),
    "before the name": (shutil, "move", nothing),
    "after the name": (shutil, "move", all_of_it),
    "before the removal": (TorchCheckpointIO, "remove_checkpoint", nothing),
    "after the removal": (TorchCheckpointIO, "remove_checkpoint", all_of_it),
    "before the link": (os, "symlink", nothing),
    "after the last save": (Witness, "on_train_end", nothing),
    "in the copy": (shutil, "copyfile", copied_by_half),
}
"""Where a child kills itself: in which function, and what of its call it still does."""


def die() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def lay(trap: str, count: int) -> None:
    """The function's n-th call is the last thing that this process does."""
    owner, name, last = TRAPS[trap]
    function, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < count:
            return function(*args, **kwargs)
        last(function, *args, **kwargs)
        return die()

    setattr(owner, name, deadly)


def separate(disk: str) -> None:
    """Nothing can be renamed into a folder from outside, as if it were on a disk of its own."""
    rename = os.rename

    def within(source: str, target: str) -> None:
        if not str(source).startswith(disk):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        rename(source, target)

    os.rename = within  # type: ignore[assignment]


def live(order: dict[str, Any], seen: mmap.mmap, pipe: int) -> None:
    """One `fit`, from a checkpoint or from the start."""
    witness, folder = Witness(seen, pipe), Path(order["folder"])
    if "disk" in order:
        separate(order["disk"])
    if "temporary" in order:
        tempfile.tempdir = order["temporary"]
    evolvenet.Evolver.step = witness.during(EVENT, evolvenet.Evolver.step)
    if "trap" in order:
        lay(*order["trap"])
    keeper = ModelCheckpoint(folder, filename="{step}", **order["keeper"])
    model = fresh()
    torch.manual_seed(11)
    fitting = trainer(folder, [Randomness(), Epochs(), evolution(), witness, keeper], max_epochs=order["epochs"])
    save = fitting.save_checkpoint
    fitting.save_checkpoint = witness.during(SAVING, save)
    fitting.fit(model, Batches(), ckpt_path=order["from"], weights_only=True)
    save(folder / "end.ckpt")


def born(order: dict[str, Any], seen: mmap.mmap, pipe: int) -> None:
    """What the child does; it never returns to what the parent was doing."""
    # Answers go to the parent's output alone.
    os.dup2(2, 1)
    status = 1
    try:
        live(order, seen, pipe)
        status = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ends(pipe: int, seconds: float | None) -> bool:
    """Whether the child's end of the pipe is closed within so many seconds."""
    return bool(select.select([pipe], [], [], seconds)[0])


def survives(order: dict[str, Any], seen: mmap.mmap, pipe: int) -> bool:
    """Wait for the moment at which the child has to die; it may have ended before."""
    if "steps" not in order:
        return not ends(pipe, None)
    while True:
        phase, _, _, lived = SEEN.unpack_from(seen)
        if lived >= order["steps"] and order["aim"].encode() in (b"", phase):
            return not ends(pipe, order["more"])
        if ends(pipe, BLINK):
            return False


def lived(order: dict[str, Any]) -> dict[str, Any]:
    """A life from birth to death."""
    seen = mmap.mmap(-1, SEEN.size)
    SEEN.pack_into(seen, 0, IDLE, 0, 0, 0)
    pipe, other = os.pipe()
    child = os.fork()
    if not child:
        os.close(pipe)
        born(order, seen, other)
    os.close(other)
    os.read(pipe, 1)
    if survives(order, seen, pipe):
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(pipe)
    phase, done, saved, _ = SEEN.unpack_from(seen)
    return {"status": status, "phase": phase.decode(), "done": done, "saved": saved}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for line in sys.stdin:
        print(json.dumps(lived(json.loads(line))), flush=True)
