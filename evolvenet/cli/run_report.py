"""`evolvenet report`: the report of a run, written anew from its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # comes with Lightning
from rich.console import Group
from rich.text import Text

from evolvenet.cli.runs import result_of
from evolvenet.engine.history import History
from evolvenet.report import summary_rows, summary_table, write_report


@dataclass(frozen=True)
class RunReport:
    """A report that was written.

    Args:
        data: its summary and path as plain data.
        table: for a terminal.
    """

    data: dict[str, Any]
    table: Any


def rewritten(folder: Path) -> RunReport:
    """Write `report.html` of a run anew.

    Args:
        folder: of a run of `train.py`.

    Raises:
        CommandError: if it is none.
        ReportError: if matplotlib is not installed.
    """
    result = result_of(folder)
    history = History.from_dict(result["history"])
    facts = {"test accuracy": f"{result['test_acc']:.2%}"} if result.get("test_acc") is not None else {}
    title = result.get("title") or folder.resolve().name
    curves = {"validation accuracy": result["curve"]} if result.get("curve") else {}
    path = write_report(
        history, folder, title, curves, facts, settings={"configuration": yaml.safe_dump(result.get("config", {}))},
        threshold=result.get("threshold"), seconds=result.get("seconds"), made=result.get("made", {}),
    )  # fmt: skip
    rows = [dict(zip(("name", "start", "end", "change"), row, strict=True)) for row in summary_rows(history, facts)]
    table = Group(summary_table(history, title, facts), Text(f"report: {path}"))
    return RunReport({"report": str(path), "title": title, "summary": rows}, table)
