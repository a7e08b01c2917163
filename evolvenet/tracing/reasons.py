"""Reasons why a width keeps its size: what failed, and at which line of the model's code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from traceback import FrameSummary

from evolvenet.graph.width_graph import WidthGraph, Widths

PACKAGE = Path(__file__).parents[1]
"""The folder of EvolveNet's own code."""


def frozen_for(graph: WidthGraph, reasons: Mapping[str, str]) -> WidthGraph:
    """The graph with some widths frozen: {width: reason}."""
    widths = {
        name: replace(width, frozen=reasons[name], patches=()) if name in reasons else width
        for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths))


def first_line(error: Exception) -> str:
    """The first line of an error's message.

    >>> first_line(ValueError("expected 3, got 4")), first_line(ValueError())
    ('expected 3, got 4', 'no message')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def source_line(frames: Iterable[FrameSummary]) -> str:
    """The line of the model's code among the frames of a stack: the innermost one outside torch and EvolveNet."""
    for frame in reversed(list(frames)):
        file = Path(frame.filename)
        if "torch" not in file.parts and PACKAGE not in file.parents:
            return f" at {'/'.join(file.parts[-2:])}:{frame.lineno}: {frame.line}"
    return ""
