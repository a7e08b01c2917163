"""The figures are drawn from tracked measurements, in both themes, and are what is tracked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.figures import spectra, two_starts
from experiments.figures.__main__ import FIGURES
from experiments.figures.peers import PAGE, ROWS, read
from experiments.figures.style import FOLDER, PALETTES, save


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_the_same_each_time_in_both_themes_and_is_small(name: str, tmp_path: Path) -> None:
    first, second = (save(name, FIGURES[name], tmp_path / each) for each in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for path, palette in zip(first, PALETTES.values(), strict=True):
        tracked = FOLDER / path.name
        assert palette.text in path.read_text("utf-8")
        assert palette.text in tracked.read_text("utf-8")
        assert tracked.stat().st_size < 300_000


def test_the_data_of_two_starts_are_taken_from_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = {"step": 0, "parameters": 50}
    for name, start in (("0", 90), ("1", 10)):
        history = {"initial": {**event, "parameters": start}, "events": [{**event, "step": 5}]}
        (tmp_path / name).mkdir()
        result = {"history": history, "steps": 9, "test_acc": 0.5, "seconds": 1.2}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(two_starts, "DATA", tmp_path / "out.json")
    two_starts.main(tmp_path)
    runs = json.loads((tmp_path / "out.json").read_text("utf-8"))["runs"]
    assert [run["parameters"] for run in runs] == [[10, 50, 50], [90, 50, 50]]
    assert runs[0]["steps"] == [0, 5, 9]


def test_spectra_are_computed_before_and_after_a_cut_to_a_tenth() -> None:
    found = spectra.compute(epochs=1)
    assert found["after"]["parameters"] <= found["before"]["parameters"] // 10
    assert {name: len(values) for name, values in found["before"]["spectra"].items()} == {"0": 256, "2": 256}
    assert all(abs(sum(v**2 for v in values) - 1) < 0.01 for values in found["after"]["spectra"].values())


@pytest.mark.parametrize("network", ["mnist", "cifar10"])
def test_the_page_of_the_comparison_has_every_row_that_is_drawn(network: str) -> None:
    _, uncut, tables = read(PAGE.read_text("utf-8"), network)
    for place, table in enumerate(tables):
        assert all(len(table[rows[place]]) == 4 for rows in ROWS.values())
        assert max(table[ROWS["EvolveNet"][place]]) <= uncut + 0.1
