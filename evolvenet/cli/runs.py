"""`evolvenet report` and `evolvenet front`: what `train.py` has left in folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # comes with Lightning
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from evolvenet.cli.errors import CommandError
from evolvenet.report.facts import without_secret
from evolvenet.report.front import on_front

RESULT = "result.json"
OVERRIDES = ".hydra/overrides.yaml"
"""What was typed for a run, in its folder."""
UNRELATED = ("output", "resume", "threads")
"""Settings of a run that do not change its result: no part of its name."""


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


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    Args:
        name: path of its folder below the one that was given.
        settings: its overrides that not all of the runs share; where it alone has ended, that it does not share with those
            that have not, of a single run all.
        result: content of its `result.json`.
    """

    name: str
    settings: str
    result: dict[str, Any]


def runs_below(folders: Sequence[Path]) -> list[FinishedRun]:
    """All runs below some folders that have a result, in the order of their paths.

    Raises:
        CommandError: if a result cannot be read.
    """
    names: dict[Path, str] = {}
    roots = list(dict.fromkeys(folder.resolve() for folder in folders))
    above = Path(os.path.commonpath(roots)) if len(roots) > 1 else None
    for root in roots:
        paths = [root] if (root / RESULT).is_file() else [path.parent for path in sorted(root.rglob(RESULT))]
        for path in paths:
            below = "" if path == root else path.relative_to(root).as_posix()
            outer = root.name if above is None or above == root else root.relative_to(above).as_posix()
            parts = [outer] * (above is not None or not below) + [below] * bool(below)
            names.setdefault(path, "/".join(parts))
    # Where one run alone has a result, those without (failed, stopped) tell what was swept.
    others = (
        {path.parent.parent for root in roots for path in root.rglob(OVERRIDES)} if len(names) == 1 else set[Path]()
    )
    given = {path: _overrides(path) for path in {*names, *others}}
    shared = set.intersection(*map(set, given.values())) if len(given) > 1 else set[str]()
    own = {path: " ".join(word for word in given[path] if word not in shared) for path in names}
    return [FinishedRun(name, own[path], result_of(path)) for path, name in names.items()]


def _overrides(folder: Path) -> list[str]:
    """What was typed for a run, as Hydra recorded it, without secrets and what does not change its result."""
    try:
        found = yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    words = [str(word) for word in found] if isinstance(found, list) else []
    return [without_secret(word) for word in words if word.lstrip("+").partition("=")[0] not in UNRELATED]


def points_of(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The networks of all runs below some folders, the smallest first: of a front every point, of another run its end.

    Each is named by the overrides that not all runs share, or by its folder where there are none.

    Returns:
        [{"run", "parameters", "macs", "val_acc", "test_acc", "front"}]; "front" says whether no other network is as small and
        as accurate, by the validation accuracy, since the test split chooses nothing.

    Raises:
        CommandError: if there is no run.
    """
    runs, found = runs_below(folders), list[dict[str, Any]]()
    for run in runs:
        name = run.settings if run.settings and len(runs) > 1 else run.name
        result = run.result
        ends = result.get("front") or [{**result["end"], **{k: result.get(k) for k in ("val_acc", "test_acc")}}]
        found += [{"run": name, **{column: end.get(column) for column in COLUMNS}} for end in ends]
    if not found:
        raise CommandError(f"{', '.join(map(str, folders))}: expected runs of train.py below, got no {RESULT} there.")
    found.sort(key=lambda point: (point["parameters"], -(point["val_acc"] or 0.0)))
    chosen = on_front([(point["parameters"], point["val_acc"] or 0.0) for point in found])
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
