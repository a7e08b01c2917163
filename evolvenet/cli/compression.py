"""`evolvenet compress`: a network made small enough, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from evolvenet.cli.errors import CommandError
from evolvenet.cli.limits import limit
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


def compressed(
    model: nn.Module, inputs: Any, batches: Sequence[Any], limits: Mapping[str, str | None], out: Path, **options: Any
) -> Compressed:
    """Compress a network in place and write it.

    Args:
        model: the network.
        inputs: example inputs.
        batches: of inputs.
        limits: {kind of cost: limit as it was typed}, one of which is not None.
        out: the file.
        options: further arguments of `evolvenet.compress`.

    Raises:
        CommandError: for none or several limits, or a file of another kind, before anything is computed.
        ResizeError: if the network cannot be made so small.
    """
    given = {kind: text for kind, text in limits.items() if text is not None}
    if len(given) != 1:
        known = ", ".join(f"--{kind}" for kind in limits)
        raise CommandError(
            f"compress: expected one of {known}, got {', '.join(f'--{kind}' for kind in given) or 'none'}."
        )
    if out.suffix not in WRITERS:
        raise CommandError(
            f"--out {out}: expected a name that ends in {', '.join(WRITERS)}, got {out.suffix or 'no ending'}."
        )
    ((kind, text),) = given.items()
    present = {
        "parameters": lambda: parameters(model),
        "macs": lambda: macs(model, inputs),
        "bytes": lambda: size_in_bytes(model),
        "latency": lambda: latency(model, inputs),
    }
    wanted = limit(kind, text, float(present[kind]()))
    done = compress(model, inputs, batches, **{kind: wanted if kind == "latency" else int(wanted)}, **options)
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
    }
