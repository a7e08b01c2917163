"""Several networks by size and accuracy: which of them no other beats, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evolvenet.report.page import _need as need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACES = ((0, 9), (0, -17), (8, 3), (-8, 3), (0, 22), (0, -30), (10, -12), (-10, -12))
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
    panel.set_xscale("log")
    panel.margins(x=0.12, y=0.18)
    panel.xaxis.set_major_formatter(need("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.xaxis.set_minor_formatter(need("matplotlib.ticker").NullFormatter())
    panel.set_xlabel("parameters")
    panel.set_ylabel(f"{'test' if measured == 'test_acc' else 'validation'} accuracy, %")
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower right")
    labels = [
        (f"{p['run']}: {p['parameters']:,}, {value:.2f} %", p["parameters"], value) for p, value in shown if p["front"]
    ]
    place_labels(panel, labels)
    return figure


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
    inside = panel.get_window_extent(renderer)
    for text, x, y in labels:
        for dx, dy in PLACES:
            align = "center" if not dx or abs(dx) >= 10 else "left" if dx > 0 else "right"
            written = panel.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize=8, parse_math=False
            )
            box = written.get_window_extent(renderer)
            if (
                inside.contains(box.x0, box.y0)
                and inside.contains(box.x1, box.y1)
                and not any(map(box.overlaps, taken))
            ):
                taken.append(box)
                break
            written.remove()
