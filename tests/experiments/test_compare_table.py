"""The comparison's table: means, deviations, what is missing, and whether the goals are met."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

from experiments.compare.table import ALLOCATIONS, ONE_SHOT, goals, write_table
from experiments.pages import cell

SEEDS = (0, 1, 2)


def add(cache: Path, task: str, seed: int, name: str, record: dict) -> None:
    path = cache / task / f"seed{seed}" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), "utf-8")


def fill(cache: Path, task: str = "mnist", lost: float = 0.001, **changed: object) -> None:
    """Three networks; ours loses `lost`, every peer 0.05, one shot."""
    for seed in SEEDS:
        uncut = {"accuracy": 0.994 + seed / 1000, "parameters": 1000, "epochs": 2, "weights": f"w{seed}"}
        add(cache, task, seed, "uncut", uncut)
        for allocation in ALLOCATIONS:
            for ratio in (30, 90):
                for method in {method for method, _ in ONE_SHOT}:
                    record = {"allocation": allocation, "ratio": ratio, "method": method, "weights": f"w{seed}"}
                    shot = uncut["accuracy"] - (lost if method == "ours" else 0.05)
                    record["parameters"] = 1000 - 10 * ratio + (4 if method == "random" else -3)
                    record |= {"state": "s" if method in ("ours", "weights") else None, "as_cut": shot}
                    record |= {"reestimated": shot + 0.01, "after_epoch": 0.5 + seed / 10, **changed}
                    add(cache, task, seed, f"{allocation}-{ratio}-{method}", record)


def table(tmp_path: Path) -> list[str]:
    write_table(tmp_path / "table.md", tmp_path / "cache", "s")
    return (tmp_path / "table.md").read_text("utf-8").splitlines()


def test_means_and_deviations_over_the_seeds(tmp_path: Path) -> None:
    fill(tmp_path / "cache")
    lines = table(tmp_path)
    values = [99.4 + seed / 10 - 5 for seed in SEEDS]
    shown = f"{mean(values):.2f} ± {stdev(values):.2f}"
    assert lines.count(f"| Torch-Pruning L2 | {shown} | {shown} |") == 2
    again = f"{mean(values) + 1:.2f} ± {stdev(values):.2f}"
    assert lines.count(f"| Torch-Pruning L2 + BatchNorm re-estimated | {again} | {again} |") == 2
    assert lines.count("| random | 60.00 ± 10.00 | 60.00 ± 10.00 |") == 2
    assert "## mnist: uncut 99.50 ± 0.10 %" in lines
    assert "1,000 parameters, 2 epochs; n = 3, seeds 0, 1, 2." in lines
    assert lines.count("Parameters left: off by at most 0.4% of the uncut network's.") == 2


def test_a_cell_with_fewer_networks_says_so(tmp_path: Path) -> None:
    fill(tmp_path / "cache")
    for seed in (1, 2):
        (tmp_path / f"cache/mnist/seed{seed}/equal-30-l2.json").unlink()
    for seed in SEEDS:
        (tmp_path / f"cache/mnist/seed{seed}/equal-90-l2.json").unlink()
    assert "| Torch-Pruning L2 | 94.40 (n = 1) |  |" in table(tmp_path)


def test_results_of_other_networks_do_not_count_and_old_ones_are_counted(tmp_path: Path) -> None:
    fill(tmp_path / "cache", state="older")
    assert "24 of our results are of an older state of the package than the present one." in table(tmp_path)
    fill(tmp_path / "cache", weights="other")
    assert not any(line.startswith("| Torch-Pruning") for line in table(tmp_path))


@pytest.mark.parametrize(("lost", "verdict"), [(0.001, "met"), (0.02, "**not met**")])
def test_goals_on_mnist(tmp_path: Path, lost: float, verdict: str) -> None:
    fill(tmp_path / "cache", lost=lost)
    lines = table(tmp_path)
    got = f"{99.5 - 100 * lost:.2f}"
    assert f"- 30 %: {got} %, goal ≥ 99.20 %: {verdict}" in lines
    assert f"- 30 %: {got} %, goal ≥ 99.30 %: {verdict}" in lines
    assert f"- 90 %: {got} %, goal ≥ 98.60 %: {verdict}" in lines


@pytest.mark.parametrize(("lost", "verdict"), [(0.019, "met"), (0.021, "**not met**")])
def test_the_goal_on_cifar_is_half_of_the_best_peers_loss(tmp_path: Path, lost: float, verdict: str) -> None:
    fill(tmp_path / "cache", task="cifar10", lost=lost)
    found = [line for line in table(tmp_path) if line.startswith("- 90 %: ours loses")]
    assert len(found) == 2
    assert f"ours loses {100 * lost:.2f} points" in found[0]
    assert "re-estimated) 4.00," in found[0]
    assert found[0].endswith(f": {verdict}")


def test_no_goal_where_ours_was_not_run() -> None:
    assert goals("mnist", "equal", {(30, "l2"): {0: {"as_cut": 0.9, "reestimated": 0.9}}}, 0.99) == []


def test_a_cell_is_mean_and_deviation_in_percent() -> None:
    assert cell([0.5]) == "50.00"
    assert cell([]) == ""
    assert cell([0.1, 0.2, 0.3]) == "20.00 ± 10.00"
