"""Accuracy against parameters beside the peers, read from `experiments/compare/pruning.md`."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.figures.style import Palette, plain

PAGE = Path(__file__).parents[1] / "compare" / "pruning.md"
ROWS = {
    "EvolveNet": ("**ours**", "**ours**"),
    "Torch-Pruning, L2": ("Torch-Pruning L2 + BatchNorm re-estimated", "Torch-Pruning L2"),
    "projection of 2021": ("projection of 2021 + BatchNorm re-estimated", "projection of 2021"),
    "random units": ("random + BatchNorm re-estimated", "random"),
}
"""What is drawn: its row right after the cut, and after an epoch."""

WHEN = ("one shot", "after an epoch")
Table = dict[str, list[float]]


def read(page: str, network: str) -> tuple[str, float, tuple[Table, Table]]:
    """Of one network, where each method allocates: the parameters, the uncut accuracy, and {row: accuracies} of both tables.

    >>> page = ["## mnist: uncut 99 %", "", "8 parameters,", "### Each method's own"]
    >>> page += ["| one shot | 30 % |", "| - | -: |", "| a | 9.5 ± 1 |"]
    >>> read(chr(10).join(page), "mnist")
    ('8', 99.0, ({'a': [9.5]}, {}))
    """
    part = page[page.index(f"## {network}: ") :].split("\n## ")[0]
    found = re.match(r"## \w+: uncut ([\d.]+).*?\n\n([\d,]+) parameters", part, re.DOTALL)
    assert found is not None, f"no size of {network}"
    own = part[part.index("### Each method's own") :]
    one, after = (_rows(own, when) for when in WHEN)
    return found[2], float(found[1]), (one, after)


def _rows(text: str, when: str) -> Table:
    head = f"| {when} |"
    if head not in text:
        return {}
    rows = (line.strip("| \n").split(" | ") for line in text[text.index(head) :].split("\n\n")[0].splitlines()[2:])
    return {name: [float(value.split()[0]) for value in values] for name, *values in rows}


def draw(palette: Palette) -> Figure:
    """Two networks, each right after the cut and after one epoch of training."""
    page = PAGE.read_text("utf-8")
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    colours = (palette.first, palette.second, palette.third, palette.text)
    panels = figure.subplots(2, 2, sharex=True)
    for line, (network, title) in zip(panels, {"mnist": "MNIST", "cifar10": "CIFAR-10"}.items(), strict=True):
        size, uncut, tables = read(page, network)
        left = [70, 50, 30, 10]
        for place, (panel, table) in enumerate(zip(line, tables, strict=True)):
            plain(panel, palette)
            panel.axhline(uncut, color=palette.text, ls=":", lw=1.2)
            for (label, rows), colour, marker in zip(ROWS.items(), colours, "osD^", strict=True):
                panel.plot(left, table[rows[place]], color=colour, marker=marker, lw=1.8, ms=5, label=label)
            panel.set_title(f"{title}, {('right after the cut', 'after one more epoch')[place]}", fontsize=11)
            low = panel.get_ylim()[0]
            panel.set_ylim(low, uncut + 0.12 * (uncut - low))
            panel.annotate(
                f"uncut: {uncut:g} %, {size} parameters", (7, uncut), (0, 3), textcoords="offset points",
                color=palette.text, fontsize=9, ha="right",
            )  # fmt: skip
            panel.set_ylabel("test accuracy, %")
            panel.set_xlim(74, 6)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    for panel in panels[1]:
        panel.set_xlabel("share of the parameters that is left")
    legend = panels[0][0].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0.0, 0.36))
    for text in legend.get_texts():
        text.set_color(palette.text)
    return figure
