"""Counts how often the host waits for a device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waits:
    """A count of waits, and where they were, for the message of a test that fails."""

    def __init__(self) -> None:
        self.count, self.places = 0, ""


@contextmanager
def waits_of(device: torch.device) -> Iterator[Waits]:
    """The waits while the body runs, known when it is over. On the CPU there are none."""
    found = Waits()
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        # The mode itself warns once that it is a prototype and may miss synchronizing operations.
        told = [each for each in seen if "called a synchronizing" in str(each.message)]
        found.count, found.places = len(told), "\n".join(f"{each.filename}:{each.lineno}" for each in told)
    elif device.type == "cpu":
        yield found
    else:
        from tests.helpers import pretend_device

        with pretend_device.watch("evolvenet") as seen:
            yield found
        found.count, found.places = seen.count("sync"), seen.table()
