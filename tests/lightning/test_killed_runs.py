"""`kill -9` at any moment of a real run, then resume: no checkpoint is lost, and the end is the same to the last bit.

A run is resumed from its newest checkpoint, by the step in the file's name. `last.ckpt` is no better and may be missing:
`save_last="link"` removes the link before it makes the new one. `killed_run.Epochs` is what Lightning needs besides a loader
with a state, so that a run can be resumed more than once.

Lightning writes a checkpoint into the folder for temporary files and gives it its name when it is whole. The name is given at
once only on the same disk; onto another one the file is copied, under its final name. Where these are different disks, set
TMPDIR to a folder beside the checkpoints, as `test_a_checkpoint_on_another_disk…` does. What a killed run was writing is left
there.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.killed_run import EVENT, IDLE, SAVING, TRAINING
from tests.helpers.paths import ROOT
from tests.helpers.resuming import assert_same

SHORT = 3
"""Epochs of a run that is killed at chosen places."""
STEPS = 8
"""Of an epoch."""
KEEPERS: tuple[dict[str, Any], ...] = (
    {"every_n_train_steps": 1, "save_top_k": -1},
    {"every_n_train_steps": 2, "save_top_k": -1, "save_last": True},
    {"every_n_train_steps": 3, "save_top_k": 1, "save_last": "link"},
)
AIMS = ("", EVENT.decode(), SAVING.decode())
MORE = {"": 0.0, EVENT.decode(): 0.02, SAVING.decode(): 0.003}
"""Seconds after an event or a save has begun within which the kill comes."""

Forks = Callable[..., dict[str, Any]]
"""From an order to how the child ended, see `killed_run`."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Sends an order to the parent process and returns how its child ended."""
    paths = str(ROOT)
    temporary = str(tmp_path_factory.mktemp("temporary"))
    settings = {**os.environ, "PYTHONPATH": paths, "TMPDIR": temporary, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.killed_run"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=settings
    ) as process:

        def resume(**order: Any) -> dict[str, Any]:
            print(json.dumps(order), file=process.stdin, flush=True)
            assert process.stdout is not None
            return json.loads(process.stdout.readline())

        yield resume


def contents(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run: not how long it and its events took, nor where the files are."""
    found = torch.load(path, weights_only=True)
    callbacks = {name: each for name, each in found["callbacks"].items() if not name.startswith("ModelCheckpoint")}
    if "WidthEvolution" in callbacks:
        # For the report: metrics of an epoch whose last batch was before the checkpoint are unknown to Lightning after a resume.
        del callbacks["WidthEvolution"]["curves"]
        for event in callbacks["WidthEvolution"]["evolver"]["history"]["events"]:
            del event["seconds"], event["stages"]
    if path.name == "end.ckpt":
        # Where nothing was left to do after a resume, Lightning does not count the last batch.
        del found["loops"]
    return {**found, "callbacks": callbacks, "metadata": dict(found["state_dict"]._metadata)}


@dataclass
class Whole:
    """The run that was never killed, with what it saved after each step."""

    folder: Path
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def at(self, name: str) -> dict[str, Any]:
        if name not in self.known:
            self.known[name] = contents(self.folder / name)
        return self.known[name]


Wholes = Callable[[int], Whole]
"""From a run's epochs to the run that was never killed."""


@pytest.fixture(scope="module")
def wholes(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Makes each run once."""

    @cache
    def whole(epochs: int) -> Whole:
        folder = tmp_path_factory.mktemp("whole")
        end = forks(**{"folder": str(folder), "from": None, "epochs": epochs, "keeper": KEEPERS[0]})
        assert end["status"] == 0
        return Whole(folder)

    return whole


class Run:
    """A run that is killed and resumed."""

    def __init__(self, forks: Forks, wholes: Wholes, folder: Path, keeper: dict[str, Any], epochs: int) -> None:
        self.forks, self.whole, self.folder, self.keeper, self.epochs = forks, wholes(epochs), folder, keeper, epochs
        self.sound: set[tuple[str, int]] = set()
        folder.mkdir()

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint, 0 without any."""
        found = (re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in self.folder.iterdir())
        return max((int(match[1]) for match in found if match), default=0)

    def resume(self, **order: Any) -> dict[str, Any]:
        """Go on from the newest checkpoint; afterwards nothing that was saved is lost, and what there is is sound."""
        newest = self.newest
        given = str(self.folder / f"step={newest}.ckpt") if newest else None
        settings = {"folder": str(self.folder), "from": given, "epochs": self.epochs, "keeper": self.keeper}
        end = self.forks(**settings, **order)
        assert end["status"] in (0, -signal.SIGKILL)
        assert self.newest >= max(newest, end["saved"], end["done"] - self.keeper["every_n_train_steps"])
        self.check()
        return end

    def check(self) -> None:
        """Every file is what the whole run saved at that step."""
        for path in self.folder.iterdir():
            assert re.fullmatch(r"(step=\d+|last(-v\d+)?|end)\.ckpt", path.name)
            # While the link is made anew it may point to what is no more.
            if path.is_symlink() and not path.exists():
                continue
            mark = path.name, path.stat().st_mtime_ns
            if mark not in self.sound:
                found = contents(path)
                step = f"step={found['global_step']}.ckpt"
                assert path.name == step or not path.name.startswith("step")
                assert_same(found, self.whole.at("end.ckpt" if path.name == "end.ckpt" else step))
                self.sound.add(mark)

    def to_the_end(self, moments: random.Random, kills: int) -> list[dict[str, Any]]:
        """Killed so many times while it trains, or fewer if it ends before."""
        hits: list[dict[str, Any]] = []
        while not (self.folder / "end.ckpt").exists():
            end = self.resume(**(self.moment(moments, len(hits)) if len(hits) < kills else {}))
            if end["status"] and end["phase"] != IDLE.decode():
                hits.append(end)
        return hits

    def moment(self, moments: random.Random, number: int) -> dict[str, Any]:
        """Some steps after the child began; every third one in the next event, and every third in the next save."""
        aim = AIMS[number % len(AIMS)]
        return {"steps": moments.randrange(self.epochs * STEPS // 8), "aim": aim, "more": moments.uniform(0, MORE[aim])}


@pytest.mark.parametrize(("kills", "epochs"), [(9, 5), pytest.param(30, 20, marks=pytest.mark.long)])
def test_random_kills_lose_nothing_and_change_nothing(
    kills: int, epochs: int, forks: Forks, wholes: Wholes, tmp_path: Path
) -> None:
    """A third of them in each of three runs, which save differently; more runs if a phase was missed."""
    moments = random.Random(2)
    hits: list[dict[str, Any]] = []
    phases: set[bytes] = set()
    for number, keeper in enumerate(islice(cycle(KEEPERS), 30)):
        run = Run(forks, wholes, tmp_path / str(number), keeper, epochs)
        hits += run.to_the_end(moments, kills // len(KEEPERS))
        phases = {hit["phase"].encode() for hit in hits}
        if len(hits) >= kills and len(phases) == 3:
            break
    print(Counter(hit["phase"] for hit in hits), [(hit["phase"], hit["done"], hit["saved"]) for hit in hits])
    assert phases == {TRAINING, EVENT, SAVING}
    events = wholes(epochs).at("end.ckpt")["callbacks"]["WidthEvolution"]["evolver"]["history"]["events"]
    assert len(events) == (epochs * STEPS - 3) // 5, "every 5 steps, on the 3 batches after them"
    assert all(event["changes"] for event in events)


@pytest.mark.parametrize(
    ("trap", "call", "keeper"),
    [
        ("before an event", 2, KEEPERS[0]),
        ("among the exchanged tensors", 5, KEEPERS[1]),
        ("between model and optimizer", 1, KEEPERS[2]),
        ("after an event", 1, KEEPERS[0]),
        ("before torch.save", 9, KEEPERS[0]),
        ("in torch.save", 9, KEEPERS[0]),
        ("in the file", 9, KEEPERS[1]),
        ("in the file", 10, KEEPERS[1]),
        ("before the name", 1, KEEPERS[0]),
        ("after the name", 9, KEEPERS[1]),
        ("before the removal", 3, KEEPERS[2]),
        ("after the removal", 3, KEEPERS[2]),
        ("before the link", 3, KEEPERS[2]),
        ("after the last save", 1, KEEPERS[0]),
    ],
)
def test_killed_at_the_worst_moments(
    trap: str, call: int, keeper: dict[str, Any], forks: Forks, wholes: Wholes, tmp_path: Path
) -> None:
    run = Run(forks, wholes, tmp_path / "run", keeper, SHORT)
    assert run.resume(trap=(trap, call))["status"] == -signal.SIGKILL
    assert run.resume()["status"] == 0
    assert run.newest == SHORT * STEPS


def test_killed_after_every_save(forks: Forks, wholes: Wholes, tmp_path: Path) -> None:
    """Each child makes one step, the first after a resume, also where an event becomes due, and an epoch ends."""
    run = Run(forks, wholes, tmp_path / "run", KEEPERS[0], epochs := 2)
    for step in range(1, epochs * STEPS + 1):
        assert run.resume(trap=("after the name", 1))["status"] == -signal.SIGKILL
        assert run.newest == step
    assert run.resume()["status"] == 0


@pytest.mark.parametrize("beside", [False, True])
def test_a_checkpoint_on_another_disk_is_whole_if_temporary_files_are_there_too(
    beside: bool, forks: Forks, wholes: Wholes, tmp_path: Path
) -> None:
    run = Run(forks, wholes, tmp_path / "run", KEEPERS[0], SHORT)
    (tmp_path / "temporary").mkdir()
    order: dict[str, Any] = {"disk": str(tmp_path), "trap": ("in the copy", 9)}
    if beside:
        assert run.resume(**order, temporary=str(tmp_path / "temporary"))["status"] == 0
        assert run.newest == SHORT * STEPS
    else:
        # Where this is no longer so, Lightning has mended it, and what is said above of TMPDIR can go.
        with pytest.raises((RuntimeError, OSError), match=r"central directory|Invalid argument"):
            run.resume(**order)
        assert run.newest == 9
