"""`evolvenet report`: the report of a run, written anew from its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from evolvenet.cli.runs import result_of
from evolvenet.engine.history import History
from evolvenet.report import summary_rows, summary_table
from evolvenet.report.run_result import front_table, result_facts, result_title, write_result


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
    history, title, facts = History.from_dict(result["history"]), result_title(result, folder), result_facts(result)
    path = write_result(result, folder)
    rows = [dict(zip(("name", "start", "end", "change"), row, strict=True)) for row in summary_rows(history, facts)]
    front = result.get("front") or []
    tables = [summary_table(history, title, facts), *([front_table(front)] if front else [])]
    return RunReport({"report": str(path), "title": title, "summary": rows}, Group(*tables, Text(f"report: {path}")))
