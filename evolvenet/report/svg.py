"""Matplotlib's figures as part of a page: inline SVG whose text and axes have the colour of the page around them."""

from __future__ import annotations

import html
import importlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from evolvenet.errors import EvolveNetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""What is drawn in this colour has the colour of the page's text."""
_STYLE: dict[str, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", re.DOTALL)
_SIZE = re.compile(r' (?:width|height)="[\d.]+pt"')


class ReportError(EvolveNetError, ImportError):
    """A package of the extra `report` is not installed."""


def need(module: str) -> ModuleType | Any:
    """A module of matplotlib.

    Raises:
        ReportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReportError(
            f"Report: {module.partition('.')[0]} is not installed ({error}). In a clone of EvolveNet: "
            "pip install '.[report]'."
        ) from error


@contextmanager
def page_style() -> Iterator[None]:
    """Figures that are made in the body are drawn in `INK`, without a frame."""
    with need("matplotlib").rc_context(_STYLE):
        yield


def inline_svg(figure: Figure, words: str) -> str:
    """A figure as an `<svg>` element as wide as what is around it, with its text as text.

    Args:
        figure: made in `page_style`.
        words: what it shows, for those who cannot see it; two figures of a page have different ones.
    """
    with need("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": words}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    head, tail = _DROPPED.sub("", drawn[drawn.index("<svg") :]).split(">", 1)
    label = html.escape(words, quote=True)
    return f'{_SIZE.sub("", head)} role="img" aria-label="{label}">{tail.replace(INK, "currentColor")}'
