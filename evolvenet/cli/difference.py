"""`evolvenet diff`: what two files of weights differ in: widths, where both say theirs, else shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from evolvenet.surgery.checkpoint import find_record
from evolvenet.surgery.checkpoint_file import read, state_in
from evolvenet.surgery.width_record import WidthRecord

Sizes = dict[str, Any]


def difference(one: Path, two: Path) -> dict[str, Any]:
    """What two files differ in.

    Args:
        one: a file or folder that `evolvenet.load` reads.
        two: another.

    Returns:
        {"what": "widths" or "shapes", "changes": {name: [in the first, in the second]}, None where it is not there,
        "same": how many are equal, "entries": [of all tensors of the first, of the second]}. Shapes are lists.

    Raises:
        RecordError: if a file holds no state dict.
        FileNotFoundError: if it is not there.
    """
    (first, entries), (second, others) = _content(one), _content(two)
    what = "widths" if first["widths"] and second["widths"] else "shapes"
    a, b = _by_the_same_names(first[what], second[what])
    changes = {name: [a.get(name), b.get(name)] for name in {**a, **b} if a.get(name) != b.get(name)}
    same = sum(a[name] == b.get(name) for name in a)
    return {"what": what, "changes": changes, "same": same, "entries": [entries, others]}


def _content(path: Path) -> tuple[dict[str, Sizes], int]:
    found = read(path)
    state = state_in(found, str(path))
    shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    record = find_record(found)
    graph = None if record is None else WidthRecord.from_state_dict(record).graph
    entries = sum(math.prod(shape) for shape in shapes.values())
    return {"widths": {} if graph is None else graph.sizes, "shapes": shapes}, entries


def _by_the_same_names(one: Sizes, two: Sizes) -> tuple[Sizes, Sizes]:
    """Both, without the first part of the names of one where the names are the same then: a network and its LightningModule."""
    if set(one) & set(two):
        return one, two
    for long, short in ((one, two), (two, one)):
        cut = {name.partition(".")[2]: value for name, value in long.items()}
        if set(cut) & set(short):
            return (cut, two) if long is one else (one, cut)
    return one, two


def difference_table(found: Mapping[str, Any], one: Path, two: Path) -> Group:
    """What `difference` returns, for a terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("width" if found["what"] == "widths" else "tensor", overflow="fold")
    # As text: rich would parse brackets in a plain string as styles.
    for path in (one, two):
        table.add_column(Text(str(path) if one.name == two.name else path.name), justify="right", overflow="fold")
    table.add_column("change", justify="right")
    for name, (before, after) in found["changes"].items():
        table.add_row(Text(name), _text(before), _text(after), _ratio(before, after))
    first, second = found["entries"]
    noun = found["what"].removesuffix("s")
    same = f"{found['same']:,} {noun}{'' if found['same'] == 1 else 's'} the same"
    counts = f"entries of all tensors: {first:,} → {second:,}{_ratio(first, second) and f' ({_ratio(first, second)})'}"
    return Group(*([table] if found["changes"] else []), Text(f"{counts}; {same}"))


def _text(value: Any) -> str:
    if value is None:
        return "—"
    return " × ".join(map(str, value)) or "scalar" if isinstance(value, list) else f"{value:,}"


def _ratio(before: Any, after: Any) -> str:
    if not isinstance(before, int) or not isinstance(after, int) or before == after or not before or not after:
        return ""
    return f"÷ {before / after:.1f}" if before > after else f"× {after / before:.1f}"
