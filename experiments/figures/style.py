"""How the figures look, on a light page and on a dark one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[2] / "docs" / "figures"


@dataclass(frozen=True)
class Palette:
    """The colours of one theme; backgrounds are transparent."""

    text: str
    faint: str
    fill: str
    first: str
    second: str
    third: str


PALETTES = {
    "light": Palette("#24292f", "#d0d7de", "#eef2f6", "#0550ae", "#bc4c00", "#1a7f37"),
    "dark": Palette("#e6edf3", "#3d444d", "#262c36", "#79c0ff", "#ffa657", "#7ee787"),
}


def save(name: str, draw: Callable[[Palette], Figure], folder: Path = FOLDER) -> list[Path]:
    """Write a figure as SVG in both themes, the same bytes each time; text as paths, so that no font has to be there."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for theme, palette in PALETTES.items():
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 11}):
            path = folder / f"{name}-{theme}.svg"
            draw(palette).savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            # matplotlib ends some lines with a space.
            path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text("utf-8").splitlines()), "utf-8")
        written.append(path)
    return written


def plain(panel: Axes, palette: Palette) -> None:
    """No frame but the axes, and a faint grid."""
    panel.set_facecolor("none")
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(palette.faint)
    panel.grid(color=palette.faint, alpha=0.6, lw=0.6)
    panel.tick_params(colors=palette.text, which="both", color=palette.faint)
    for label in (panel.xaxis.label, panel.yaxis.label, panel.title):
        label.set_color(palette.text)
