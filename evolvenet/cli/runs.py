"""`evolvenet report` and `evolvenet front`: what `train.py` has left in folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from evolvenet.cli.errors import CommandError
from evolvenet.report.front import on_front

RESULT = "result.json"


def result_of(folder: Path) -> dict[str, Any]:
    """The result of a run.

    Raises:
        CommandError: if the folder has none, or it cannot be read.
    """
    path = folder if folder.name == RESULT else folder / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(
            f"{folder}: expected the folder of a run of train.py that has ended, got one without {RESULT}."
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: expected a result in JSON, got {type(error).__name__}: {error}.") from error
    if not isinstance(found, dict) or "history" not in found:
        raise CommandError(f"{path}: expected the result of a run, got JSON without its history.")
    return found


def points_of(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The networks of all runs below some folders, the smallest first: of a front every point, of another run its end.

    Returns:
        [{"run", "parameters", "macs", "val_acc", "test_acc", "front"}]; "front" says whether no other network is as small and
        as accurate, by the validation accuracy, since the test split chooses nothing.

    Raises:
        CommandError: if there is no run.
    """
    found: list[dict[str, Any]] = []
    for folder in folders:
        paths = [folder / RESULT] if (folder / RESULT).is_file() else sorted(folder.rglob(RESULT))
        for path in paths:
            result = result_of(path.parent)
            name = path.parent.name if path.parent != folder else folder.resolve().name
            ends = result.get("front") or [{**result["end"], **{k: result.get(k) for k in ("val_acc", "test_acc")}}]
            found += [{"run": name, "macs": None, **{k: end.get(k) for k in COLUMNS if k in end}} for end in ends]
    if not found:
        raise CommandError(f"{', '.join(map(str, folders))}: expected runs of train.py below, got no {RESULT} there.")
    found.sort(key=lambda point: (point["parameters"], -(point.get("val_acc") or 0.0)))
    chosen = on_front([(point["parameters"], point.get("val_acc") or 0.0) for point in found])
    return [{**point, "front": each} for point, each in zip(found, chosen, strict=True)]


COLUMNS = ("parameters", "macs", "val_acc", "test_acc")


def points_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """What `points_of` returns, for a terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading, justify in (("", "left"), ("run", "left"), ("parameters", "right"), ("MACs", "right")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for heading in ("validation", "test"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        cells = [_share(point.get(name)) for name in ("val_acc", "test_acc")]
        cost = "" if point.get("macs") is None else f"{point['macs']:,}"
        style = "bold" if point["front"] else "dim"
        table.add_row(
            "●" if point["front"] else "", Text(point["run"]), f"{point['parameters']:,}", cost, *cells, style=style
        )
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
