"""Cells of the coverage tables, from the figures that the stages of one model have noted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
RUNS = ("eval", "train", "backward")
LONGEST = 150


def figures_of(record: Record, stage: str) -> Mapping[str, Any]:
    """What a stage has found; nothing where it was not reached."""
    return record["stages"].get(stage, {})


def passed(figures: Mapping[str, Any]) -> bool:
    """Whether a model ran in all three ways."""
    return all(figures.get(run) == "yes" for run in RUNS)


def trouble(record: Record, stage: str) -> str:
    """Why a stage has no figures."""
    figures = figures_of(record, stage)
    reason = figures.get("error") or (record["stopped"] if "began" in figures else None) or "not reached"
    return f"✗ {short(reason)}"


def equal(figures: Mapping[str, Any]) -> str:
    """How far outputs were from those before, and how many widths were left out."""
    left_out = f", {figures['left_out']} left out" if figures.get("left_out") else ""
    if figures.get("grown") == 0:
        return f"nothing to grow{left_out}"
    return f"{'equal' if figures['equal'] else '✗ differs'}, {figures['difference']:.0e}{left_out}"


def short(text: str) -> str:
    """A text as a cell can hold it."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
