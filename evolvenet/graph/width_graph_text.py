"""A `WidthGraph` for people: a table of its widths, as rich prints it and as plain text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from evolvenet.graph.block_kinds import OTHER

if TYPE_CHECKING:
    from rich.table import Table

    from evolvenet.graph.width_graph import Width, WidthGraph


def as_table(graph: WidthGraph) -> Table:
    """The table that rich prints; frozen widths are dim."""
    # rich takes long to import, and is needed only here.
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=Text(_caption(graph)), caption_justify="left")
    table.add_column("name", overflow="fold")
    for title in ("size", "parameters", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("ties")
    for title in _titles(graph):
        table.add_column(title, overflow="fold")
    shares = graph.shares
    for width in graph.widths.values():
        share = f"{shares[width.name]:.1%}"
        cells = [width.name, str(width.size), f"{width.parameters:,}", share, _roles(width), *_remarks(graph, width)]
        # As text: a reason may quote code, and rich would parse brackets in a plain string as styles.
        table.add_row(*map(Text, cells), style="dim" if width.frozen else "")
    return table


def as_text(graph: WidthGraph) -> str:
    """The same in plain text, with the number of ties of each width."""
    shares = graph.shares
    rows = [["name", "size", "parameters", "share", "ties", *_titles(graph)]]
    rows += [
        [w.name, str(w.size), f"{w.parameters:,}", f"{shares[w.name]:.1%}", str(len(w.ties)), *_remarks(graph, w)]
        for w in graph.widths.values()
    ]
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(size) for cell, size in zip(row, columns, strict=False)), row[-1]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in [*lines, _caption(graph)])


def as_explanation(width: Width) -> str:
    """A width, what its sizes are bound to, and every axis that is tied to it, one line each."""
    lines = [f"{width.name}: {width.size} units, {width.parameters:,} parameters"]
    if width.rank_of is not None:
        lines.append(f"rank of {layer_of_rank(width)}")
    if width.parts > 1:
        lines.append(f"{width.parts} parts of one size, each with units of its own")
    if width.multiple > 1:
        lines.append(f"in multiples of {width.multiple} units")
    if width.frozen is not None:
        lines.append(f"frozen: {width.frozen}")
    for tie in width.ties:
        stop = tie.start + width.size * tie.repeat
        each = f", {tie.repeat} places a unit" if tie.repeat > 1 else ""
        part = f", part {tie.part}" if width.parts > 1 else ""
        lines.append(f"  {tie.role:<8} {tie.tensor} axis {tie.dim} [{tie.start}:{stop}]{each}{part}")
    return "\n".join(lines)


def layer_of_rank(width: Width) -> str:
    """The path of the factorized layer of which a width is a rank; "" for any other width."""
    return "the model" if width.rank_of == "" else width.rank_of or ""


def _caption(graph: WidthGraph) -> str:
    kinds = graph.coverage_by_kind
    parts = [f"{kind} {100 * removable:.1f} of {share:.1%}" for kind, (removable, share) in kinds.items()]
    by_kind = f" ({', '.join(parts)})" if set(kinds) - {OTHER} else ""
    coverage = f"coverage {graph.coverage:.1%} of {graph.parameters:,} parameters{by_kind}"
    return "\n".join([coverage, *graph.notes])


def _titles(graph: WidthGraph) -> list[str]:
    """Of the last columns: which layers' ranks widths are is shown where one of them is a rank."""
    ranks = any(width.rank_of is not None for width in graph.widths.values())
    return ["rank of", "frozen"] if ranks else ["frozen"]


def _remarks(graph: WidthGraph, width: Width) -> list[str]:
    """The entries of a width in the columns of `_titles`."""
    return [layer_of_rank(width), width.frozen or ""][-len(_titles(graph)) :]


def _roles(width: Width) -> str:
    """Number of ties of each role: "3 produce, 1 consumes, 8 follow"."""
    counts = Counter(tie.role for tie in width.ties)
    roles = [(counts[role], role) for role in ("produces", "consumes", "follows", "masks") if counts[role]]
    return ", ".join(f"{count} {role if count == 1 else role.removesuffix('s')}" for count, role in roles)
