"""Signals wait while a model is being changed: what Python runs on Ctrl-C, SIGTERM or SIGUSR1 runs right after.

Python calls the handler of a signal between any two of its instructions. In the middle of a change of widths the default
handler of SIGINT would raise KeyboardInterrupt in a clean-up that then stays half done, and a handler that saves a checkpoint
(Lightning's on SLURM, for example) would save a model, optimizers and a record that do not fit each other.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from types import FrameType
from typing import Any

log = logging.getLogger("evolvenet")

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGBREAK")
"""What users, schedulers of clusters and timers send; not every system has all of them."""
SIGNALS = tuple(int(getattr(signal, name)) for name in NAMES if hasattr(signal, name))


class deferred_signals(ContextDecorator):  # noqa: N801  used as a function
    r"""Postpone Python's handlers of the signals in `NAMES` to the end of the body; also a decorator of functions.

    The handler of each signal that was received then runs once, whether the body has raised or not. What a handler raises
    (KeyboardInterrupt) replaces what the body raised, which becomes its context. Of nested sections the outermost counts. If a
    signal comes a second time in one section, a warning says what it waits for. Signals without a handler in Python
    and SIGQUIT (Ctrl-\) do what they always do. Only the main thread runs handlers, so in other threads nothing is postponed.

    Args:
        what: what has to end first, for that warning.

    >>> try:
    ...     with deferred_signals("the example"):
    ...         signal.raise_signal(signal.SIGINT)
    ...         print("the body goes on")
    ... except KeyboardInterrupt:
    ...     print("interrupted after it")
    the body goes on
    interrupted after it
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        """Postpone from here on."""
        if threading.current_thread() is threading.main_thread():
            _postponed.enter(self._what)

    def __exit__(self, *details: object) -> None:
        """Run the handlers of what was received."""
        if threading.current_thread() is threading.main_thread():
            _postponed.leave()


class _Postponed:
    """The handlers that are replaced at the moment, and the signals received meanwhile; one object, for the main thread."""

    def __init__(self) -> None:
        self.depth = 0
        self.what = ""
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.received: list[int] = []
        self.warned = False

    def enter(self, what: str) -> None:
        """A section begins; the first of nested ones replaces the handlers."""
        if self.depth:
            self.depth += 1
            return
        try:
            self.depth, self.what, self.warned = 1, what, False
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and handler != self.receive:
                    self.handlers[number] = handler
                    signal.signal(number, self.receive)
        except BaseException:
            # A handler that had not been replaced yet has raised.
            self.leave()
            raise

    def leave(self) -> None:
        """A section ends; the last of nested ones restores the handlers and runs those that are due."""
        if self.depth > 1:
            self.depth -= 1
            return
        try:
            self.restore()
        except BaseException:
            # A handler that had been restored already has raised.
            self.restore()
            raise
        finally:
            self.depth = 0
            self.deliver()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """In the place of the handlers: remember the signal."""
        if number not in self.received:
            self.received.append(number)
        elif not self.warned:
            self.warned = True
            log.warning(
                "%s was received again. It waits for the end of %s, so that the model stays whole, and is handled then. "
                "SIGQUIT (Ctrl-\\) ends the process at once.",
                signal.Signals(number).name,
                self.what,
            )

    def restore(self) -> None:
        """The handlers from before, but for one that the body has set itself."""
        while self.handlers:
            number, handler = next(iter(self.handlers.items()))
            if signal.getsignal(number) == self.receive:
                signal.signal(number, handler)
            del self.handlers[number]

    def deliver(self) -> None:
        """Run the handler of each received signal, also of those after one whose handler raises."""
        while self.received:
            number = self.received.pop(0)
            handler = signal.getsignal(number)
            try:
                if callable(handler):
                    handler(number, inspect.currentframe())
            finally:
                self.deliver()

    def forget(self) -> None:
        """In a forked process: no section is under way, and nothing was received."""
        self.received.clear()
        self.restore()
        self.depth = 0


_postponed = _Postponed()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_postponed.forget)
