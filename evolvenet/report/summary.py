"""The result of a run as rows, and as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from evolvenet.engine.history import History
from evolvenet.engine.history_table import cost_rows, sizes_of, width_rows


def summary_rows(history: History, facts: Mapping[str, str] | None = None) -> list[tuple[str, str, str, str]]:
    """The result of a run as rows of name, start, end, change.

    Parameters and multiply-accumulates first, then every width, then `facts` (in the column of the end).

    >>> from evolvenet.engine.history import Event
    >>> start = Event(0, (), {"hidden": 64}, 900, 900, 800, 0.0)
    >>> end = Event(100, (), {"hidden": 16}, 900, 250, 200, 0.1)
    >>> summary_rows(History(start, [end]))[2]
    ('width hidden', '64', '16', '÷ 4.0')
    """
    rows = [*cost_rows(history), *_labelled(history)]
    return rows + [(name, "", text, "") for name, text in (facts or {}).items()]


def _labelled(history: History) -> list[tuple[str, str, str, str]]:
    names = sizes_of(history)
    return [
        (row[0] if name in history.ranks else f"width {row[0]}", *row[1:])
        for name, row in zip(names, width_rows(history, names), strict=True)
    ]


def summary_table(history: History, title: str, facts: Mapping[str, str] | None = None) -> Table:
    """The summary for a terminal: `rich.print(summary_table(history, "my run"))`."""
    # As text: rich would parse brackets in a plain string as styles.
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for heading in ("start", "end", "change"):
        table.add_column(heading, justify="right")
    rows = summary_rows(history, facts)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends_group = following is None or any(
            row[0].startswith(group) != following[0].startswith(group) for group in ("width ", "rank of ")
        )
        table.add_row(*map(Text, row), end_section=ends_group)
    return table
