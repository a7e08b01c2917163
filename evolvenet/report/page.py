"""The record of a run as one HTML page with its drawings inside, for a phone and a desk, in light and in dark.

HTML rather than Markdown: one file holds text and drawings, any browser opens it, and it can be sent as it is.
`history.png` beside it is one picture of the run. Needs the extra `report` (matplotlib), imported only here.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evolvenet.engine.history import Event, History
from evolvenet.engine.history_table import html_table, ratio, sizes_of, width_label
from evolvenet.report.facts import run_facts
from evolvenet.report.panels import (
    LARGEST,
    LEAST,
    MOST_SPECTRA,
    MOST_WIDTHS,
    costs,
    draw_changes,
    draw_costs,
    draw_curve,
    draw_network,
    draw_spectrum,
    most_changed,
)
from evolvenet.report.picture import Curve, draw, timeline
from evolvenet.report.style import STYLE
from evolvenet.report.summary import summary_rows
from evolvenet.report.svg import inline_svg, page_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_PARTS = 8
"""Parts of events whose time is listed, the longest ones."""


def write_report(  # noqa: PLR0913  public: each is one part of the page
    history: History,
    directory: str | Path,
    title: str,
    metrics: Mapping[str, Curve] | None = None,
    facts: Mapping[str, str] | None = None,
    pictures: Mapping[str, Figure] | None = None,
    *,
    baselines: Mapping[str, float] | None = None,
    settings: Mapping[str, str] | None = None,
    threshold: float | None = None,
    seconds: float | None = None,
    made: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html`, self-contained, and `history.png` into a directory.

    Args:
        history: of the evolver.
        directory: created if it does not exist.
        title: heading of the page.
        metrics: curves, each a list of (training step, value).
        facts: further lines of the table, name → text, such as a test accuracy.
        pictures: further pictures, heading → figure.
        baselines: name of a metric → its value for the network that the run started with, drawn as a line.
        settings: how the run was configured, name → text.
        threshold: the energy below which units are pruned, as a multiple of the mean, drawn into the spectra.
        seconds: of the whole run, training included.
        made: command, versions and machine of the run, as `run_facts` returned them; None for those of this process.

    Returns:
        The path of `report.html`.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    curves = {name: list(curve) for name, curve in (metrics or {}).items() if len(curve)}
    (folder / "history.png").write_bytes(_png(draw(history, curves)))
    with page_style():
        parts = [
            _tiles(history, curves, seconds),
            _section("Network before and after", _network(history)),
            _section("The run", _run(history, curves, baselines or {})),
            *(_section(heading, _image(_png(figure), heading)) for heading, figure in (pictures or {}).items()),
            _section("Spectra", _spectra(history, threshold)),
            _section("Predicted and measured change", _changes(history)),
            _section("Events", "".join(_events(history))),
            _section("Wall clock", _clock(history, seconds)),
            _section("All sizes", _scrolled(html_table(_sizes(history, facts), numbers=(1, 2, 3)))),
            _section("How this was made", _made(run_facts() if made is None else made, settings or {})),
        ]
    path = folder / "report.html"
    path.write_text(_page(title, parts), encoding="utf-8")
    return path


def _page(title: str, parts: Sequence[str]) -> str:
    text = html.escape(title)
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{text}</title><style>{STYLE}</style></head>"
    )
    return "\n".join([head, f"<body><h1>{text}</h1>", *filter(None, parts), "</body></html>"])


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>" if body else ""


def _tiles(history: History, curves: Mapping[str, Curve], seconds: float | None) -> str:
    first, last = history.initial, history.latest
    changed = sum(bool(event.changes) for event in history.events)
    tiles = [
        (
            f"{last.parameters:,}",
            "parameters",
            f"{first.parameters:,} at the start {_factor(first.parameters, last.parameters)}",
        ),
        (f"{last.macs:,}", "MACs per sample", f"{first.macs:,} at the start {_factor(first.macs, last.macs)}"),
        *((f"{curve[-1][1]:.4g}", name, "at the end") for name, curve in curves.items()),
        (f"{len(history.events)}", "events", f"{changed} with changed widths"),
        *([(_time(seconds), "wall clock", f"{_time(_spent(history))} of it events")] if seconds is not None else []),
    ]
    cells = (
        f"<div class='tile'><span>{html.escape(what)}</span><b>{html.escape(number)}</b><small>{html.escape(more)}</small></div>"
        for number, what, more in tiles
    )
    return f"<div class='tiles'>{''.join(cells)}</div>"


def _factor(before: float, after: float) -> str:
    found = ratio(before, after)
    return f"({found})".replace(" ", "\N{NO-BREAK SPACE}") if found else ""


def _network(history: History) -> str:
    names = list(sizes_of(history))
    if not names:
        return ""
    left = len(names) - MOST_WIDTHS
    note = f" The {left} others have changed less; all sizes are in the table below." if left > 0 else ""
    ranks = " Violet: ranks." if history.ranks else ""
    words = f"A bar for each width, to scale, from the first layer to the last. Outline: at the start. Filled: now.{ranks}{note}"
    return _figure(draw_network(history), "The network before and after", words, "network")


def _run(history: History, curves: Mapping[str, Curve], baselines: Mapping[str, float]) -> str:
    steps = [event.step for event in timeline(history)] + [step for curve in curves.values() for step, _ in curve]
    end = max(steps)
    drawn = [
        *(_figure(draw_costs(name, history, counts, end), name) for name, counts in costs(history).items()),
        *(
            _figure(draw_curve(name, curve, history.events, end, _baseline(name, curve, history, baselines)), name)
            for name, curve in curves.items()
        ),
    ]
    words = (
        "Over the training steps. <i class='down'>▼</i> pruned <i class='up'>▲</i> grown <i class='off'>×</i> skipped"
    )
    return f"<p>{words}</p><div class='grid'>{''.join(drawn)}</div>"


def _baseline(name: str, curve: Curve, history: History, baselines: Mapping[str, float]) -> tuple[str, float] | None:
    """The start network's value of a metric where it is given, else the last one from before the first change."""
    if name in baselines:
        return "start network", float(baselines[name])
    first = next((event.step for event in history.events if event.changes), None)
    before = [value for step, value in curve if first is not None and step <= first]
    return ("before the first change", float(before[-1])) if before else None


def _spectra(history: History, threshold: float | None) -> str:
    measured = [name for name in sizes_of(history) if any(name in event.spectra for event in history.events)]
    chosen = most_changed(history, measured, MOST_SPECTRA)
    figures = [(name, draw_spectrum(history, name, threshold)) for name in chosen]
    drawn = "".join(_figure(figure, f"Spectrum of {name}") for name, figure in figures if figure is not None)
    if not drawn:
        return ""
    dotted = f" Dotted: units with at least {threshold:g} of the mean energy, the threshold." if threshold else ""
    left = len(measured) - len(chosen)
    more = f" The {left} other widths have changed less." if left > 0 else ""
    words = (
        "What each unit adds to the outputs of the layers that consume it, beyond what the units below it predict, at each event "
        f"(left to right, by training step). Line: units that were kept.{dotted}{more}"
    )
    scale = f"<div class='scale'><span>{LEAST:g}</span><div></div><span>{LARGEST:g} × the mean</span></div>"
    return f"<p>{words}</p>{scale}<div class='grid small'>{drawn}</div>"


def _changes(history: History) -> str:
    figure = draw_changes(history)
    if figure is None:
        return ""
    words = (
        "Predicted: the energies of the removed units, each a share of the variance of the outputs that it goes into, added up. "
        "Measured: how far the outputs of the network moved, before any further training."
    )
    return f"<p>{words}</p>" + _figure(figure, "Predicted and measured change of the outputs", "", "one")


def _events(history: History) -> Iterator[str]:
    before = history.initial
    for event in history.events:
        yield _event(history, event, before)
        before = event
    if not any(event.changes for event in history.events):
        yield "<p>no width changed</p>"


def _event(history: History, event: Event, before: Event) -> str:
    what = (
        f"{before.parameters:,} → {event.parameters:,} parameters"
        if event.changes
        else f"{event.parameters:,} parameters"
    )
    notes = [what, f"{len(event.changes)} changed" if event.changes else "nothing changed", _time(event.seconds)]
    if event.predicted_change is not None and event.measured_change is not None:
        notes.append(f"outputs moved by {event.measured_change:.2g}, {event.predicted_change:.2g} predicted")
    lines = [
        f"<li><b>{html.escape(width_label(history, change.width))}</b> {change.before} → {change.after}: "
        f"{html.escape(change.reason)}</li>"
        for change in event.changes
    ]
    if event.skipped is not None:
        notes, lines = ["skipped"], [f"<li>skipped: {html.escape(event.skipped)}</li>"]
    head = f"<b>step {event.step:,}</b> {html.escape(' · '.join(notes))}"
    return (
        f"<details><summary>{head}</summary><ul>{''.join(lines)}</ul></details>"
        if lines
        else f"<p class='still'>{head}</p>"
    )


def _spent(history: History) -> float:
    return sum(event.seconds for event in history.events)


def _clock(history: History, seconds: float | None) -> str:
    parts: dict[str, float] = {}
    for event in history.events:
        for name, spent in event.stages.items():
            parts[name] = parts.get(name, 0.0) + spent
    rows = sorted(((f"events: {name}", spent) for name, spent in parts.items()), key=lambda row: -row[1])[:MOST_PARTS]
    rest = _spent(history) - sum(spent for _, spent in rows)
    rows += [("events: everything else" if parts else "events", rest)] if rest > 0 else []
    whole = seconds if seconds is not None else sum(spent for _, spent in rows)
    if seconds is not None:
        rows = [("training and all else", max(seconds - _spent(history), 0.0)), *rows]
    if not whole:
        return ""
    cells = (
        f"<tr><td>{html.escape(name)}</td><td class='n'>{_time(spent)}</td>"
        f"<td class='bar'><div style='width: {100 * spent / whole:.1f}%'></div></td></tr>"
        for name, spent in rows
    )
    return f"<table class='clock'>{''.join(cells)}</table>"


def _time(seconds: float) -> str:
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _sizes(history: History, facts: Mapping[str, str] | None) -> list[tuple[str, str, str, str]]:
    return [("", "start", "end", "change"), *summary_rows(history, facts)]


def _made(made: Mapping[str, str], settings: Mapping[str, str]) -> str:
    rows = {**made, **settings}
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items()) + "</dl>"


def _scrolled(table: str) -> str:
    return f"<div class='scroll'>{table}</div>"


def _figure(figure: Figure, words: str, caption: str = "", kind: str = "") -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure class='{kind}'>{inline_svg(figure, words)}{below}</figure>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _image(picture: bytes, words: str) -> str:
    return f"<img alt='{html.escape(words)}' src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"
