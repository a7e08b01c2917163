"""`evolvenet compress`: a network made small enough, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from evolvenet.cli.errors import CommandError
from evolvenet.cli.limits import limit
from evolvenet.cli.outputs import check_file
from evolvenet.engine.compress import compress
from evolvenet.engine.compression import Compression
from evolvenet.engine.saving import save
from evolvenet.measurement.cost import latency, macs, parameters, size_in_bytes
from evolvenet.surgery.checkpoint_file import WRITERS


@dataclass(frozen=True)
class Compressed:
    """What was done.

    Args:
        data: as plain data.
        table: for a terminal.
    """

    data: dict[str, Any]
    table: Any


@dataclass(frozen=True)
class Goal:
    """A limit as it was typed.

    Args:
        kind: of cost: "parameters", "macs", "bytes" or "latency".
        text: a share or a number.
    """

    kind: str
    text: str


def goal(limits: Mapping[str, str | None], out: Path) -> Goal:
    """The one limit that was given.

    Args:
        limits: {kind of cost: limit as it was typed}, one of which is not None.
        out: the file to be written.

    Raises:
        CommandError: for none or several limits, one that is no number, or a file that cannot be written.
    """
    given = [Goal(kind, text) for kind, text in limits.items() if text is not None]
    if len(given) != 1:
        known = ", ".join(f"--{kind}" for kind in limits)
        raise CommandError(
            f"compress: expected one of {known}, got {', '.join(f'--{each.kind}' for each in given) or 'none'}."
        )
    limit(given[0].kind, given[0].text, 1.0)
    check_file("--out", out, list(WRITERS))
    return given[0]


def compressed(
    model: nn.Module, inputs: Any, batches: Sequence[Any], wanted: Goal, out: Path, **options: Any
) -> Compressed:
    """Compress a network in place and write it.

    Args:
        model: the network.
        inputs: example inputs.
        batches: of inputs.
        wanted: the limit.
        out: the file.
        options: further arguments of `evolvenet.compress`.

    Raises:
        ResizeError: if the network cannot be made so small.
    """
    kind = wanted.kind
    present = {
        "parameters": lambda: parameters(model),
        "macs": lambda: macs(model, inputs),
        "bytes": lambda: size_in_bytes(model),
        "latency": lambda: latency(model, inputs),
    }
    most = limit(kind, wanted.text, float(present[kind]()))
    done = compress(model, inputs, batches, **{kind: most if kind == "latency" else int(most)}, **options)
    save(model, out)
    return Compressed({**_plain(done, kind), "out": str(out)}, done)


def _plain(done: Compression, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "limit": done.limit,
        "before": done.before,
        "after": done.after,
        "error": done.error,
        "chosen": done.chosen.name,
        "widths": {name: list(sizes) for name, sizes in done.sizes.items()},
        "attempts": [vars(attempt) for attempt in done.attempts],
        "polished": None if done.polished is None else vars(done.polished),
    }
