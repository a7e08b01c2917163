"""The coverage script's part about families of the transformers library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import evolvenet
from experiments.coverage.families import FAMILIES
from experiments.coverage.families.family import FFN, HEADS, KINDS, PLACES, STREAM
from experiments.coverage.family_checks import widths_of_kind
from experiments.coverage.family_table import family_lines, is_whole
from experiments.coverage.run import main

CUT = {"ok": True, "widths": 2, "eval": "yes", "train": "yes", "backward": "yes", "generate": "yes", "loaded": "plain"}
SAME = {"ok": True, "equal": True, "difference": 0.0}


def record(**stages: object) -> dict[str, object]:
    found = {"model": {"parameters": 1000}, "trace": {"ok": True, "trace_seconds": 1.0}, "grow": SAME, "permute": SAME}
    return {"name": "transformers/gpt2", "stopped": None, "stages": {**found, **stages}}


def test_there_are_forty_families_and_each_names_kinds_of_the_table() -> None:
    assert len(FAMILIES) >= 40
    for name, family in FAMILIES.items():
        assert family.kinds, name
        assert set(family.kinds) <= set(KINDS), name


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_kinds_of_widths_are_told_apart(name: str) -> None:
    family = FAMILIES[name]
    model = family.make().eval()
    sizes = {}
    for heads in (True, False):
        graph = evolvenet.trace(model, family.inputs(1, torch.float32), family.output, heads=heads)
        sizes[heads] = {kind: {width.size for width in widths_of_kind(graph, kind, family)} for kind in family.kinds}
    assert sizes[True] == {FFN: {128}, HEADS: {4}, PLACES: set(), STREAM: {64}}
    assert sizes[False] == {FFN: {128}, HEADS: set(), PLACES: {16}, STREAM: {64}}


def test_a_family_is_whole_when_every_kind_is_cut_and_used() -> None:
    kinds = dict.fromkeys(FAMILIES["gpt2"].kinds, CUT)
    assert is_whole("gpt2", record(**kinds))
    for wrong in ({"ok": False}, {"backward": "raised"}, {"generate": "other words"}, {"loaded": "RecordError: no"}):
        assert not is_whole("gpt2", record(**kinds | {HEADS: {**CUT, **wrong}}))
    assert not is_whole("gpt2", record(**kinds | {"grow": {"ok": True, "equal": False}}))


def test_the_table_says_why_a_kind_is_not_cut() -> None:
    kinds = {**dict.fromkeys(FAMILIES["gpt2"].kinds, CUT), HEADS: {"ok": False, "error": "RuntimeError: frozen here"}}
    lines = family_lines({"gpt2": record(**kinds)})  # type: ignore[dict-item]
    row = next(line for line in lines if line.startswith("| gpt2 "))
    assert "✗ RuntimeError: frozen here" in row
    assert any("**0 of" in line for line in lines)


def test_a_family_goes_through_all_of_it(tmp_path: Path) -> None:
    main(
        ["transformers/distilbert", "--only", "evolvenet", "--cache", str(tmp_path), "--table", str(tmp_path / "t.md")]
    )
    text = (tmp_path / "t.md").read_text("utf-8")
    assert "**1 of" in text, next(line for line in text.splitlines() if line.startswith("| distilbert"))
