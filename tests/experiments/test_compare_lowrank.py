"""The comparison of widths and ranks on the digits: results out, kept, resumed, and the goals on its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet.measurement.cost import macs, parameters
from experiments.compare import lowrank as compare
from experiments.compare.copies import copied
from experiments.compare.lowrank_methods import MACS, METHODS, PARAMETERS, Case
from experiments.compare.lowrank_networks import tasks
from experiments.compare.lowrank_table import goals, write_page
from experiments.compare.networks import TaskData, uncut

RUN = ("svd_plain", "peer_svd")
COMPRESSING = ("both", "widths")
"""They call what has tests of its own, and takes longer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run has left its results and its page."""
    path = tmp_path_factory.mktemp("lowrank")
    run(path)
    return path


@pytest.fixture(scope="module")
def data() -> TaskData:
    return TaskData.open(tasks()["digits"], Path())


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ROUNDS", (1, 2))


def run(path: Path, *more: str) -> None:
    chosen = ["--only", "digits", "--seeds", "0", "--levels", "parameters-50", "--methods", *RUN, *more]
    compare.main([*chosen, "--cache", str(path / "cache"), "--page", str(path / "page.md")])


def results(path: Path) -> dict[str, dict]:
    found = path.glob("cache/digits/seed0/parameters-50-*.json")
    return {file.stem.rpartition("-")[2]: json.loads(file.read_text("utf-8")) for file in found}


def test_a_run_leaves_results_within_the_limit_and_a_page_that_shows_them(folder: Path) -> None:
    found = results(folder)
    assert set(found) == set(RUN)
    page = (folder / "page.md").read_text("utf-8")
    for name, record in found.items():
        assert record["parameters"] <= 0.5
        assert f"| {METHODS[name].label} | {100 * record['accuracy']:.2f} |" in page
        assert f"| {METHODS[name].label} | {100 * record['after_epoch']:.2f} |" in page


def test_a_second_run_resumes_and_other_code_is_run_again_but_not_the_peers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("cache/digits/seed0/*")}

    before = times()
    run(folder)
    assert times() == before
    monkeypatch.setattr(compare, "state", lambda: "later")
    run(folder, "--one-shot")
    assert {name for name, time in times().items() if time != before[name]} == {"parameters-50-svd_plain.json"}


@pytest.mark.parametrize("cost", [PARAMETERS, MACS])
@pytest.mark.parametrize(
    "name", [name for name in METHODS if METHODS[name].needs == "torch" and name not in COMPRESSING]
)
def test_every_kind_keeps_to_a_limit_and_leaves_a_network_that_trains(
    folder: Path, data: TaskData, name: str, cost: str
) -> None:
    model, _ = uncut(data, 0, folder / "cache/digits/seed0")
    whole = Case(data, 0, copied(model), cost, 0)
    case = Case(data, 0, copied(model), cost, round(0.6 * whole.cost_of(model)))
    METHODS[name].run(case)
    assert 0 < case.cost_of(case.model) <= case.limit
    case.model(data.example).sum().backward()


def test_a_method_that_cannot_reach_the_limit_is_recorded_with_the_reason(folder: Path, data: TaskData) -> None:
    model, _ = uncut(data, 0, folder / "cache/digits/seed0")
    answers = compare.outputs(model, data)
    found = compare.result(data, 0, METHODS["svd_plain"], model, answers, PARAMETERS, 0.9999, epoch=False)
    assert set(found) == {"refused"}


def test_measures_are_those_of_the_plain_formulas(data: TaskData) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    half = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False), nn.Linear(2, 10)).eval()
    y, z = (model(data.test[0]).detach() for model in (whole, half))
    found = compare.measured(half, whole, data, compare.outputs(whole, data))
    assert found["error"] == pytest.approx(float((z - y).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-4)
    assert found["accuracy"] == pytest.approx(data.accuracy(half))
    assert found["parameters"] == parameters(half) / parameters(whole)
    assert found["macs"] == macs(half, data.example) / macs(whole, data.example)
    assert found["latency_1"] > 0


def record(method: str, level: str, **figures: float) -> dict:
    return {"method": method, "level": level, "weights": "w", "commit": "c", **figures}


def test_goals_are_met_and_missed_as_they_read() -> None:
    seeds = {0: {"accuracy": 0.8}}
    widths, close, worse = (
        {"error": 0.1, "accuracy": 0.70},
        {"error": 0.1, "accuracy": 0.74},
        {"error": 0.11, "accuracy": 0.76},
    )
    results = {
        ("macs-70", "widths"): {0: record("widths", "macs-70", **widths)},
        ("macs-70", "both"): {0: record("both", "macs-70", **close)},
        ("parameters-90", "widths"): {0: record("widths", "parameters-90", **widths)},
        ("parameters-90", "both"): {0: record("both", "parameters-90", **worse)},
        ("latency-30", "auto"): {0: record("auto", "latency-30", latency_64=0.9)},
    }
    training = {"widths": [0.9, 0.9], "both": [0.902, 0.902]}
    verdicts = {goal: verdict for goal, _, verdict in goals({"cifar10": (seeds, results)}, training)}
    assert verdicts["output error never more than 1.02 times that of widths alone"] == "**missed**"
    assert verdicts["CIFAR-10, −70 % of MACs: at least 2.5 points above widths alone"] == "met"
    assert verdicts["CIFAR-10, −90 % of parameters: at least 5 points above widths alone"] == "met"
    assert verdicts["no result of a limit on latency slower than the uncut network"] == "met"
    (training_goal,) = (goal for goal in verdicts if goal.startswith("in training"))
    assert verdicts[training_goal] == "**missed**"
    assert verdicts["CIFAR-10, −50 % of MACs: within 1.2 points of uncut"] == ""


def test_results_of_another_trained_network_are_left_out_of_the_page(tmp_path: Path) -> None:
    place = tmp_path / "cache/mnist/seed0"
    place.mkdir(parents=True)
    (place / "uncut.json").write_text(json.dumps({"accuracy": 0.99, "parameters": 10, "epochs": 1, "weights": "new"}))
    (place / "parameters-50-svd.json").write_text(json.dumps(record("svd", "parameters-50", error=0.1)))
    write_page(tmp_path / "page.md", tmp_path / "cache")
    assert "ranks, SVD, whitened |" not in (tmp_path / "page.md").read_text("utf-8")


def test_networks_of_the_comparison_have_the_shapes_of_their_data() -> None:
    for task in tasks().values():
        channels, size = len(task.moments[0]), 32 if task.name == "cifar10" else 28
        model = task.build()
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
        assert evolvenet.trace(model, torch.zeros(2, channels, size, size)).coverage > 0.99
