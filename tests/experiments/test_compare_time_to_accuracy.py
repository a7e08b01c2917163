"""Time to accuracy on the digits: results out, resumed, the same widths from both starts, and what the page makes of them."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # its mend comes before torchvision

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from experiments.compare import time_to_accuracy as compare
from experiments.compare.time_to_accuracy_subjects import Characters, Subject, Ways, subject
from experiments.compare.time_to_accuracy_table import first_crossing, write_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run has left its results and its page."""
    path = tmp_path_factory.mktemp("time")
    run(path)
    return path


def run(path: Path) -> None:
    chosen = ["--only", "digits", "--kept", "30", "--widths", "equal", "--trained", str(path / "trained")]
    compare.main([*chosen, "--cache", str(path / "cache"), "--page", str(path / "page.md")])


def results(path: Path) -> dict[str, dict]:
    names = "cut", "polished", "scratch"
    return {name: json.loads((path / f"cache/digits/seed0/30-equal-{name}.json").read_text("utf-8")) for name in names}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_both_starts_have_the_same_widths_and_curves_that_end_at_the_first_crossing(folder: Path) -> None:
    found = results(folder)
    assert found["cut"]["sizes"] == found["scratch"]["sizes"] == found["polished"]["sizes"]
    # As many for each rate that was tried.
    assert found["polished"]["polish_steps"] >= 20
    assert found["polished"]["seconds"].keys() - found["cut"]["seconds"].keys() == {"polish"}
    for record in found.values():
        for climb in record["climbs"]:
            assert climb["curve"][0][0] == 0
            assert climb["curve"][-1][0] == climb["crossed"].get("1", {"step": climb["steps"]})["step"]
            for margin, crossed in climb["crossed"].items():
                reached = record["uncut"]["watched"] - float(margin) / 100
                assert crossed["step"] == next(step for step, accuracy in climb["curve"] if accuracy >= reached)
            assert all(before[0] < after[0] for before, after in pairwise(climb["curve"]))


def test_new_weights_have_the_widths_and_share_nothing_with_the_cut_network(folder: Path) -> None:
    options = compare._options(["--trained", str(folder / "trained"), "--cache", str(folder / "cache")])
    study = compare.Study(subject("digits", 0, Path(), folder / "trained"), options)
    sizes = results(folder)["cut"]["sizes"]
    cut, fresh = study.cut(sizes, folder / "cache/digits/seed0/30-equal.pt"), study.scratch(sizes)
    assert parameters(cut) == parameters(fresh) == results(folder)["cut"]["parameters"]
    pairs = zip(cut.parameters(), fresh.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs if one.dim() > 1)
    assert study.subject.accuracy(cut, "watched") == results(folder)["cut"]["climbs"][0]["curve"][0][1]


def test_a_second_run_makes_nothing_again(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cache/digits/seed0/*")}
    run(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cache/digits/seed0/*")} == before


def test_the_images_that_are_watched_are_not_judged(folder: Path) -> None:
    parts = subject("digits", 0, Path(), folder / "trained")._parts  # pyright: ignore[reportAttributeAccessIssue]
    pixels = [{image.numpy().tobytes() for image in images} for images, _ in parts.values()]
    assert len(pixels[0] & pixels[1]) == 0


def test_the_language_model_goes_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3000, encoding="utf-8")
    of: Subject = subject("gpt2", 0, tmp_path, tmp_path, tiny=True)
    assert isinstance(of, Characters)
    of.ways = Ways((3,), (1e-3,), (1e-3,), (0.4, 0.4), watches=3)
    study = compare.Study(of, compare._options(["--cache", str(tmp_path / "cache")]))
    study.options.made_of = {"state": "now", "commit": "", "threads": 1}
    lines = list(study.run(50, "equal"))
    assert len(lines) >= 3
    made = compare.read(tmp_path / "cache/gpt2/seed0/50-equal-scratch.json", {})
    assert made is not None
    assert parameters(study.scratch(made["sizes"])) == made["parameters"]
    cut, polished = (
        study.cut(made["sizes"], tmp_path / f"cache/gpt2/seed0/50-equal{end}.pt") for end in ("", "-polished")
    )
    assert not any(torch.equal(one, two) for one, two in zip(cut.parameters(), polished.parameters(), strict=True))


def record(start: str, climbs: list[tuple[int, dict[str, int]]], seed: int = 0) -> dict:
    crossings = [
        {m: {"step": step, "seconds": step / 10, "judged": 0.9} for m, step in crossed.items()} for _, crossed in climbs
    ]
    return {
        **{"task": "digits", "seed": seed, "kept": 10, "widths": "own", "start": start, "commit": "abc", "threads": 1},
        **{"uncut": {"watched": 0.95, "judged": 0.95}, "uncut_parameters": 1000, "parameters": 100},
        "seconds": {"trace": 1.0, "prune": 4.0},
        "climbs": [
            {"steps": steps, "rate": 0.1, "seconds_a_step": 0.1, "curve": [[0, 0.1]], "crossed": crossed}
            for (steps, _), crossed in zip(climbs, crossings, strict=True)
        ],
    }


def test_the_fewest_steps_of_all_cycles_count() -> None:
    climbs = [(10, {"5": 9}), (20, {"5": 8, "1": 19}), (20, {"1": 17})]
    found = record("cut", climbs)
    assert [(first_crossing(found, margin) or {}).get("step") for margin in (5, 2, 1)] == [8, None, 17]


@pytest.mark.parametrize(("scratch", "verdict"), [(170, "10.0 times fewer steps (goal 10): met"), (169, "9.9 times")])
def test_the_page_counts_the_cut_and_judges_the_goal(tmp_path: Path, scratch: int, verdict: str) -> None:
    place = tmp_path / "cache/digits/seed0"
    place.mkdir(parents=True)
    for start, step in (("cut", 17), ("scratch", scratch)):
        text = json.dumps(record(start, [(200, {"1": step})]))
        (place / f"10-own-{start}.json").write_text(text, encoding="utf-8")
    write_page(tmp_path / "page.md", tmp_path / "cache")
    page = (tmp_path / "page.md").read_text("utf-8")
    assert verdict in page
    assert "| 1 point | cut, then trained on | 17 | 1.7 | 6.7 | 67 | -5.00 |" in page
    assert ("**missed**" in page) == (scratch == 169)
    assert "| from scratch | 0 | 200 | 0.1 | 10.00 | 10.00 | 0 |" in page


def test_steps_of_the_polish_are_said_beside_those_with_labels(tmp_path: Path) -> None:
    place = tmp_path / "cache/digits/seed0"
    place.mkdir(parents=True)
    polished = {**record("polished", [(200, {"1": 0})]), "polish_steps": 40}
    polished["climbs"][0]["seconds_a_step"] = None
    for start, found in (("polished", polished), ("scratch", record("scratch", [(200, {"1": 170})]))):
        (place / f"10-own-{start}.json").write_text(json.dumps(found), encoding="utf-8")
    write_page(tmp_path / "page.md", tmp_path / "cache")
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "within 1: 0 steps against 170 (goal 10): met; with the 40 steps of the polish" in page
    assert "which see no label, 40 steps, 4.2 times fewer" in page
    # 5 seconds of the cut are 50 steps of the same widths from scratch.
    assert "| 1 point | cut, polished, then trained on | 0 | 0.0 | 5.0 | 50 |" in page
