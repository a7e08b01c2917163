"""The record of a run as one picture: parameters, metrics and widths over the training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evolvenet.engine.history import Event, History
from evolvenet.engine.history_table import sizes_of, width_label
from evolvenet.report.svg import need

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
    figure: Figure = need("matplotlib.figure").Figure(figsize=(10, sum(heights) + 1), layout="constrained")
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    end = max([event.step for event in timeline(history)] + [step for curve in curves.values() for step, _ in curve])
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
    events = timeline(history)
    steps = [event.step for event in events] + [end]
    counts = [event.parameters for event in events] + [events[-1].parameters]
    panel.step(steps, counts, where="post", color="#2c3e50", linewidth=1.8)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(need("matplotlib.ticker").LogLocator(subs=(1.0, 2.0, 5.0)))
    _plain_ticks(panel)
    panel.margins(y=0.15)
    for label, marker, color, lift, chosen in kinds_of_events(history.events):
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
    events = timeline(history)
    colors = need("matplotlib").colormaps["turbo"]
    starts, every = sizes_of(history), [1] if not names else []
    steps, labels = [event.step for event in events] + [end], []
    for place, name in enumerate(names):
        # A rank has no size while its layer is whole.
        sizes = [event.sizes.get(name, starts[name][0]) for event in events]
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


def kinds_of_events(events: Sequence[Event]) -> list[tuple[str, str, str, float, list[Event]]]:
    """The events by what they did: name, marker, colour, by how many points the marker is moved up, and the events."""
    shrunk = [event for event in events if any(change.after < change.before for change in event.changes)]
    grew = [event for event in events if any(change.after > change.before for change in event.changes)]
    skipped = [event for event in events if event.skipped is not None]
    return [
        ("pruned", "v", _SHRUNK, -6, shrunk),
        ("grown", "^", _GREW, 6, grew),
        ("skipped", "x", _SKIPPED, 0, skipped),
    ]


def _lifted(panel: Axes, points: float) -> Any:
    moved = need("matplotlib.transforms").offset_copy
    return moved(panel.transData, panel.figure, y=points, units="points")


def _plain_ticks(panel: Axes) -> None:
    ticker = need("matplotlib.ticker")
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def timeline(history: History) -> list[Event]:
    """The start, and every event."""
    return [history.initial, *history.events]
