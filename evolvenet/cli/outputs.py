"""Files that a command will write: what is wrong with a name is said before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from evolvenet.cli.errors import CommandError


def check_file(option: str, path: Path, endings: Sequence[str]) -> None:
    """Refuse a file that could not be written.

    Args:
        option: by which it was named.
        path: the file.
        endings: of which its name has one.

    Raises:
        CommandError: if it has another one, is a folder, or its folder is not there or not writable.
    """
    if path.suffix not in endings:
        raise CommandError(
            f"{option} {path}: expected a name that ends in {', '.join(endings)}, got {path.suffix or 'no ending'}."
        )
    if path.is_dir():
        raise CommandError(f"{option} {path}: expected a file, got a folder. Name a file in it.")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{option} {path}: expected a folder {path.parent}, got none there. Make it first.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise CommandError(f"{option} {path}: expected a place that may be written, got one that may not.")
