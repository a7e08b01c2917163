"""The table of several seeds of one front, by hand and after a sweep."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.training.fronts import FrontsError, fronts_table, main
from experiments.training.sweep import SweepTable, draw_sweep, seeds_table, sweep_table


def point(parameters: int, test: float, epoch: int, seconds: float = 60.0) -> dict[str, Any]:
    return {"parameters": parameters, "val_acc": 0.97, "test_acc": test, "epoch": epoch, "seconds": seconds}


def result(seed: int, *points: dict[str, Any]) -> dict[str, Any]:
    initial = {"step": 0, "parameters": 9000}
    return {
        "front": list(points), "val_acc": 0.97, "test_acc": 0.98, "seconds": 1.0, "steps": 10,
        "end": {"parameters": 700, "macs": 5}, "history": {"initial": initial, "events": []}, "seed": seed,
    }  # fmt: skip


RUNS = [
    result(seed, point(5000 - seed, accuracy, 2), point(700, accuracy - 0.01, 5, 60.0 * (seed + 1)))
    for seed, accuracy in enumerate((0.991, 0.994, 0.992))
]


def test_mean_and_deviation_of_each_point() -> None:
    first, last = fronts_table(RUNS).splitlines()[2:]
    values = [99.1, 99.4, 99.2]
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}" in first
    assert first.startswith("| 4,998 … 5,000 | 97.00 ± 0.00 |")
    assert "| 99.10 99.40 99.20 | 2 | 1.0 |" in first
    assert "| 98.10 98.40 98.20 | 5 | 1.0 … 3.0 |" in last


def test_one_run_has_no_deviation() -> None:
    assert "±" not in fronts_table(RUNS[:1])


@pytest.mark.parametrize("runs", [[], [result(0)], [RUNS[0], result(1, point(5000, 0.99, 3), point(700, 0.98, 5))]])
def test_runs_of_other_fronts_are_refused(runs: list[dict[str, Any]]) -> None:
    with pytest.raises(FrontsError, match="points are of the same epochs"):
        fronts_table(runs)


def written(directory: Path, runs: list[dict[str, Any]], overrides: list[list[str]]) -> Path:
    for place, (run, given) in enumerate(zip(runs, overrides, strict=True)):
        folder = directory / str(place)
        (folder / ".hydra").mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(run))
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(given))
    return directory


def test_a_sweep_over_seeds_of_a_front_ends_with_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    # The best validation accuracy comes first in the sweep's own table; seeds keep their order in the front's.
    runs = [{**run, "val_acc": accuracy} for run, accuracy in zip(RUNS, (0.95, 0.97, 0.96), strict=True)]
    cases = {
        "seeds": ([["+experiment=x", f"seed={seed}"] for seed in (9, 10, 11)], True),
        "others": ([[f"optimizer.lr={rate}"] for rate in range(3)], False),
        "both": ([["lr=1", "seed=0"], ["lr=1", "seed=1"], ["lr=2", "seed=0"]], False),
    }
    for name, (overrides, expected) in cases.items():
        directory = written(tmp_path / name, runs, overrides)
        SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(directory)}}}))
        printed = capsys.readouterr().out
        assert (fronts_table(runs) in printed) is expected
        assert ("| epoch | minutes |" in printed) is expected


def test_seeds_without_a_front_have_only_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    directory = written(tmp_path, [ended(700, 0.98), ended(600, 0.99)], [["seed=0"], ["seed=1"]])
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(directory)}}}))
    printed = capsys.readouterr().out
    assert seeds_table(directory) in printed
    assert "| epoch | minutes |" not in printed


def ended(parameters: int, accuracy: float) -> dict[str, Any]:
    return {**result(0), "test_acc": accuracy, "end": {"parameters": parameters, "macs": 5}, "front": []}


def test_a_sweep_over_seeds_and_settings_has_the_mean_of_each_setting(tmp_path: Path) -> None:
    given = [["+experiment=x", f"lr={rate}", f"seed={seed}"] for rate in (1, 2) for seed in (10, 9)]
    runs = [ended(count, accuracy) for count, accuracy in ((700, 0.98), (600, 0.99), (500, 0.97), (500, 0.97))]
    directory = written(tmp_path / "sweep", runs, given)
    for run in (0, 1):
        assert f"| lr=1 seed={10 - run} |" in sweep_table(directory)
    assert seeds_table(directory).splitlines()[3:] == [
        "| lr=1 | 650 | 97.00 ± 0.00 | 98.50 ± 0.71 | 600: 99.00 700: 98.00 |",
        "| lr=2 | 500 | 97.00 ± 0.00 | 97.00 ± 0.00 | 500: 97.00 500: 97.00 |",
    ]
    legend = draw_sweep(directory).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "lr=1: 600 … 700 parameters, test 98.50 ± 0.71 %",
        "lr=2: 500 parameters, test 97.00 ± 0.00 %",
    ]


def test_seeds_alone_have_one_mean_and_settings_alone_have_none(tmp_path: Path) -> None:
    runs = [ended(700, 0.98), ended(600, 0.99)]
    seeds = written(tmp_path / "seeds", runs, [["seed=0"], ["seed=1"]])
    assert seeds_table(seeds).splitlines()[3:] == [
        "| all | 650 | 97.00 ± 0.00 | 98.50 ± 0.71 | 700: 98.00 600: 99.00 |"
    ]
    uneven = written(
        tmp_path / "uneven", [*runs, runs[0]], [["lr=1", "seed=0"], ["lr=1", "seed=1"], ["lr=2", "seed=0"]]
    )
    assert seeds_table(uneven).splitlines()[-1] == "| lr=2 | 700 | 97.00 | 98.00 | 700: 98.00 |"
    assert seeds_table(written(tmp_path / "settings", runs, [["lr=1"], ["lr=2"]])) == ""
    assert seeds_table(written(tmp_path / "once", runs, [["lr=1", "seed=0"], ["lr=2", "seed=1"]])) == ""


def test_the_command_prints_it_and_ends_with_one_line_where_there_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, RUNS[:2], [[], []])
    monkeypatch.setattr(sys, "argv", ["fronts", str(tmp_path / "0"), str(tmp_path / "1")])
    main()
    assert fronts_table(RUNS[:2]) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fronts", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"^error: Fronts: expected a folder of a finished run"):
        main()
