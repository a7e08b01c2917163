"""A drawing of one event: trace, spectra, plan, surgery."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

from experiments.figures.style import Palette

KEPT = (0, 1, 3, 4)
"""Units of the drawn width that stay; −1 stands for a new one."""
UNITS = 6
ENERGIES = (1.0, 0.62, 0.03, 0.4, 0.25, 0.02)


def draw(palette: Palette) -> Figure:
    """Four panels from left to right."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 4)
    titles = (
        "1 Trace\nwhich axes are one width",
        "2 Spectra\nwhat each unit adds",
        "3 Plan\none index map",
        "4 Surgery\nall tensors or none",
    )
    for panel, title, part in zip(panels, titles, (_trace, _spectra, _plan, _surgery), strict=True):
        panel.set_title(title, color=palette.text, fontsize=10.5)
        panel.set_xlim(0, 10)
        panel.set_ylim(0, 10)
        panel.axis("off")
        part(panel, palette)
    return figure


def _trace(panel: Axes, palette: Palette) -> None:
    for x, count, colour in ((1.2, 4, palette.text), (5, UNITS, palette.first), (8.8, 3, palette.text)):
        for y in _heights(count):
            panel.add_patch(Circle((x, y), 0.36, color=colour, lw=0, zorder=2))
    for left, right, starts, ends in ((1.2, 5, 4, UNITS), (5, 8.8, UNITS, 3)):
        for start in _heights(starts):
            for end in _heights(ends):
                panel.plot([left, right], [start, end], color=palette.faint, lw=0.7, zorder=1)
    panel.text(3.1, 0.2, "rows of\nproducer", color=palette.first, ha="center", fontsize=9)
    panel.text(6.9, 0.2, "columns of\nconsumer", color=palette.first, ha="center", fontsize=9)


def _heights(count: int) -> list[float]:
    return [5.8 + 1.25 * (place - (count - 1) / 2) for place in range(count)][::-1]


def _spectra(panel: Axes, palette: Palette) -> None:
    for place, energy in enumerate(ENERGIES):
        colour = palette.first if place in KEPT else palette.second
        panel.add_patch(Rectangle((0.8 + 1.5 * place, 2), 0.8, max(6.6 * energy, 0.15), color=colour, lw=0))
        panel.text(1.2 + 1.5 * place, 1.3, str(place), color=palette.text, ha="center", fontsize=9)
    panel.plot([0.4, 9.6], [2.75, 2.75], color=palette.text, ls="--", lw=1)
    panel.text(10, 3.0, "threshold", color=palette.text, ha="right", fontsize=8)
    panel.text(5, 0.2, "unit", color=palette.text, ha="center", fontsize=9)


def _plan(panel: Axes, palette: Palette) -> None:
    for place in range(UNITS):
        kept = place in KEPT
        _cell(panel, 0.9 + 1.4 * place, 7.2, str(place), palette.first if kept else palette.second, palette, kept)
    new = [*KEPT, -1]
    for place, old in enumerate(new):
        x = 1.6 + 1.4 * place
        _cell(panel, x, 3.2, str(old).replace("-", "−"), palette.third if old < 0 else palette.first, palette, True)
        if old >= 0:
            ends = (1.5 + 1.4 * old, 7.1), (x + 0.6, 4.5)
            panel.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=8, lw=1, color=palette.first))
    panel.text(5, 8.9, "old units", color=palette.text, ha="center", fontsize=9)
    panel.text(5, 1.9, "new units: from which one", color=palette.text, ha="center", fontsize=9)
    panel.text(5, 0.9, "−1: from none", color=palette.third, ha="center", fontsize=9)


def _cell(panel: Axes, x: float, y: float, text: str, colour: str, palette: Palette, strong: bool) -> None:
    panel.add_patch(Rectangle((x, y), 1.2, 1.2, facecolor=palette.fill, edgecolor=colour, lw=1.6 if strong else 1))
    panel.text(x + 0.6, y + 0.57, text, color=colour, ha="center", va="center", fontsize=9)


def _surgery(panel: Axes, palette: Palette) -> None:
    _matrix(panel, (0.6, 5.2), palette, rows=UNITS, columns=4, gone_rows=(2, 5), name="producer")
    _matrix(panel, (5.6, 5.2), palette, rows=4, columns=UNITS, gone_columns=(2, 5), name="consumer")
    _matrix(panel, (0.6, 0.9), palette, rows=UNITS, columns=4, gone_rows=(2, 5), name="its moments")
    _matrix(panel, (5.6, 0.9), palette, rows=4, columns=UNITS, gone_columns=(2, 5), name="its moments")


def _matrix(
    panel: Axes,
    corner: tuple[float, float],
    palette: Palette,
    *,
    rows: int,
    columns: int,
    name: str,
    gone_rows: Sequence[int] = (),
    gone_columns: Sequence[int] = (),
) -> None:
    size = 0.52
    for row in range(rows):
        for column in range(columns):
            gone = row in gone_rows or column in gone_columns
            place = corner[0] + size * column, corner[1] + size * (UNITS - 1 - row)
            colour = palette.fill if gone else palette.first
            panel.add_patch(
                Rectangle(
                    place,
                    size * 0.86,
                    size * 0.86,
                    facecolor=colour,
                    edgecolor=palette.second if gone else colour,
                    lw=0.8,
                )
            )
    panel.text(corner[0] + 1.6, corner[1] + size * UNITS + 0.2, name, color=palette.text, ha="center", fontsize=8.5)
