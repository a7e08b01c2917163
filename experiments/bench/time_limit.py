"""A time limit on a part of a benchmark."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTimeError(BaseException):
    """The time limit of a measurement is over. No `Exception`: an event would take it for a problem of its own and go on."""


@contextmanager
def limited(seconds: float, error: type[BaseException] = TimeoutError) -> Iterator[None]:
    """Raise an error in Python code that takes longer.

    Args:
        seconds: the limit, above 0.
        error: what is raised.

    >>> with limited(60):
    ...     sum(range(10))
    45
    """

    def stop(*unused: object) -> None:
        raise error(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
