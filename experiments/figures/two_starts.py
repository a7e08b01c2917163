"""Two starts of one network meet: parameters against optimizer steps, from the runs of `+experiment=digits_both`.

`python train.py -m +experiment=digits_both seed=0 hydra.sweep.dir=DIR`, then `python -m experiments.figures.two_starts DIR` takes
from the runs what the figure needs, into `two_starts.json` beside this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.figures.style import Palette, plain
from experiments.pages import commit, machine_line

DATA = Path(__file__).with_suffix(".json")


def taken_from(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's `result.json`: its sizes over time and its test accuracy."""
    events = [result["history"]["initial"], *result["history"]["events"]]
    return {
        "steps": [*(event["step"] for event in events), result["steps"]],
        "parameters": [*(event["parameters"] for event in events), events[-1]["parameters"]],
        "test_acc": result["test_acc"],
        "seconds": round(result["seconds"]),
    }


def draw(palette: Palette) -> Figure:
    """The figure, from `two_starts.json`."""
    runs = json.loads(DATA.read_text("utf-8"))["runs"]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panel = figure.subplots()
    plain(panel, palette)
    for run, colour in zip(runs, (palette.first, palette.second), strict=True):
        steps, sizes = run["steps"], run["parameters"]
        panel.step(steps, sizes, where="post", color=colour, lw=2.2)
        panel.annotate(
            f"start: {sizes[0]:,} parameters", (steps[0], sizes[0]), (14, -3), textcoords="offset points", color=colour
        )
        below = sizes[-1] == min(each["parameters"][-1] for each in runs)
        panel.annotate(
            f"end: {sizes[-1]:,}, {run['test_acc']:.1%} right".replace("%", " %"),
            (steps[-1], sizes[-1]),
            (0, -16 if below else 9),
            textcoords="offset points",
            color=colour,
            ha="right",
        )
    panel.set_yscale("log")
    panel.set_ylim(1_000, 4_000_000)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("parameters")
    return figure


def main(folder: Path) -> None:
    """Take the figure's data from the runs in a sweep's folder, the small start first."""
    runs = [taken_from(json.loads(path.read_text("utf-8"))) for path in folder.glob("*/result.json")]
    runs.sort(key=lambda run: run["parameters"][0])
    data = {
        "command": "python train.py -m +experiment=digits_both seed=0",
        "commit": commit(),
        "date": date.today().isoformat(),
        "machine": machine_line(),
        "runs": runs,
    }
    DATA.write_text(json.dumps(data, indent=None, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
