"""A run's history as a table: for a terminal, as plain text, and as HTML for a notebook."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

    from evolvenet.engine.history import Event, History

Row = tuple[str, str, str, str]
"""Name, size at the start, size now, and by what factor it has changed."""

HEAD: Row = ("", "start", "now", "change")
MOST_ROWS = 30
"""Widths that a table lists."""
PLACE = re.compile(r" in \S+ \(")
"""The path of a module, before its type in brackets, in the reason of a frozen width."""
MOST_REASONS = 3
"""Reasons that are listed, the most frequent first."""


def cost_rows(history: History) -> list[Row]:
    """Parameters and multiply-accumulates of the whole network."""
    first, last = history.initial, history.latest
    return [
        ("parameters", f"{first.parameters:,}", f"{last.parameters:,}", ratio(first.parameters, last.parameters)),
        ("MACs per sample", f"{first.macs:,}", f"{last.macs:,}", ratio(first.macs, last.macs)),
    ]


def width_rows(history: History, names: Iterable[str] | None = None) -> list[Row]:
    """The size of every width, or of some; ranks come last and are labelled as such.

    Args:
        history: of a run.
        names: of the widths.
    """
    sizes = sizes_of(history)
    chosen = sizes if names is None else names
    return [
        (width_label(history, name), f"{sizes[name][0]:,}", f"{sizes[name][1]:,}", ratio(*sizes[name]))
        for name in chosen
    ]


def width_label(history: History, name: str) -> str:
    """A width's name, or of which layer it is a rank; with the name where the layer has several ranks."""
    layer = history.ranks.get(name)
    if layer is None:
        return name
    several = list(history.ranks.values()).count(layer) > 1
    return f"rank of {layer or 'the model'}" + (f" ({name})" if several else "")


def compact_rows(history: History) -> list[Row]:
    """The widths, then the ranks, in execution order; of more than `MOST_ROWS` those whose size has changed most.

    The last rows of each sum up the units of those that are left out.
    """
    sizes = sizes_of(history)
    ranks = [name for name in sizes if name in history.ranks]
    widths = [name for name in sizes if name not in history.ranks]
    return [*_most_changed(history, widths, "widths"), *_most_changed(history, ranks, "ranks")]


def _most_changed(history: History, names: Sequence[str], noun: str) -> list[Row]:
    if len(names) <= MOST_ROWS:
        return width_rows(history, names)
    sizes = sizes_of(history)
    changed = [name for name in names if sizes[name][0] != sizes[name][1]]
    most = set(sorted(changed, key=lambda name: -abs(math.log(sizes[name][1] / sizes[name][0])))[:MOST_ROWS])
    rows = width_rows(history, [name for name in changed if name in most])
    for kind, rest in (
        (f"other {noun} that changed", [name for name in changed if name not in most]),
        (f"{noun} of the same size", [name for name in names if name not in changed]),
    ):
        if rest:
            before, now = (sum(sizes[name][place] for name in rest) for place in (0, 1))
            rows.append((f"{len(rest)} {kind}", f"{before:,}", f"{now:,}", ratio(before, now)))
    return rows


def remarks(history: History) -> list[str]:
    """How many events there were, why some were skipped, and why some widths are frozen."""
    skipped = [event for event in history.events if event.skipped is not None]
    changed = sum(bool(event.changes) for event in history.events)
    found = [f"{_count(len(history.events), 'event')}, {changed} of them with changed widths, {len(skipped)} skipped"]
    found += [f"skipped {steps}: {reason}" for reason, steps in _skipped(skipped)]
    found += [
        f"step {event.step}: {word} {', '.join(blocks)}"
        for event in history.events
        for word, blocks in (("removed", event.removed_blocks), ("restored", event.restored_blocks))
        if blocks
    ]
    if history.frozen:
        reasons = _frequent(history.frozen.values())
        keep = "width keeps its size" if len(history.frozen) == 1 else "widths keep their size"
        found.append(f"{len(history.frozen)} {keep}:")
        found += [f"  {count} × {reason}" for count, reason in reasons[:MOST_REASONS]]
        rest = sum(count for count, _ in reasons[MOST_REASONS:])
        found += [f"  {rest} for other reasons"] if rest else []
    return found


def rich_table(history: History) -> Group:
    """What rich prints: `rich.print(history)`."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(HEAD[0], overflow="fold")
    for heading in HEAD[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    costs, widths = cost_rows(history), compact_rows(history)
    ranks = sum(name in history.ranks for name in sizes_of(history))
    ends = {len(costs) - 1, len(costs) + len(widths) - ranks - 1} if ranks <= MOST_ROWS else {len(costs) - 1}
    for place, row in enumerate([*costs, *widths]):
        # As text: rich would parse brackets in a plain string as styles.
        table.add_row(*map(Text, row), end_section=place in ends, style="" if row[3] else "dim")
    notes = (Padding(Text(text.strip()), (0, 0, 0, len(text) - len(text.lstrip()))) for text in remarks(history))
    return Group(table, Text(), *notes)


def plain_text(history: History) -> str:
    """The table without colours, as wide as the terminal, or 80 characters where there is none."""
    from rich.console import Console

    console = Console(file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(rich_table(history))
    return "\n".join(each.rstrip() for each in capture.get().strip("\n").splitlines())


def html_page_part(history: History) -> str:
    """The table in HTML whose colours are those of the page around it, light or dark."""
    notes = "".join(f"<div>{html.escape(text).replace('  ', '&emsp;')}</div>" for text in remarks(history))
    return f"<div>{html_table([HEAD, *cost_rows(history), *compact_rows(history)], numbers=(1, 2, 3))}{notes}</div>"


def html_table(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """Rows as an HTML table, the first one as its head.

    Args:
        rows: of text, which is escaped.
        numbers: columns that are aligned to the right.
    """

    def cells(row: Sequence[str], tag: str) -> str:
        styles = [" style='text-align: right'" if place in numbers else "" for place in range(len(row))]
        return "".join(f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell, style in zip(row, styles, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f"<table><tr>{cells(rows[0], 'th')}</tr>{body}</table>"


def ratio(before: float, after: float) -> str:
    """By what factor a size has changed.

    >>> ratio(64, 16), ratio(16, 24), ratio(16, 16)
    ('÷ 4.0', '× 1.5', '')
    """
    if before == after or not before or not after:
        return "" if before == after else "gone"
    return f"÷ {before / after:.1f}" if after < before else f"× {after / before:.1f}"


def sizes_of(history: History) -> dict[str, tuple[int, int]]:
    """{width: (size at the start, size now)}, ranks last.

    A rank that came during the run starts at the rank of the whole layer, one that was merged ends there.
    """
    first, last = dict(history.initial.sizes), dict(history.initial.sizes)
    for event in history.events:
        for change in event.changes:
            if change.width in history.ranks:
                first.setdefault(change.width, change.before)
                last[change.width] = change.after
        last.update({name: size for name, size in event.sizes.items() if name in first})
    ordered = sorted(first, key=lambda name: name in history.ranks)
    return {name: (first[name], last[name]) for name in ordered}


def _frequent(reasons: Iterable[str]) -> list[tuple[int, str]]:
    """(how often, reason), the most frequent first; reasons that differ in the module's path alone are one."""
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        alike.setdefault(PLACE.sub(" in … (", reason), []).append(reason)
    found = [(len(each), kind if len(set(each)) > 1 else each[0]) for kind, each in alike.items()]
    return sorted(found, key=lambda item: -item[0])


def _skipped(events: Sequence[Event]) -> list[tuple[str, str]]:
    """(reason, at which steps) of skipped events, the most frequent reasons."""
    steps: dict[str, list[int]] = {}
    for event in events:
        steps.setdefault(event.skipped or "", []).append(event.step)
    ordered = sorted(steps.items(), key=lambda item: -len(item[1]))
    named: list[tuple[str, Any]] = [
        (reason, f"at step {at[0]}" if len(at) == 1 else f"{len(at)} times, first at step {at[0]}")
        for reason, at in ordered[:MOST_REASONS]
    ]
    return named


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
