"""Where and when a table was made: date, machine, versions of the libraries that matter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "torch-pruning")


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
    """For the head of a table: "on 2026-01-31 (2 CPU cores, x86_64; python 3.11.7, torch 2.13.0, …)"."""
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"on {date.today().isoformat()} ({os.cpu_count()} CPU cores, {platform.machine()}; {known})"
