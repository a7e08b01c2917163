"""Limits as people type them: `25%`, `400k`, `4MB`, `3ms`."""

from __future__ import annotations

import re

from evolvenet.cli.errors import CommandError

UNITS = {
    "": 1.0,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "b": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
}
EXAMPLES = {"parameters": "25% or 400k", "macs": "50% or 30M", "bytes": "25% or 4MB", "latency": "50% or 3ms"}
TIMES = ("s", "ms", "us")


def limit(kind: str, text: str, present: float) -> float:
    """The number that a limit says.

    Args:
        kind: "parameters", "macs", "bytes" or "latency".
        text: as it was typed.
        present: what the network has, of which a percentage is taken.

    Raises:
        CommandError: for what is no number, or no unit of this kind.

    >>> limit("parameters", "25%", 1000.0), limit("bytes", "4MB", 0.0), limit("latency", "3ms", 0.0)
    (250.0, 4000000.0, 0.003)
    """
    match = re.fullmatch(r"\s*([\d_.,]*\d)\s*(%|[a-zA-Z]*)\s*", text)
    unit = match.group(2).lower() if match else ""
    if not match or (unit != "%" and (unit not in UNITS or (unit in TIMES) != (kind == "latency"))):
        raise CommandError(f"--{kind} {text}: expected a share or a number, such as {EXAMPLES[kind]}.")
    try:
        number = float(match.group(1).replace("_", "").replace(",", ""))
    except ValueError:
        raise CommandError(f"--{kind} {text}: expected a number, such as {EXAMPLES[kind]}.") from None
    if unit != "%" and kind != "latency" and number * UNITS[unit] < 1:
        raise CommandError(f"--{kind} {text}: expected a number from 1 on. For a share, type {100 * number:g}%.")
    return present * number / 100 if unit == "%" else number * UNITS[unit]
