"""Failures of an event at any of its stages, injected through `evolvenet.errors.stage_boundary`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evolvenet import errors


@contextmanager
def at_boundary(name: str, act: Callable[[], object], at: int | None = 1) -> Iterator[Counter[str]]:
    """Within the body, call `act` at the `at`-th boundary of a stage, the first on entering it; at every one if None.

    Yields:
        How many boundaries of each stage have been passed so far.
    """
    passed: Counter[str] = Counter()
    inner = errors.stage_boundary

    def boundary(stage: str, entering: bool) -> None:
        inner(stage, entering)
        passed[stage] += 1
        if stage == name and at in (None, passed[stage]):
            act()

    errors.stage_boundary = boundary
    try:
        yield passed
    finally:
        errors.stage_boundary = inner


@contextmanager
def failing(name: str, at: int | None = 1, error: type[BaseException] = ZeroDivisionError) -> Iterator[Counter[str]]:
    """Within the body, raise an error at a stage's boundary, see `at_boundary`."""

    def fail() -> None:
        raise error("boom")

    with at_boundary(name, fail, at) as passed:
        yield passed
        assert passed[name] >= (at or 1), f"the stage {name!r} was not reached"
