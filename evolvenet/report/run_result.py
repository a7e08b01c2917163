"""The result of a run of `train.py` as page, summary and front, the same from the run itself and from `evolvenet report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # comes with Lightning
from rich.table import Table

from evolvenet.engine.history import History
from evolvenet.report.page import write_report
from evolvenet.report.svg import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def draw_errors(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Errors of the points of one run against parameters, both on log scales.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    figure: Figure = need("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    panel = figure.subplots()
    counts = [point["parameters"] for point in points]
    for name, color in (("val_acc", "#7f8c8d"), ("test_acc", "#2c3e50")):
        errors = [max(100 * (1 - point[name]), 1e-2) for point in points]
        panel.plot(counts, errors, "o-", color=color, label={"val_acc": "validation", "test_acc": "test"}[name])
    for point in points:
        at = (point["parameters"], max(100 * (1 - point["test_acc"]), 1e-2))
        panel.annotate(
            f"{point['parameters']:,}\n{point['test_acc']:.2%}", at, (0, -8), textcoords="offset points", ha="center", va="top",
        )  # fmt: skip
    formatter = need("matplotlib.ticker").FuncFormatter
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.margins(x=0.08, y=0.3)
    panel.xaxis.set_major_formatter(formatter(lambda value, _: f"{value:,.0f}"))
    for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        set_formatter(formatter(lambda value, _: f"{value:.2g}"))
    panel.set_xlabel("parameters")
    panel.set_ylabel("errors, %")
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    return figure
