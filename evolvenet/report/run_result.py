"""The result of a run of `train.py` as page, summary and front, the same from the run itself and from `evolvenet report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # comes with Lightning
from rich.table import Table

from evolvenet.engine.history import History
from evolvenet.report.front import draw_errors
from evolvenet.report.page import write_report


def write_result(result: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and `history.png` of a run into its folder.

    Args:
        result: content of the run's `result.json`.
        folder: of the run; its name is the title where the result has none.

    Returns:
        The path of `report.html`.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    front = result.get("front") or []
    config = yaml.safe_dump(result.get("config", {}), sort_keys=False, allow_unicode=True)
    return write_report(
        History.from_dict(result["history"]),
        folder,
        result_title(result, folder),
        {"validation accuracy": result["curve"]} if result.get("curve") else {},
        result_facts(result),
        {"The front": draw_errors(front)} if front else {},
        settings={"configuration": config},
        threshold=result.get("threshold"),
        seconds=result.get("seconds"),
        made=result.get("made", {}),
    )


def result_title(result: Mapping[str, Any], folder: Path) -> str:
    """Of a run."""
    return result.get("title") or folder.resolve().name


def result_facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Accuracies on the test split, time and compressed copies of a run, as lines of its summary; what it lacks is left out."""
    front, rows = result.get("front") or [], (result.get("compression") or {}).get("rows", [])
    facts = {f"test accuracy at {point['parameters']:,}": f"{point['test_acc']:.2%}" for point in front[:-1]}
    if result.get("test_acc") is not None:
        facts["test accuracy"] = f"{result['test_acc']:.2%}"
    if result.get("seconds") is not None and result.get("steps") is not None:
        facts["time"] = f"{result['seconds']:.0f} s for {result['steps']:,} steps"
    compressed = {
        f"{row['network']} {row['state']}": f"{row['accuracy']:.2%} with {row['parameters']:,}"
        for row in rows
        if row["state"] == "+ epoch"
    }
    return {**facts, **compressed}


def front_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """The points of one run, one a line, for a terminal."""
    table = Table(title="The front", title_justify="left")
    for heading in ("parameters", "MACs", "validation", "test", "errors of 10,000", "epoch", "minutes"):
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(
            f"{point['parameters']:,}", f"{point['macs']:,}", f"{point['val_acc']:.2%}", f"{point['test_acc']:.2%}",
            f"{1e4 * (1 - point['test_acc']):.0f}", str(point["epoch"]), f"{point['seconds'] / 60:.1f}",
        )  # fmt: skip
    return table
