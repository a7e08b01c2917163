"""Signals wait for the end of a section, whatever happens in it, and are handled once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from evolvenet.signals import SIGNALS, deferred_signals
from tests.helpers.interrupts import at_call

Log = list[str]
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def handled() -> Iterator[Log]:
    """What the handlers of three signals have written."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    log: Log = []
    for number in NUMBERS:
        signal.signal(number, lambda received, _: log.append(signal.Signals(received).name))
    yield log
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_each_handler_runs_once_after_the_outermost_section(handled: Log) -> None:
    before = handlers()
    with deferred_signals("the outer one"):
        with deferred_signals("the inner one"):
            for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR1):
                signal.raise_signal(number)
        assert handled == []
    assert handled == ["SIGUSR1", "SIGINT"]
    assert handlers() == before
    signal.raise_signal(signal.SIGINT)
    assert handled == ["SIGUSR1", "SIGINT", "SIGINT"]


def test_a_second_signal_says_once_what_it_waits_for(handled: Log, caplog: pytest.LogCaptureFixture) -> None:
    with deferred_signals("the trace"), deferred_signals("a part of it"):
        signal.raise_signal(signal.SIGINT)
        assert caplog.messages == []
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    (message,) = caplog.messages
    assert message.startswith("SIGINT was received again. It waits for the end of the trace,")
    assert handled == ["SIGINT"]


def test_a_body_that_raises_is_followed_by_the_handlers(handled: Log) -> None:
    before = handlers()

    @deferred_signals("the body")
    def body() -> None:
        signal.raise_signal(signal.SIGUSR1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert (handled, handlers()) == (["SIGUSR1"], before)


def test_what_a_handler_raises_comes_after_the_body_and_lets_the_others_run(handled: Log) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = handlers()

    @deferred_signals("the body")
    def body() -> None:
        for number in NUMBERS:
            signal.raise_signal(number)
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as caught:
        body()
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert (handled, handlers()) == (["SIGTERM", "SIGUSR1"], before)


def test_a_handler_set_in_the_body_stays_and_gets_what_was_received(handled: Log) -> None:
    with deferred_signals("the body"):
        signal.raise_signal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda *_: handled.append("the new one"))
    assert handled == ["the new one"]
    signal.raise_signal(signal.SIGUSR1)
    assert handled == ["the new one", "the new one"]


def test_signals_without_a_handler_in_python_are_left_alone() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with deferred_signals("the body"):
            assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_in_another_thread_nothing_is_postponed(handled: Log) -> None:
    before, seen = handlers(), list[Any]()

    def body() -> None:
        with deferred_signals("the thread"):
            seen.extend(handlers())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == before


def test_a_forked_process_has_the_handlers_from_before(handled: Log) -> None:
    before = handlers()
    with deferred_signals("the body"):
        child = os.fork()
        if not child:
            os._exit(0 if handlers() == before else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert handlers() != before


def test_an_interrupt_anywhere_is_raised_once_and_leaves_the_handlers(handled: Log) -> None:
    """Also while handlers are replaced and restored: at every call and return in a section and around it."""

    def section() -> None:
        with deferred_signals("the body"):
            signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = handlers()
    total = at_call(0, section, lambda: None)
    assert total > 30
    raised = 0
    for number in range(1, total + 1):
        try:
            at_call(number, section, lambda: signal.raise_signal(signal.SIGINT))
        except KeyboardInterrupt:
            raised += 1
        assert handlers() == before, number
        with deferred_signals("a section afterwards"):
            assert signal.getsignal(signal.SIGINT) != before[0], number
    assert raised == total
