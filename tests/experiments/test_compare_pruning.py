"""The comparison's script on the digits: results out, kept, and run again only where what they are made of has changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import evolvenet
from experiments.compare import pruning as compare
from experiments.compare.copies import copied, fingerprint
from experiments.compare.networks import TaskData, reestimate, tasks, uncut
from experiments.data.images import Split

PEER, OURS = "random", "weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run has left its results and its table."""
    path = tmp_path_factory.mktemp("compare")
    run(path)
    return path


@pytest.fixture(scope="module")
def data() -> TaskData:
    return TaskData.open(tasks()["digits"], Path())


def run(path: Path) -> None:
    chosen = ["--only", "digits", "--ratios", "50", "--methods", PEER, OURS, "--allocations", "equal"]
    compare.main([*chosen, "--cache", str(path / "cache"), "--table", str(path / "table.md")])


def results(path: Path) -> dict[str, Path]:
    return {file.stem.rpartition("-")[2]: file for file in path.glob("cache/digits/seed0/*-*-*.json")}


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_every_result_has_the_same_sizes_and_about_half_of_the_parameters(folder: Path) -> None:
    found = [read(path) for path in results(folder).values()]
    whole = read(folder / "cache/digits/seed0/uncut.json")["parameters"]
    assert {record["method"] for record in found} == {PEER, OURS}
    assert all(record["sizes"] == found[0]["sizes"] for record in found)
    assert all(abs(record["parameters"] / whole - 0.5) <= 0.01 for record in found)
    assert all(0 <= record[what] <= 1 for record in found for what in ("as_cut", "reestimated", "after_epoch"))


def test_the_table_shows_them(folder: Path) -> None:
    table = (folder / "table.md").read_text("utf-8")
    for method, what, label in [
        ("random", "reestimated", "random + BatchNorm re-estimated"),
        ("random", "after_epoch", "random"),
    ]:
        shown = re.search(rf"^\| {re.escape(label)} \| ([\d.]+) \|$", table, re.MULTILINE)
        assert shown is not None
        assert shown[1] == f"{100 * read(results(folder)[method])[what]:.2f}"


def test_a_second_run_resumes(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cache/digits/seed0/*")}
    run(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cache/digits/seed0/*")} == before


def test_other_code_is_run_again_but_not_the_peers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: path.stat().st_mtime_ns for name, path in results(folder).items()}
    monkeypatch.setattr(compare, "state", lambda: "later")
    run(folder)
    changed = {name for name, path in results(folder).items() if path.stat().st_mtime_ns != before[name]}
    assert changed == {OURS}
    assert read(results(folder)[OURS])["state"] == "later"


def test_results_of_another_trained_network_are_run_again(folder: Path) -> None:
    path = results(folder)["random"]
    path.write_text(json.dumps({**read(path), "weights": "other"}), "utf-8")
    run(folder)
    assert read(path)["weights"] == read(folder / "cache/digits/seed0/uncut.json")["weights"]


def test_the_uncut_network_is_trained_once_and_comes_back_as_it_was(folder: Path, data: TaskData) -> None:
    model, record = uncut(data, 0, folder / "cache/digits/seed0")
    assert fingerprint(model) == record["weights"]
    assert data.accuracy(model) == record["accuracy"] > 0.5


def test_training_sees_the_same_images_in_the_same_order(data: TaskData) -> None:
    data = replace(data, train=Split(data.train.images[:128], data.train.labels[:128]))
    start = data.task.build()
    one, same, other = copied(start), copied(start), copied(start)
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        data.fit(model, seed, 1, 1e-3, 0.05)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_the_fingerprint_depends_on_every_tensor(data: TaskData) -> None:
    model = data.task.build()
    before = fingerprint(model)
    assert fingerprint(copied(model)) == before
    for name, tensor in model.state_dict().items():
        tensor.flatten()[-1:].add_(1)
        assert fingerprint(model) != before, name
        before = fingerprint(model)


def test_batch_norm_is_re_estimated_as_the_mean_over_batches() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    batches = [torch.randn(4, 1, 5, 5) + shift for shift in (0.0, 3.0)]
    inside = [model[0](batch).detach() for batch in batches]
    model(torch.randn(8, 1, 5, 5) * 7)
    reestimate(model, batches)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inside]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in inside]).mean(0))
    assert norm.momentum == 0.1
    assert not model.training


def test_calibration_images_are_plain_training_images(data: TaskData) -> None:
    images = torch.cat(data.calibration(0, 100))
    whole = data.task.normalise(data.train.images).flatten(1)
    assert images.shape == (100, 1, 8, 8)
    assert all((whole == image.flatten()).all(1).any() for image in images)
    assert not torch.equal(images, torch.cat(data.calibration(1, 100)))


@pytest.mark.parametrize("name", list(tasks()))
def test_moments_and_networks_fit_the_images(name: str) -> None:
    task = tasks()[name]
    channels = len(task.moments[0])
    images = torch.randint(0, 256, (2, channels, 28, 28), dtype=torch.uint8)
    assert task.build()(task.normalise(images)).shape == (2, 10)


def test_a_method_is_left_out_where_its_library_is_not_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    method = compare.Method(compare.at_random, needs="not_installed_anywhere")
    monkeypatch.setitem(compare.METHODS, "random", method)
    results(tmp_path)["random"].unlink()
    run(tmp_path)
    assert "random" not in results(tmp_path)


@pytest.mark.parametrize("method", [compare.ours_by_weights, compare.ours])
def test_own_allocation_is_the_packages_and_keeps_to_the_count(
    folder: Path, data: TaskData, method: Callable[[compare.Case], evolvenet.WidthGraph]
) -> None:
    model, _ = uncut(data, 0, folder / "cache/digits/seed0")
    graph = evolvenet.trace(model, data.example)
    target = graph.parameters // 2
    after = method(compare.Case(data, 0, copied(model), graph, target, None))
    assert 0.9 * target < after.parameters <= target
