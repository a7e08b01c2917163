"""A run that is killed and resumed: one process imports everything and forks a child for each part of the run.

A script of its own, since a process can be forked safely only while nothing has started threads in it. It reads one order a
line and prints how the child ended. The child writes what it is doing into memory that both share.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import mmap
import os
import random
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
"""The child's phase, the steps of the run that are done, the step saved last, and the child's own steps."""
IDLE, TRAINING, EVENT, SAVING = b".", b"t", b"e", b"s"
BLINK = 2e-4
"""Seconds between two reads of the child's phase."""


class Progress(lightning.Callback):
    """Writes into shared memory how far the run is, and into a pipe that it has begun."""

    def __init__(self, seen: mmap.mmap, pipe: int) -> None:
        self.seen, self.pipe = seen, pipe
        self.phase, self.done, self.saved, self.own = IDLE, 0, 0, 0

    def note(self, **values: Any) -> None:
        vars(self).update(values)
        SEEN.pack_into(self.seen, 0, self.phase, self.done, self.saved, self.own)

    def during(self, phase: bytes, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self.phase
            self.note(phase=phase)
            result = function(*args, **kwargs)
            self.note(phase=before, **({"saved": self.done} if phase == SAVING else {}))
            return result

        return watched

    def on_train_start(self, trainer: lightning.Trainer, *rest: Any, **_: Any) -> None:
        self.note(phase=TRAINING, done=trainer.global_step)
        os.write(self.pipe, b"!")

    def on_train_batch_end(self, trainer: lightning.Trainer, *rest: Any, **_: Any) -> None:
        self.note(done=trainer.global_step, own=self.own + 1)

    def on_train_end(self, *args: Any, **_: Any) -> None:
        self.note(phase=IDLE)


class Epochs(lightning.Callback):
    """Counts the epoch that a resumed run begins with.

    Lightning (2.6.6) forgets to after a checkpoint of an epoch's last batch. What it saves in that epoch then looks as if
    the epoch were over: resumed from there it begins the epoch anew, and does not load the loader's state.
    """

    def on_train_batch_start(self, trainer: lightning.Trainer, *rest: Any, **_: Any) -> None:
        progress: Any = trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):
            counts.ready = counts.started = counts.processed + 1


def before_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The process is killed before the call."""


def after_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The process is killed after the call."""
    function(*args, **kwargs)


class Full(io.BytesIO):
    """A buffer at whose second write the process is killed."""

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
    "before an event": (evolvenet.Evolver, "step", before_call),
    "among the exchanged tensors": (sys.modules["evolvenet.surgery.resize_model"], "exchange", before_call),
    "between model and optimizer": (sys.modules["evolvenet.engine.functional"], "apply_state", before_call),
    "after an event": (evolvenet.Evolver, "step", after_call),
    "before torch.save": (torch, "save", before_call),
    "in torch.save": (torch, "save", serialized_by_half),
    "in the file": (LocalFileOpener, "write", written_by_half),
    "before the name": (shutil, "move", before_call),
    "after the name": (shutil, "move", after_call),
    "before the removal": (TorchCheckpointIO, "remove_checkpoint", before_call),
    "after the removal": (TorchCheckpointIO, "remove_checkpoint", after_call),
    "before the link": (os, "symlink", before_call),
    "after the last save": (Progress, "on_train_end", before_call),
    "in the copy": (shutil, "copyfile", copied_by_half),
}
"""Where a child kills itself: in which function, and which part of the call is done before."""


def die() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(trap: str, count: int) -> None:
    """Kill this process at the function's n-th call."""
    owner, name, last = TRAPS[trap]
    function, calls = getattr(owner, name), itertools.count(1)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < count:
            return function(*args, **kwargs)
        last(function, *args, **kwargs)
        return die()

    setattr(owner, name, trapped)


def forbid_moves_into(disk: str) -> None:
    """Nothing can be renamed into a folder from outside, as if it were on a disk of its own."""
    rename = os.rename

    def within(source: str, target: str) -> None:
        if not str(source).startswith(disk):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        rename(source, target)

    os.rename = within  # type: ignore[assignment]


def fit_once(order: dict[str, Any], seen: mmap.mmap, pipe: int) -> None:
    """Call `fit` once, from a checkpoint or from the start."""
    progress, folder = Progress(seen, pipe), Path(order["folder"])
    if "disk" in order:
        forbid_moves_into(order["disk"])
    if "temporary" in order:
        tempfile.tempdir = order["temporary"]
    evolvenet.Evolver.step = progress.during(EVENT, evolvenet.Evolver.step)
    if "trap" in order:
        set_trap(*order["trap"])
    keeper = ModelCheckpoint(folder, filename="{step}", **order["keeper"])
    model = fresh()
    torch.manual_seed(11)
    random.seed(11)
    fitting = trainer(folder, [Randomness(), Epochs(), evolution(), progress, keeper], max_epochs=order["epochs"])
    save = fitting.save_checkpoint
    fitting.save_checkpoint = progress.during(SAVING, save)
    fitting.fit(model, Batches(), ckpt_path=order["from"], weights_only=True)
    save(folder / "end.ckpt")


def run_child(order: dict[str, Any], seen: mmap.mmap, pipe: int) -> None:
    """Fit in the child, which then exits without returning to the parent's code."""
    # Answers go to the parent's output alone.
    os.dup2(2, 1)
    status = 1
    try:
        fit_once(order, seen, pipe)
        status = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ends(pipe: int, seconds: float | None) -> bool:
    """Whether the child ends within so many seconds: its end of the pipe is then closed."""
    return bool(select.select([pipe], [], [], seconds)[0])


def reaches_kill(order: dict[str, Any], seen: mmap.mmap, pipe: int) -> bool:
    """Wait for the moment of the kill; False if the child has ended before."""
    if "steps" not in order:
        return not ends(pipe, None)
    while True:
        phase, _, _, own = SEEN.unpack_from(seen)
        if own >= order["steps"] and order["aim"].encode() in (b"", phase):
            return not ends(pipe, order["more"])
        if ends(pipe, BLINK):
            return False


def fork_child(order: dict[str, Any]) -> dict[str, Any]:
    """Fork a child, kill it if the order says so, and return how it ended."""
    seen = mmap.mmap(-1, SEEN.size)
    SEEN.pack_into(seen, 0, IDLE, 0, 0, 0)
    pipe, other = os.pipe()
    child = os.fork()
    if not child:
        os.close(pipe)
        run_child(order, seen, other)
    os.close(other)
    os.read(pipe, 1)
    if reaches_kill(order, seen, pipe):
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
        print(json.dumps(fork_child(json.loads(line))), flush=True)
