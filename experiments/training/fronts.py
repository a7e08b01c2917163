"""Several seeds of one front: mean ± standard deviation at each point. `python -m experiments.training.fronts RUNS`.

The accuracies are those after each span's last epoch, measured once on the test split for each network. The standard
deviation is that of a sample over the seeds (n − 1 in the denominator).
"""

import evolvenet  # isort: skip  # noqa: F401  (before torchvision, which it patches)

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evolvenet.errors import EvolveNetError
from experiments.pages import cell, markdown, span
from experiments.training.jobs import RESULT, readable_errors

_HEAD = ["parameters", "validation, %", "test, %", "of each seed", "epoch", "minutes"]


class FrontsError(EvolveNetError):
    """The given folders are not runs of one front."""


def fronts_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The points of one front over several runs, one a line, as Markdown.

    Args:
        results: contents of the runs' `result.json`, one for each seed.

    Raises:
        FrontsError: if they are not of one front.

    >>> point = {"parameters": 690, "val_acc": 0.98, "test_acc": 0.99, "epoch": 3, "seconds": 60.0}
    >>> other = {**point, "parameters": 700, "test_acc": 0.98, "seconds": 90.0}
    >>> print(fronts_table([{"front": [point]}, {"front": [other]}]).splitlines()[-1])
    | 690 … 700 | 98.00 ± 0.00 | 98.50 ± 0.71 | 99.00 98.00 | 3 | 1.0 … 1.5 |
    """
    fronts = [result["front"] for result in results]
    epochs = [[point["epoch"] for point in front] for front in fronts]
    if not fronts or not fronts[0] or any(each != epochs[0] for each in epochs):
        raise FrontsError(f"Fronts: expected runs whose points are of the same epochs, got {epochs}.")
    return "\n".join(markdown(_HEAD, list(map(_row, zip(*fronts, strict=True))), text=(3,))) + "\n"


def _row(points: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        span([f"{point['parameters']:,}" for point in sorted(points, key=lambda point: point["parameters"])]),
        cell([point["val_acc"] for point in points]),
        cell([point["test_acc"] for point in points]),
        " ".join(f"{100 * point['test_acc']:.2f}" for point in points),
        str(points[0]["epoch"]),
        span([f"{seconds / 60:.1f}" for seconds in sorted(point["seconds"] for point in points)]),
    ]


def main() -> None:
    """Print the table of the runs named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.training.fronts", description="Mean ± standard deviation at each point of a front."
    )
    parser.add_argument("runs", nargs="+", type=Path, help=f"folders with {RESULT}, one for each seed")
    with readable_errors():
        print(fronts_table([_read(folder / RESULT) for folder in parser.parse_args().runs]))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FrontsError(f"Fronts: expected a folder of a finished run, got {path.parent}, which has no {path.name}.")
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
