"""Runs that fail, end, stop and go on: one line each, nothing done twice, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf

from evolvenet.cli.runs import points_of
from experiments.training import jobs
from experiments.training.jobs import (
    SettingsError,
    check_types,
    finished,
    plain_words,
    resume_command,
    stopped_run,
    unknown_name,
)
from experiments.training.sweep import SweepTable, draw_sweep, sweep_table, tabulate
from tests.helpers.experiments import configuration, train
from tests.helpers.paths import CONF, ROOT

SMALL = [
    "model.widths=[4,4,4]", "model.hidden=8", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu",
    "logger=none",
]  # fmt: skip


def inside_hydra(monkeypatch: pytest.MonkeyPatch, *overrides: str, mode: RunMode = RunMode.RUN) -> None:
    """Let `jobs` see a run with these overrides, in the sweep folder "there"."""
    own = OmegaConf.create(
        {
            "runtime": {"choices": {"trainer": "default", "data": "digits"}}, "overrides": {"task": list(overrides)},
            "job": {"config_name": "train"}, "sweep": {"dir": "there"}, "mode": mode,
        }
    )  # fmt: skip
    monkeypatch.setattr(jobs, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: own))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trainer.devices=auto", None),
        ('trainer.devices="0,1"', None),
        ("trainer.max_epochs=abc", "trainer.max_epochs: expected a number, such as 60, got 'abc'"),
        ("trainer.limit_train_batches=all", "trainer.limit_train_batches: expected a number"),
        ("seed=one", "seed: expected a number"),
    ],
)
def test_texts_are_refused_for_numbers_but_where_lightning_takes_both(
    monkeypatch: pytest.MonkeyPatch, word: str, expected: str | None
) -> None:
    inside_hydra(monkeypatch, word)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if expected is None:
            check_types(compose("train", [word]))
            return
        with pytest.raises(SettingsError, match=expected):
            check_types(compose("train", [word]))


def test_a_stopped_sweep_goes_on_as_a_whole_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of one run would be resumed by all of them."""
    (tmp_path / "last.ckpt").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1", "hydra.sweep.dir=there", "resume=auto"])
    inside_hydra(monkeypatch, mode=RunMode.MULTIRUN)
    assert resume_command(tmp_path) == "python train.py -m seed=0,1 hydra.sweep.dir=there resume=auto"
    inside_hydra(monkeypatch)
    assert str(resume_command(tmp_path)).endswith(f"resume={tmp_path / 'last.ckpt'}")


def test_a_sweep_of_which_every_run_failed_ends_with_status_1(tmp_path: Path) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    SweepTable().on_multirun_end(config)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.txt").write_text("error: something", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        SweepTable().on_multirun_end(config)
    assert ended.value.code == 1


def command(cwd: Path, *overrides: str) -> Any:
    """What `train.py` does when it is typed."""
    words = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_a_setting_of_the_wrong_type_is_one_line(tmp_path: Path) -> None:
    done = command(tmp_path, "trainer.max_epochs=abc")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: trainer.max_epochs: expected a number, such as 60, got 'abc'."
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["experiment=digit_both"], "experiment: .* got 'digit_both'. Nearest: .*digits_both"),
        (["-m", "model=digits_resnet,digits_resnets"], "model: .* got 'digits_resnets'. Nearest: digits_resnet"),
        (["evolve=qqq"], "evolve: .* got 'qqq'. Nearest: budget, .*tolerance"),
        (["experiment=digits_both", "model=timm:resnet18", "evolve=none", "logger=null", "seed=0,1"], None),
        (["logger=[csv,wandbs]", "model=glob(*)", "evolve.policy.prune=7", "seed=1", "lr=x"], None),
        (["--config-dir", "own", "experiment=mine"], None),
        (["-cd=own", "experiment=mine"], None),
    ],
)
def test_names_of_no_configuration_are_one_line_with_the_nearest(words: list[str], expected: str | None) -> None:
    found = unknown_name(plain_words(words), ROOT / "conf")
    assert found is None if expected is None else re.search(expected, found or "")


def test_a_missing_device_is_one_line(tmp_path: Path) -> None:
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(SystemExit, match=r"^error: Trainer: .*not available"):
        train(tmp_path, [*SMALL, f"trainer.accelerator={missing}"])


def test_a_truncated_file_and_a_full_disk_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = b"PK\x03\x04" + os.urandom(300)
    (tmp_path / "mnist.npz").write_bytes(whole)
    with pytest.raises(SystemExit, match=r"error: Data: expected .*mnist\.npz to hold"):
        train(tmp_path, ["data=mnist", f"data.root={tmp_path}", "model.widths=[4,4,4]"])

    def full(*unused: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device", "last.ckpt")

    monkeypatch.setattr("lightning.Trainer.save_checkpoint", full)
    with pytest.raises(SystemExit, match=r"error: last\.ckpt: the disk is full"):
        train(tmp_path, SMALL)


def test_a_failed_run_does_not_end_its_sweep_and_finished_runs_are_skipped(tmp_path: Path) -> None:
    sweep = [
        "-m",
        "experiment=digits_both_threshold",
        "model=digits_resnet",
        "seed=0,1",
        "evolve.policy.prune=7,0.02",
        *SMALL,
        "hydra.sweep.dir=sweep",
    ]
    first = command(tmp_path, *sweep)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(f"(run {tmp_path}/sweep/") == first.stdout.count("failed: ") == 2
    results = sorted(path.parent.name for path in (tmp_path / "sweep").rglob("result.json"))
    assert len(results) == 2
    table = (tmp_path / "sweep" / "sweep.md").read_text("utf-8")
    assert table in first.stdout
    assert table.startswith(sweep_table(tmp_path / "sweep"))
    assert table.count("| seed=") == 2
    assert "trainer.max_epochs" not in table
    assert "Warning" not in first.stdout + first.stderr
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    ends = [json.loads(path.read_text())["end"]["parameters"] for path in (tmp_path / "sweep").rglob("result.json")]
    drawn = [list(line.get_ydata())[-1] for line in draw_sweep(tmp_path / "sweep").axes[0].lines]  # pyright: ignore
    assert sorted(drawn) == sorted(ends)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("result.json")}
    again = command(tmp_path, *sweep)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("result.json")} == made
    assert again.stdout.count("finished before, skipped") == 2
    points = points_of([tmp_path])
    assert {point["run"] for point in points} == {"seed=0", "seed=1"}
    assert tabulate(tmp_path).count("failed: sweep/") == 2  # what `python -m experiments.sweep DIR` prints
    assert (tmp_path / "front.png").stat().st_size > 5_000


@pytest.mark.long
def test_optuna_gets_accuracy_and_size(tmp_path: Path) -> None:
    done = command(
        tmp_path, "-m", "hydra/sweeper=accuracy_and_size", "hydra.sweeper.n_trials=2", *SMALL, "hydra.sweep.dir=sweep",
        '+hydra.sweeper.params={evolve.policy.prune: "interval(0.01,0.3)"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sweep" / "optimization_results.yaml").is_file()
    assert (
        "values" in (tmp_path / "sweep" / "optimization_results.yaml").read_text()
        or "solutions" in (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    )


def test_resume_auto_finds_the_latest_stopped_run_of_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "trainer.max_epochs=2"]
    whole = train(tmp_path / "outputs" / "a", words)
    config = configuration(*words, output=tmp_path / "outputs" / "a" / "run")
    assert finished(config) == whole
    assert stopped_run(config, [Path("outputs")]) is None, "it has ended"
    (tmp_path / "outputs" / "a" / "run" / "result.json").unlink()
    other = configuration(*words, output=tmp_path / "outputs" / "b" / "run")
    assert stopped_run(other, [Path("outputs")]) == Path("outputs/a/run/last.ckpt")
    assert stopped_run(configuration(*words, "seed=1", output="x"), [Path("outputs")]) is None, "another seed"
    assert resume_command(Path("outputs/a/run")) is not None
    resumed = train(tmp_path / "outputs" / "b", [*words, "resume=auto"])
    assert resumed["steps"] == whole["steps"]
    assert resumed["seconds"] > whole["seconds"], "times add up"
    assert resumed["val_acc"] == whole["val_acc"]


def test_ctrl_c_prints_the_command_that_goes_on(tmp_path: Path) -> None:
    words = [*SMALL, "trainer.max_epochs=500", "evolve=off", "hydra.run.dir=run"]
    typed = [sys.executable, str(ROOT / "train.py"), *words]
    running = subprocess.Popen(typed, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    waited = time.monotonic()
    while not (tmp_path / "run" / "last.ckpt").is_file() and time.monotonic() - waited < 120:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    shown, _ = running.communicate(timeout=120)
    [line] = [line for line in shown.splitlines() if "to go on: " in line]
    assert shlex.split(line.partition("to go on: ")[2])[2:] == [*words, f"resume={tmp_path / 'run' / 'last.ckpt'}"]
    assert "Traceback" not in shown


def test_a_folder_without_results_says_so(tmp_path: Path) -> None:
    assert tabulate(tmp_path).startswith("no run below")


def test_runs_are_told_apart_by_their_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        config = configuration("data=mnist", f"data.root={tmp_path / 'a' / 'data'}", output=tmp_path / "run")
        found.append(jobs._comparable(jobs.recorded_config(config)))
    assert found[0] == found[1], "the same data, seen from two folders"
    config = configuration("data=mnist", f"data.root={tmp_path / 'b' / 'data'}", output=tmp_path / "run")
    assert jobs._comparable(jobs.recorded_config(config)) != found[0], "other data, under the same name there"


@pytest.mark.parametrize("fails", [False, True])
def test_a_tracker_that_cannot_end_its_run_neither_ends_a_job_nor_hides_why_it_failed(fails, monkeypatch, caplog):
    def finish(exit_code: int) -> None:
        raise ConnectionError("no server")

    tracker = SimpleNamespace(run=None, finish=finish)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with pytest.raises(ValueError, match="the cause") if fails else contextlib.nullcontext(), jobs.own_tracked_run():
        tracker.run = object()
        if fails:
            raise ValueError("the cause")
    assert "was not ended: ConnectionError: no server" in caplog.text
    caplog.clear()
    with jobs.own_tracked_run():
        """One that was there before is not ended."""
    assert caplog.text == ""
