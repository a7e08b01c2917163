"""Reasons why a width keeps its size: what failed, and at which line of the model's code."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
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


def running_line() -> str:
    """The line of the model's code that runs the present op: the innermost one outside torch; "" if no code but torch's does.

    For rules, which run as part of the op. The frames of EvolveNet further out, which have called the model, end the search.
    """
    frame = inspect.currentframe()
    while frame is not None and _is_own(frame.f_code.co_filename):
        frame = frame.f_back
    while frame is not None and not _is_own(file := frame.f_code.co_filename):
        if not _is_of_torch(file):
            place = "/".join(Path(file).parts[-2:])
            return f" at {place}:{frame.f_lineno}: {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return ""


@cache
def _is_own(file: str) -> bool:
    return PACKAGE in Path(file).parents


@cache
def _is_of_torch(file: str) -> bool:
    return "torch" in Path(file).parts
