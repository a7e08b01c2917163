"""The coverage script: two small models in, the table and its figures out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import evolvenet
from experiments.coverage.checks import Coarsest, distance, grown_size, pruned_size
from experiments.coverage.run import main
from experiments.coverage.subjects import subjects

NAMES = ("own/glu", "own/group_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run over both models has left its records and its table."""
    path = tmp_path_factory.mktemp("coverage")
    run(path)
    return path


def run(path: Path) -> None:
    main([*NAMES, "--only", "evolvenet", "--cache", str(path / "cache"), "--table", str(path / "table.md")])


def rows(path: Path) -> dict[str, list[str]]:
    """Cells of the table's lines by their first cell."""
    lines = (path / "table.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return {line[0]: line[1:] for line in cells}


def test_the_table_shows_what_was_found(folder: Path) -> None:
    for name in NAMES:
        model = subjects()[name].make()
        graph = evolvenet.trace(model, subjects()[name].inputs(1, torch.float32))
        cells = rows(folder)[name.partition("/")[2]]
        assert cells[0] == f"{sum(p.numel() for p in model.parameters()):,}"
        assert cells[2] == f"{len(graph.resizable)} of {len(graph.widths)}"
        assert cells[3] == f"{graph.coverage:.1%}"
        assert cells[4] == "", "widths of the model's inputs and outputs are left out"
        assert re.fullmatch(r"yes, \d+% left", cells[5])
        assert cells[6].startswith("equal, ")
        assert cells[7].startswith("equal, ")


def test_totals_count_only_what_ran(folder: Path) -> None:
    assert rows(folder)["own"][1:6] == ["2"] * 5
    assert rows(folder)["timm"][1:6] == ["0"] * 5
    assert rows(folder)["resnet50"][0] == "not run"


def test_a_second_run_resumes(folder: Path) -> None:
    records = {path: path.stat().st_mtime_ns for path in folder.glob("cache/evolvenet/own/*.json")}
    assert len(records) == len(NAMES)
    run(folder)
    assert {path: path.stat().st_mtime_ns for path in records} == records


def test_a_result_of_other_code_is_run_again(folder: Path) -> None:
    path = folder / "cache/evolvenet/own/glu.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "state": "older"}), "utf-8")
    run(folder)
    assert json.loads(path.read_text("utf-8"))["state"] != "older"


def test_sizes_are_rounded_and_keep_the_fewest_units() -> None:
    assert grown_size(evolvenet.Width("w", 10)) == 13
    assert pruned_size(evolvenet.Width("w", 10)) == 7
    assert pruned_size(evolvenet.Width("w", 2, smallest=2)) == 2
    assert pruned_size(evolvenet.Width("w", 1)) == 1


def test_outputs_that_are_not_finite_are_not_equal() -> None:
    bad, good = [torch.tensor([float("nan")])], [torch.ones(1)]
    assert distance(bad, good) == float("inf")
    with pytest.raises(ValueError, match="shape changed"):
        distance([torch.ones(2)], good)


def test_float32_inside_a_float64_model_is_seen() -> None:
    layer = nn.Linear(2, 2).double()
    with Coarsest(torch.float64) as plain:
        layer(torch.ones(1, 2, dtype=torch.float64))
    with Coarsest(torch.float64) as mixed:
        layer(torch.ones(1, 2, dtype=torch.float64)).float().double()
    assert (plain.dtype, mixed.dtype) == (torch.float64, torch.float32)
