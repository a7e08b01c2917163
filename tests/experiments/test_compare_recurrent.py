"""The comparison of units of each recurrent layer with the same units in all writes its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import evolvenet
from experiments.compare import recurrent


def test_the_page_has_a_row_for_each_kind_of_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRAINING": 4, "HIDDEN": 8, "INPUTS": 64, "STEPS": 6, "CUTS": (50,)}.items():
        monkeypatch.setattr(recurrent, name, value)
    recurrent.main(["--seeds", "0", "1", "--page", str(tmp_path / "page.md")])
    rows = [
        line
        for line in (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()
        if "layer" in line and "|" in line
    ]
    assert [row.split("|")[1].strip() for row in rows] == [
        "the same units in all layers, no data", "the same units in all layers, fitted",
        "units of each layer, no data", "units of each layer, fitted",
    ]  # fmt: skip


def test_a_graph_without_parts_keeps_the_same_units_in_all_layers() -> None:
    torch.manual_seed(0)
    model = recurrent.Filter()
    graph = evolvenet.trace(model, torch.zeros(2, 3, recurrent.CHANNELS))
    tied = recurrent.without_parts(graph)
    assert (graph.widths["steps"].parts, tied.widths["steps"].parts) == (3, 1)
    first, second = (model.steps.get_parameter(f"weight_ih_l{layer}").detach().clone() for layer in (1, 2))
    evolvenet.prune(model, tied, {"steps": 10})
    kept = [
        [int((before == row[0]).any(1).nonzero()[0]) for row in model.steps.get_parameter(name)[:10]]
        for before, name in ((first, "weight_ih_l1"), (second, "weight_ih_l2"))
    ]
    assert kept[0] == kept[1]
