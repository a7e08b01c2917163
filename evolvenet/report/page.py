"""The record of a run as a table in the terminal, and as one HTML page with its picture inside.

HTML rather than Markdown: one file holds text and picture, any browser opens it, and it can be sent as it is.
The picture also lies beside it as `history.png`. Needs the extra `report` (matplotlib), imported only here.
"""

from __future__ import annotations

import base64
import html
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from evolvenet.engine.history import Event, History
from evolvenet.engine.history_table import cost_rows, html_table, sizes_of, width_label, width_rows
from evolvenet.errors import EvolveNetError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]

_SHRUNK, _GREW, _SKIPPED = "#c0392b", "#1e8449", "#7f8c8d"
_BESIDE: dict[str, Any] = {
    "loc": "upper left",
    "bbox_to_anchor": (1.01, 1.03),
    "frameon": False,
    "fontsize": 9,
    "alignment": "left",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0 2rem; } th { text-align: left; }
th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
img { width: 100%; }
"""


class ReportError(EvolveNetError, ImportError):
    """A package of the extra `report` is not installed."""


def write_report(
    history: History,
    directory: str | Path,
    title: str,
    metrics: Mapping[str, Curve] | None = None,
    facts: Mapping[str, str] | None = None,
    pictures: Mapping[str, Figure] | None = None,
) -> Path:
    """Write `report.html`, self-contained, and `history.png` into a directory.

    Args:
        history: of the evolver.
        directory: created if it does not exist.
        title: heading of the page.
        metrics: curves to draw under the parameters, each a list of (training step, value).
        facts: further lines of the table, name → text, such as a test accuracy.
        pictures: further pictures, heading → figure.

    Returns:
        The path of `report.html`.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    picture = _png(draw(history, metrics))
    (folder / "history.png").write_bytes(picture)
    path = folder / "report.html"
    more = {heading: _png(figure) for heading, figure in (pictures or {}).items()}
    path.write_text(_page(history, title, picture, facts, more), encoding="utf-8")
    return path


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _image(picture: bytes, words: str) -> str:
    return f"<img alt='{html.escape(words)}' src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"


def _page(
    history: History, title: str, picture: bytes, facts: Mapping[str, str] | None, more: Mapping[str, bytes]
) -> str:
    summary = [("", "start", "end", "change"), *summary_rows(history, facts)]
    events = [("step", "width or rank" if history.ranks else "width", "from", "to", "why"), *_event_rows(history)]
    return "\n".join(
        [
            "<!doctype html>",
            f"<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{html.escape(title)}</h1>",
            html_table(summary, numbers=(1, 2, 3)),
            *(f"<h2>{html.escape(heading)}</h2>{_image(each, heading)}" for heading, each in more.items()),
            _image(picture, "Parameters, metrics and widths over the training steps"),
            "<h2>Events</h2>",
            html_table(events, numbers=(0, 2, 3)),
            "</html>",
        ]
    )


def summary_rows(history: History, facts: Mapping[str, str] | None = None) -> list[tuple[str, str, str, str]]:
    """The result of a run as rows of name, start, end, change.

    Parameters and multiply-accumulates first, then every width, then `facts` (in the column of the end).

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


def draw(history: History, metrics: Mapping[str, Curve] | None = None) -> Figure:
    """Parameters (log scale), metrics, every width and, apart, every rank over the training steps, one panel below the other.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    curves = {name: curve for name, curve in (metrics or {}).items() if len(curve)}
    names = list(sizes_of(history))
    ranks, widths = ([name for name in names if (name in history.ranks) is wanted] for wanted in (True, False))
    groups = [("units in each width", widths)] if widths or not ranks else []
    groups += [("ranks", ranks)] if ranks else []
    heights = [2.6, *([2.2] if curves else []), *(max(3.2, 0.22 * len(chosen)) for _, chosen in groups)]
    figure: Figure = _need("matplotlib.figure").Figure(figsize=(10, sum(heights) + 1), layout="constrained")
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    end = max([event.step for event in _timeline(history)] + [step for curve in curves.values() for step, _ in curve])
    _draw_parameters(panels[0], history, end)
    if curves:
        _draw_metrics(panels[1], curves)
    for panel, (what, chosen) in zip(panels[-len(groups) :], groups, strict=True):
        _draw_widths(panel, history, end, chosen, what)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        for event in history.events:
            if event.changes:
                panel.axvline(event.step, color="#000000", alpha=0.12, linewidth=0.8, zorder=0)
    figure.align_ylabels(panels)
    panels[-1].set_xlabel("training step (grey lines: widths changed)")
    return figure


def _draw_parameters(panel: Axes, history: History, end: int) -> None:
    timeline = _timeline(history)
    steps = [event.step for event in timeline] + [end]
    counts = [event.parameters for event in timeline] + [timeline[-1].parameters]
    panel.step(steps, counts, where="post", color="#2c3e50", linewidth=1.8)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(_need("matplotlib.ticker").LogLocator(subs=(1.0, 2.0, 5.0)))
    _plain_ticks(panel)
    panel.margins(y=0.15)
    for label, marker, color, lift, chosen in _kinds(history.events):
        if chosen:
            at, counted = [event.step for event in chosen], [event.parameters for event in chosen]
            placed = _lifted(panel, lift)
            panel.plot(
                at,
                counted,
                marker,
                color=color,
                markersize=6,
                label=f"{label} (events: {len(chosen)})",
                transform=placed,
            )
    for step, count, align in ((steps[0], counts[0], "left"), (end, counts[-1], "right")):
        panel.annotate(f"{count:,}", (step, count), (0, 7), textcoords="offset points", ha=align, weight="bold")
    panel.set_ylabel("parameters")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(**_BESIDE)


def _draw_metrics(panel: Axes, curves: Mapping[str, Curve]) -> None:
    labels = []
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        panel.plot(steps, values, marker=".", markersize=4, linewidth=1.4)
        labels.append(f"{name}  {values[-1]:.4g} at the end")
    panel.set_ylabel(next(iter(curves)) if len(curves) == 1 else "metrics", parse_math=False)
    _legend(panel, labels)


def _legend(panel: Axes, labels: Sequence[str], title: str | None = None) -> None:
    """A legend of all lines of a panel, with any text: matplotlib leaves labels out that begin with an underscore."""
    legend = panel.legend(panel.lines, [str(place) for place in range(len(labels))], title=title, **_BESIDE)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
        text.set_parse_math(False)


def _draw_widths(panel: Axes, history: History, end: int, names: Sequence[str], what: str) -> None:
    timeline = _timeline(history)
    colors = _need("matplotlib").colormaps["turbo"]
    starts, every = sizes_of(history), [1] if not names else []
    steps, labels = [event.step for event in timeline] + [end], []
    for place, name in enumerate(names):
        # A rank has no size while its layer is whole.
        sizes = [event.sizes.get(name, starts[name][0]) for event in timeline]
        every += sizes
        color = colors(0.05 + 0.9 * place / max(len(names) - 1, 1))
        labels.append(f"{width_label(history, name)}  {sizes[0]} → {sizes[-1]}")
        # Curves of equal sizes would cover each other.
        placed = _lifted(panel, min(0.9, 10 / len(names)) * (len(names) / 2 - place))
        panel.step(steps, [*sizes, sizes[-1]], where="post", color=color, linewidth=1.5, transform=placed)
    panel.set_yscale("log", base=2)
    panel.set_ylim(min(every) / 1.25, max(every) * 1.25)
    _plain_ticks(panel)
    panel.set_ylabel(what)
    if names:
        _legend(panel, labels, "from the first layer to the last")


def _kinds(events: Sequence[Event]) -> list[tuple[str, str, str, float, list[Event]]]:
    shrunk = [event for event in events if any(change.after < change.before for change in event.changes)]
    grew = [event for event in events if any(change.after > change.before for change in event.changes)]
    skipped = [event for event in events if event.skipped is not None]
    return [
        ("pruned", "v", _SHRUNK, -6, shrunk),
        ("grown", "^", _GREW, 6, grew),
        ("skipped", "x", _SKIPPED, 0, skipped),
    ]


def _lifted(panel: Axes, points: float) -> Any:
    moved = _need("matplotlib.transforms").offset_copy
    return moved(panel.transData, panel.figure, y=points, units="points")


def _plain_ticks(panel: Axes) -> None:
    ticker = _need("matplotlib.ticker")
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def _timeline(history: History) -> list[Event]:
    return [history.initial, *history.events]


def _event_rows(history: History) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for event in history.events:
        if event.skipped is not None:
            rows.append((f"{event.step:,}", "", "", "", f"skipped: {event.skipped}"))
        for change in event.changes:
            rows.append(
                (
                    f"{event.step:,}",
                    width_label(history, change.width),
                    str(change.before),
                    str(change.after),
                    change.reason,
                )
            )
    return rows or [("", "", "", "", "no width changed")]


def _need(module: str) -> ModuleType | Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReportError(
            f"Report: {module.partition('.')[0]} is not installed ({error}). pip install 'evolvenet[report]'"
        ) from error
