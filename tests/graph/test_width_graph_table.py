"""The table of a `WidthGraph` that rich prints."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from evolvenet.graph.width_graph import WidthGraph, Widths
from tests.helpers.cases import CASES, graph_of


def graph_called(name: str) -> WidthGraph:
    return graph_of(next(case for case in CASES if case.name == name))


def printed(graph: WidthGraph, columns: int = 200) -> list[str]:
    """Lines of the table in a terminal of that many columns, without colours and trailing blanks."""
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(graph)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def test_every_width_has_a_line_that_a_person_reads() -> None:
    lines = printed(graph_called("embedding"), columns=300)
    cells = [line.split() for line in lines]
    assert cells[0] == ["name", "size", "parameters", "share", "ties", "frozen"]
    assert cells[2] == ["embed", "6", "162", "73.1%", "1", "produces,", "1", "consumes"]
    assert " ".join(cells[3]).startswith(
        "embed.weight[0] 20 120 0.0% 1 follows aten::embedding in embed (Embedding) looks its rows up by data at "
    )
    assert lines[-1].strip().startswith("coverage 98.4% of 193 parameters (embeddings 62.2 of 62.2%, other ")
    assert len(lines) == 3 + len(graph_called("embedding").widths)


def test_ties_are_counted_by_role() -> None:
    graph = graph_called("resnet")
    (line,) = [line for line in printed(graph) if line.split()[0] == "stem"]
    roles = [tie.role for tie in graph.widths["stem"].ties]
    counts = [roles.count(role) for role in ("produces", "consumes", "follows")]
    assert min(counts) > 1
    assert line.endswith("{} produce, {} consume, {} follow".format(*counts))


def test_brackets_in_quoted_code_are_not_taken_for_styles() -> None:
    graph = graph_called("mlp")
    reason = "a trial raised IndexError at net.py:7: return x[index] + y[bold]"
    widths = {name: replace(width, frozen=reason) for name, width in graph.widths.items()}
    lines = printed(replace(graph, widths=Widths(widths)))
    assert sum(reason in line for line in lines) == len(widths)


def test_a_narrow_terminal_wraps_and_loses_nothing() -> None:
    graph = graph_called("hard_coded")
    lines = printed(graph, columns=80)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 8 * len(graph.widths)
    cells = [re.split(r"\s{2,}", line.strip())[-1] for line in lines]
    assert str(graph.widths["stem"].frozen).replace(" ", "") in "".join(cells).replace(" ", "")
