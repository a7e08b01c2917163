"""The drawings of a report: the network before and after, curves with the events marked, spectra as heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evolvenet.engine.history import Event, History
from evolvenet.engine.history_table import sizes_of, width_label
from evolvenet.report.picture import Curve, kinds_of_events, timeline
from evolvenet.report.svg import INK, ReportError, need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VIOLET, ORANGE, PINK = "#3b82c4", "#a05fc0", "#e07b1a", "#ff4f9a"
"""Widths and curves, ranks, and what is marked, in heat maps the last: readable on white and on black."""
MOST_WIDTHS = 40
"""Widths that the network is drawn with; of more those whose size has changed most."""
MOST_SPECTRA = 24
"""Widths whose spectra are drawn, likewise."""
MOST_EVENTS = 60
"""Events that a heat map shows; of more as many, evenly spaced."""
LEAST_CHANGE = 1e-6
"""A smaller change of the outputs is drawn as this one: a growth keeps them but for rounding."""
ROWS = 64
"""Places from the first unit to the last in a heat map."""
LEAST, LARGEST = 1e-4, 30.0
"""Energies at the ends of the colour scale, as multiples of the mean."""
WIDE = 4.4
"""Inches of a drawing that fills a phone: its text is then as large as the page's small one."""
_LONGEST = 38


def most_changed(history: History, names: Sequence[str], most: int) -> list[str]:
    """So many widths, those whose size has changed most, in execution order."""
    sizes = sizes_of(history)
    order = sorted(names, key=lambda name: -abs(math.log(max(sizes[name][1], 1) / max(sizes[name][0], 1))))
    kept = set(order[:most])
    return [name for name in names if name in kept]


def draw_network(history: History) -> Figure:
    """The network before and after: a bar for each width and rank, as long as it has units, from the first layer to the last.

    The outlined bar is the size at the start, the filled one the size now; both to one scale.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    sizes = sizes_of(history)
    names = most_changed(history, list(sizes), MOST_WIDTHS)
    figure: Figure = need("matplotlib.figure").Figure(
        figsize=(WIDE, 0.3 + 0.42 * max(len(names), 1)), layout="constrained"
    )
    panel = figure.subplots()
    widest = max([size for name in names for size in sizes[name]], default=1)
    for place, name in enumerate(names):
        before, now = sizes[name]
        color = VIOLET if name in history.ranks else BLUE
        panel.barh(-place, now, 0.42, left=-now / 2, color=color, edgecolor=color, linewidth=0.8)
        panel.barh(-place, before, 0.42, left=-before / 2, color="none", edgecolor=INK, linewidth=0.8)
        text = {"va": "bottom", "fontsize": 9, "parse_math": False}
        panel.text(-widest / 2, 0.22 - place, shortened(width_label(history, name)), ha="left", **text)
        amount = f"{before:,} → {now:,}" if before != now else f"{now:,}"
        panel.text(widest / 2, 0.22 - place, amount, ha="right", weight="bold" if before != now else "normal", **text)
    panel.set_xlim(-widest / 2 * 1.01, widest / 2 * 1.01)
    panel.set_ylim(-len(names) + 0.6, 0.7)
    panel.set_axis_off()
    return figure


def network_figure(history: History) -> Figure | None:
    """`draw_network` for the white ground of a logger's page; None if matplotlib is not installed."""
    try:
        return draw_network(history)
    except ReportError:
        return None


def shortened(name: str, longest: int = _LONGEST) -> str:
    """A name without its beginning, if it is long.

    >>> shortened("encoder.layers.11.attention.self.query.projection")
    '…rs.11.attention.self.query.projection'
    """
    return name if len(name) <= longest else "…" + name[1 - longest :]


def draw_curve(
    name: str, curve: Curve, events: Sequence[Event], end: int, baseline: tuple[str, float] | None = None
) -> Figure:
    """One curve over the training steps, with the events marked below it.

    Args:
        name: its label.
        curve: (step, value) pairs.
        events: of the run.
        end: the last step of the run.
        baseline: label and value of a horizontal line, None for none.
    """
    figure, panel = _panel(shortened(name, _LONGEST if baseline is None else 22))
    steps, values = zip(*curve, strict=True)
    panel.plot(steps, values, color=BLUE, linewidth=1.8, marker="o" if len(curve) < 40 else None, markersize=3)
    if baseline is not None and math.isfinite(baseline[1]):
        panel.axhline(baseline[1], color=ORANGE, linestyle="--", linewidth=1.3)
        # Beside the panel's title: on the line it would lie on the curve.
        text = f"{baseline[0]} {baseline[1]:.4g}"
        panel.set_title(text, loc="right", fontsize=9, color=ORANGE, parse_math=False)
    _mark_events(panel, events, end)
    panel.margins(y=0.12)
    return figure


def draw_costs(name: str, history: History, counts: Sequence[int], end: int) -> Figure:
    """A cost of the network, one number for the start and one after each event, as steps on a log scale.

    Args:
        name: its label.
        history: of the run.
        counts: the numbers.
        end: the last step of the run.
    """
    figure, panel = _panel(name)
    steps = [event.step for event in timeline(history)]
    panel.step([*steps, end], [*counts, counts[-1]], where="post", color=BLUE, linewidth=1.8)
    _log_scale(panel, counts)
    panel.margins(y=0.2)
    _mark_events(panel, history.events, end)
    return figure


def draw_changes(history: History) -> Figure | None:
    """The predicted and the measured change of the outputs at every event that has both; None where there is none."""
    known = [e for e in history.events if e.measured_change is not None and e.predicted_change is not None]
    known = [e for e in known if max(e.measured_change or 0, e.predicted_change or 0) > LEAST_CHANGE]
    if not known:
        return None
    figure, panel = _panel("")
    steps = [event.step for event in known]
    predicted, measured = (
        [max(value or 0.0, LEAST_CHANGE) for value in values]
        for values in ([e.predicted_change for e in known], [e.measured_change for e in known])
    )
    panel.vlines(steps, predicted, measured, color=INK, alpha=0.3, linewidth=1)
    panel.plot(steps, predicted, "o", color=ORANGE, mfc="none", label="predicted")
    panel.plot(steps, measured, "o", color=BLUE, label="measured")
    _log_scale(panel, predicted + measured)
    panel.margins(y=0.15)
    panel.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator(5, integer=True))
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=10, borderpad=0)
    return figure


def draw_spectrum(history: History, name: str, threshold: float | None = None) -> Figure | None:
    """The energies of a width's units at every event as a heat map, None where it was never measured.

    From left to right the events, from below to above the units, the one with the most energy first. The line is the number of
    units that were kept, the dotted one the number that had as much energy as the threshold.

    Args:
        history: of the run.
        name: of the width.
        threshold: an energy, as a multiple of the mean.
    """
    shown = [pair for pair in zip(timeline(history), history.events, strict=False) if pair[1].spectra.get(name)]
    shown = [(before, event) for before, event in shown if name in before.sizes]
    shown = shown[:: math.ceil(len(shown) / MOST_EVENTS)] if shown else []
    if not shown:
        return None
    sizes = [before.sizes[name] for before, _ in shown]
    most = max(sizes)
    figure, panel = _panel(shortened(width_label(history, name)), (3.2, 2.2))
    columns = [energies_at(event.spectra[name], size, most) for size, (_, event) in zip(sizes, shown, strict=True)]
    picture = [[column[row] for column in columns] for row in range(ROWS)]
    panel.imshow(picture, cmap="viridis", norm=need("matplotlib.colors").LogNorm(LEAST, LARGEST, clip=True), aspect="auto",
                 origin="lower", interpolation="none", extent=(-0.5, len(shown) - 0.5, 0, most))  # fmt: skip
    places = list(range(len(shown)))
    kept = [event.sizes.get(name, size) for size, (_, event) in zip(sizes, shown, strict=True)]
    _line(panel, places, kept, "-", "#111111")
    if threshold:
        above = [
            units_above(event.spectra[name], size, threshold) for size, (_, event) in zip(sizes, shown, strict=True)
        ]
        _line(panel, places, above, ":", PINK)
    panel.set_ylim(0, most * 1.04)
    panel.grid(visible=False)
    few = sorted({0, len(shown) // 2, len(shown) - 1})
    panel.set_xticks(few, [f"{shown[place][1].step:,}" for place in few])
    return figure


def energies_at(energies: Sequence[float], size: int, most: int) -> list[float]:
    """The energies of `size` units, known at evenly spaced ones, at `ROWS` places from the first of `most` units to the last.

    >>> found = energies_at([4.0, 2.0], size=2, most=4)
    >>> found[0], found[ROWS // 2 - 1], math.isnan(found[ROWS // 2])
    (4.0, 2.0, True)
    """
    found = []
    for row in range(ROWS):
        unit = math.floor((row + 0.5) / ROWS * most)
        place = round(unit * (len(energies) - 1) / max(size - 1, 1))
        found.append(max(energies[place], LEAST) if unit < size else math.nan)
    return found


def units_above(energies: Sequence[float], size: int, threshold: float) -> int:
    """How many of `size` units have at least an energy, known at evenly spaced ones.

    >>> units_above([4.0, 2.0, 0.001], size=5, threshold=0.01)
    3
    """
    spaced = [energies[round(unit * (len(energies) - 1) / max(size - 1, 1))] for unit in range(size)]
    return sum(each >= threshold for each in spaced)


def _line(panel: Axes, places: Sequence[int], values: Sequence[int], style: str, color: str) -> None:
    """A horizontal piece in every event's column."""
    edges = [each for place in places for each in (place - 0.5, place + 0.5)]
    heights = [value for value in values for _ in range(2)]
    if style == "-":
        # White below: it can be seen on every colour then.
        panel.plot(edges, heights, style, color="#ffffff", linewidth=3.2, alpha=0.8, solid_capstyle="butt")
    panel.plot(edges, heights, style, color=color, linewidth=1.6)


def _panel(name: str, size: tuple[float, float] = (WIDE, 2.4)) -> tuple[Figure, Axes]:
    figure = need("matplotlib.figure").Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    panel.set_title(name, loc="left", fontsize=10, parse_math=False)
    return figure, panel


def _mark_events(panel: Axes, events: Sequence[Event], end: int) -> None:
    for event in events:
        if event.changes:
            panel.axvline(event.step, color=INK, alpha=0.15, linewidth=0.8, zorder=0)
    for _, marker, color, _, chosen in kinds_of_events(events):
        steps = [event.step for event in chosen]
        panel.plot(steps, [0.03] * len(steps), marker, color=color, markersize=5, transform=panel.get_xaxis_transform(),
                   clip_on=False)  # fmt: skip
    panel.set_xlim(-0.02 * max(end, 1), 1.02 * max(end, 1))
    panel.xaxis.set_major_formatter(need("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator(5, integer=True))


def _log_scale(panel: Axes, values: Sequence[float]) -> None:
    """A log scale with as many ticks as there is room for."""
    ticker = need("matplotlib.ticker")
    decades = math.log10(max(values) / max(min(values), 1e-30))
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _short(value)))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def costs(history: History) -> Mapping[str, list[Any]]:
    """{cost: its values at the start and after each event}."""
    events = timeline(history)
    return {
        "parameters": [event.parameters for event in events],
        "MACs per sample": [event.macs for event in events],
    }
