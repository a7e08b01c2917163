"""The script that compares how widths are chosen and fitted, on the digits."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from experiments.compare import allocation
from experiments.compare.networks import CALIBRATION, TaskData, tasks


def test_results_are_kept_and_a_page_is_written(tmp_path: Path) -> None:
    arguments = ["--only", "digits", "--seeds", "0", "--ratios", "60", "--methods", "equal", "equal0", "task"]
    arguments += ["--cache", str(tmp_path), "--table", str(tmp_path / "page.md"), "--test"]
    allocation.main(arguments)
    files = {file.stem: file for file in tmp_path.glob("digits/seed0/allocation-60-*.json")}
    assert set(files) == {"allocation-60-equal", "allocation-60-equal0", "allocation-60-task"}
    found = {name: json.loads(file.read_text("utf-8")) for name, file in files.items()}
    assert found["allocation-60-equal"]["sizes"] == found["allocation-60-equal0"]["sizes"]
    assert all(0 < record["validation"] <= 1 and 0 < record["test"] <= 1 for record in found.values())
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "## digits" in text
    assert "| equal widths, fitted without rounds |" in text
    assert "Seconds of one core" in text
    written = {name: file.stat().st_mtime_ns for name, file in files.items()}
    allocation.main(arguments)
    assert {name: file.stat().st_mtime_ns for name, file in files.items()} == written


def test_validation_images_are_training_images_that_no_cut_sees() -> None:
    data = TaskData.open(tasks()["digits"], Path())
    network = allocation.Network(data, 0, torch.nn.Identity())
    chosen, labels = network.validation.test
    assert len(chosen) == len(labels) == len(data.train.labels) - CALIBRATION
    seen = torch.cat(network.images).flatten(1)
    assert torch.cat([label for _, label in network.pairs]).shape == (CALIBRATION,)
    assert torch.cdist(chosen.flatten(1), seen).min() > 0
