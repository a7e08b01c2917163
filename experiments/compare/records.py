"""Results of a comparison, one small JSON file each, beside the trained network that they are of."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Record = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)


def load(path: Path) -> Record:
    """A file's record."""
    return json.loads(path.read_text(encoding="utf-8"))


def is_current(path: Path, made_of: Mapping[str, Any], *, keep_old: bool, after: str | None) -> bool:
    """Whether a result exists for the same trained network and, for our methods, for the present code.

    Args:
        path: of its file.
        made_of: "weights", a fingerprint of the network, and "state", one of our code where the method is ours.
        keep_old: whether results of other states of our code count.
        after: the figure of training on after the cut, which a complete result has; None if it is not measured.
    """
    if not path.exists():
        return False
    found = load(path)
    same_code = keep_old or found.get("state") == made_of.get("state")
    complete = after is None or after in found or "refused" in found
    return same_code and complete and found["weights"] == made_of["weights"]


def read(
    folder: Path, methods: Container[str] | None, key: Callable[[Record], Key]
) -> tuple[dict[int, Record], dict[Key, dict[int, Record]]]:
    """The uncut networks by seed, and the results by key and seed; those of other trained networks are left out.

    Args:
        folder: with a folder "seed0", "seed1" … for each seed.
        methods: that count; None for all.
        key: of a result.
    """
    uncut: dict[int, Record] = {}
    found: dict[Key, dict[int, Record]] = defaultdict(dict)
    for place in sorted(folder.glob("seed*")):
        if (place / "uncut.json").exists():
            seed = int(place.name.removeprefix("seed"))
            uncut[seed] = load(place / "uncut.json")
            for record in map(load, place.glob("*-*.json")):
                if record["weights"] == uncut[seed]["weights"] and (methods is None or record["method"] in methods):
                    found[key(record)][seed] = record
    return uncut, found
