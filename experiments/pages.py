"""What result pages share: where and when they were made, Markdown tables, command-line options, writing files whole."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, stdev

import evolvenet

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "torch-pruning", "torchao")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries, "not installed" for those that are not."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def machine_line() -> str:
    """For the head of a page: "on 2026-01-31 (2 CPU cores, x86_64; python 3.11.7, torch 2.13.0, …)"."""
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"on {date.today().isoformat()} ({os.cpu_count()} CPU cores, {platform.machine()}; {known})"


def commit() -> str:
    """The commit of the checkout, with "-dirty" where files differ from it; "unknown" without git or a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def state() -> str:
    """A short fingerprint of the package's sources."""
    digest = hashlib.sha256()
    for file in sorted(Path(evolvenet.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, since another process may read it at any time; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


BY_HAND = ("<!-- Written by hand, kept by the command: -->", "<!-- End of what is written by hand. -->")
"""Lines of a page that its command keeps when it writes the page anew, with all that is between them."""


def by_hand(path: Path) -> list[str]:
    """What a page says in somebody's own words: its lines from the first of `BY_HAND` to the second; none without them.

    Raises:
        ValueError: if the page does not have each of the two once and in this order: what to keep is unknown.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    begins, ends = ([number for number, line in enumerate(lines) if line.strip() == mark] for mark in BY_HAND)
    if not begins and not ends:
        return []
    if not len(begins) == len(ends) == 1 or begins > ends:
        raise ValueError(
            f"{path}: expected the line {BY_HAND[0]!r} once and after it {BY_HAND[1]!r} once, got {len(begins)} and "
            f"{len(ends)}. Mend the page, or all of them go."
        )
    return lines[begins[0] : ends[0] + 1]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = (0,)) -> list[str]:
    """The lines of a table.

    Args:
        head: titles of the columns.
        rows: cells of each line.
        text: numbers of the columns aligned to the left, as text is; the others are aligned to the right.

    >>> markdown(["method", "%"], [["ours", "99.50"]])
    ['| method | % |', '| --- | ---: |', '| ours | 99.50 |']
    """
    alignment = ["---" if column in text else "---:" for column in range(len(head))]
    return [f"| {' | '.join(line)} |" for line in (head, alignment, *rows)]


def cell(values: Sequence[float]) -> str:
    """Mean ± standard deviation (of a sample) of shares, in percent.

    >>> cell([0.99, 0.98]), cell([0.5]), cell([])
    ('98.50 ± 0.71', '50.00', '')
    """
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{spread}"


def span(ascending: Sequence[str]) -> str:
    """The first and the last value, or the one value that all are.

    >>> span(["690", "695", "700"]), span(["5", "5"])
    ('690 … 700', '5')
    """
    return " … ".join(dict.fromkeys((ascending[0], ascending[-1])))


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add `--data`, the folder of mnist.npz and cifar10.npz, by default $EVOLVENET_DATA, else ./data."""
    folder = Path(os.environ.get("EVOLVENET_DATA", "data"))
    parser.add_argument("--data", type=Path, default=folder, help="folder of the data sets (default %(default)s)")


def add_seeds(parser: argparse.ArgumentParser, default: int) -> None:
    """Add `--seeds`, the number of repetitions with the seeds 0, 1, …; fewer than 2 are refused."""
    parser.add_argument("--seeds", type=_several, default=default, help="2 or more (default %(default)s)")


def _several(text: str) -> int:
    count = int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, for a standard deviation, got {count}")
    return count
