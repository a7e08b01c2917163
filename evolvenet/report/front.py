"""Several networks by size and accuracy: which of them no other beats, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from evolvenet.report.svg import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACES = ((8, -10), (9, -4), (-8, 5), (8, -20), (-8, 14), (8, -32), (-8, 26), (0, 12), (0, -20))
"""Where a label may stand, in points from its network, the best first."""


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the front: no other one is as small and as accurate, and better in one of both.

    Args:
        points: (cost, accuracy) each.

    >>> on_front([(10, 0.9), (20, 0.8), (30, 0.95), (10, 0.9)])
    [True, False, True, True]
    """
    return [
        not any(
            other_cost <= cost and other >= accuracy and (other_cost < cost or other > accuracy)
            for other_cost, other in points
        )
        for cost, accuracy in points
    ]


def draw_front(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against parameters, the front as a line, each network of it with its name where there is room.

    Args:
        points: of `evolvenet front`: "run", "parameters", "val_acc", "test_acc", "front"; the test accuracy is drawn where it
            is known, else that on the validation split.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    figure: Figure = need("matplotlib.figure").Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    measured = "test_acc" if all(point.get("test_acc") is not None for point in points) else "val_acc"
    shown = [(point, 100 * (point.get(measured) or 0.0)) for point in points]
    for chosen, color in ((False, "#95a5a6"), (True, "#1f6feb")):
        own = [(point["parameters"], value) for point, value in shown if point["front"] is chosen]
        if own:
            name = "chosen by validation accuracy" if chosen else "the others"
            costs, accuracies = zip(*sorted(own), strict=True)
            panel.plot(costs, accuracies, "o-" if chosen else "o", color=color, markersize=5, label=name)
    panel.margins(x=0.15, y=0.15)
    parameters_axis(panel)
    panel.set_ylabel(f"{'test' if measured == 'test_acc' else 'validation'} accuracy, %")
    panel.legend(frameon=False, loc="lower right")
    labels = [
        (f"{p['run']}: {p['parameters']:,}, {value:.2f} %", p["parameters"], value) for p, value in shown if p["front"]
    ]
    place_labels(panel, labels)
    return figure


def draw_errors(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Errors of the points of one run against parameters, both on log scales.

    Args:
        points: of a run's `result.json`: "parameters", "val_acc", "test_acc".

    Raises:
        ReportError: if matplotlib is not installed.
    """
    figure: Figure = need("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    panel = figure.subplots()
    counts = [point["parameters"] for point in points]
    for name, color in (("val_acc", "#7f8c8d"), ("test_acc", "#2c3e50")):
        errors = [_errors(point[name]) for point in points]
        panel.plot(counts, errors, "o-", color=color, label={"val_acc": "validation", "test_acc": "test"}[name])
    panel.set_yscale("log")
    panel.margins(x=0.15, y=0.3)
    for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        set_formatter(need("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:.2g}"))
    parameters_axis(panel)
    panel.set_ylabel("errors, %")
    panel.legend(frameon=False)
    labels = [
        (f"{point['parameters']:,}, {point['test_acc']:.2%}", point["parameters"], _errors(point["test_acc"]))
        for point in points
    ]
    place_labels(panel, labels)
    return figure


def parameters_axis(panel: Axes) -> None:
    """Numbers of parameters on the x axis, on a log scale, over a grid."""
    ticker = need("matplotlib.ticker")
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.set_xlabel("parameters")
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)


def _errors(accuracy: float) -> float:
    """In percent; a log scale has no zero."""
    return max(100 * (1 - accuracy), 1e-2)


def place_labels(panel: Axes, labels: Sequence[tuple[str, float, float]]) -> None:
    """Write labels beside points so that none covers another one; a label for which there is no room is left out.

    Args:
        panel: with its points drawn and its scales set.
        labels: (text, x, y) each.
    """
    figure: Any = panel.figure
    renderer = need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    legend = panel.get_legend()
    taken = [] if legend is None else [legend.get_window_extent(renderer)]
    inside, drawn = panel.get_window_extent(renderer), _drawn(panel)
    for text, x, y in labels:
        for dx, dy in PLACES:
            align = "left" if dx > 0 else "right" if dx < 0 else "center"
            written = panel.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize=8, parse_math=False
            )
            box = written.get_window_extent(renderer)
            fits = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
            if fits and not any(map(box.overlaps, taken)) and not box.count_contains(drawn):
                taken.append(box)
                break
            written.remove()


def _drawn(panel: Axes) -> Any:
    """Pixels on the lines of a panel, close to each other."""
    np = need("numpy")
    found = [panel.transData.transform(np.asarray(line.get_xydata())) for line in panel.lines]
    between = np.linspace(0, 1, 40)[:, None]
    segments = [a + (b - a) * between for points in found for a, b in pairwise(points)]
    return np.concatenate([*found, *segments]) if found else np.zeros((0, 2))
