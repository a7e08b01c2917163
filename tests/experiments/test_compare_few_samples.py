"""The comparison with few images on the digits: results out, kept, resumed, and the page with its goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.compare import few_samples as compare
from experiments.compare import few_samples_table as table


def run(path: Path) -> None:
    chosen = ["--only", "digits", "--seeds", "0", "--images", "50", "--methods", "widths"]
    compare.main([*chosen, "--cache", str(path / "cache"), "--page", str(path / "page.md")])


def test_a_run_leaves_a_result_and_a_page_and_a_second_one_resumes(tmp_path: Path) -> None:
    run(tmp_path)
    (file,) = tmp_path.glob("cache/digits/seed0/*-*-*.json")
    found = json.loads(file.read_text("utf-8"))
    whole = json.loads((tmp_path / "cache/digits/seed0/uncut.json").read_text("utf-8"))
    assert abs(found["parameters"] / whole["parameters"] - 0.5) < 0.02
    assert (found["images"], found["method"]) == (50, "widths")
    assert found["polish_kept"] or found["polished"] == found["cut"]
    page = (tmp_path / "page.md").read_text("utf-8")
    assert f"| widths | {100 * found['cut']:.2f} |" in page
    assert f"| **widths, polished** | {100 * found['polished']:.2f} |" in page
    changed = file.stat().st_mtime_ns
    run(tmp_path)
    assert file.stat().st_mtime_ns == changed


def test_images_move_by_whole_pixels_with_their_borders_repeated() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 2, 5, 6)
    padded = torch.nn.functional.pad(images, (2,) * 4, mode="replicate")
    places = set()
    for image, whole, original in zip(compare.moved(images, 2, True), padded, images, strict=True):
        fitting = [
            (row, column, flip)
            for flip in (False, True)
            for row in range(5)
            for column in range(5)
            if torch.equal(image, (whole.flip(-1) if flip else whole)[:, row : row + 5, column : column + 6])
        ]
        assert len(fitting) == 1, original
        places.add(fitting[0])
    assert len(places) > 25
    assert torch.equal(compare.moved(images, 0, False), images)


def record(polished: float, seconds: float = 20.0) -> dict[int, dict[str, float]]:
    return {0: {"polished": polished, "seconds_to_cut": seconds, "seconds_to_polish": seconds}}


@pytest.mark.parametrize(
    ("polished", "seconds", "expected"),
    [
        (0.9905, 20.0, "goal 99.0: met"),
        (0.985, 20.0, "goal 99.0: **missed by 0.50**"),
        (0.9905, 40.0, "met; 80 s of one thread, of the 120 that two cores have in 60 s"),
        (0.9905, 62.0, "met; **124 s of one thread**, more than the 120 that two cores have in 60 s"),
    ],
)
def test_goals_are_met_by_the_better_of_two_ways(polished: float, seconds: float, expected: str) -> None:
    found = {(95.0, 1024, "widths"): record(polished, seconds), (95.0, 1024, "both"): record(0.9, 1.0)}
    (line,) = (line for line in table.goals("mnist", found, 1024) if line.startswith("- "))
    assert line.endswith(expected)
    assert "widths, polished" in line
