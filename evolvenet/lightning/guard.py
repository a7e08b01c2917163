"""The strategy's steps, run once more at the first widths where they raise after a change of widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch.strategies import Strategy

Restore = Callable[[Exception], AbstractContextManager[None] | None]

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class StepGuard:
    """Wraps the steps of a strategy while a run goes on.

    A trace follows the routes that the first batches take. A step that takes another one later may find layers that do not
    fit each other any more. Where a step raises, all widths get their first sizes and the step is run once more; if it
    raises again, widths are as they were and the first exception is raised: it was not about widths then.

    Args:
        strategy: the trainer's.
        restore: a context manager that gives all widths their first sizes, and takes that back if its body raises. None
            where widths are as they were at the start.
    """

    def __init__(self, strategy: Strategy, restore: Restore) -> None:
        self._strategy = strategy
        for name in STEPS:
            vars(strategy)[name] = _Guarded(getattr(strategy, name), restore)

    def remove(self) -> None:
        """The strategy's own steps again."""
        for name in STEPS:
            vars(self._strategy).pop(name, None)


class _Guarded:
    def __init__(self, step: Callable[..., Any], restore: Restore) -> None:
        self._step, self._restore = step, restore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._step(*args, **kwargs)
        except Exception as problem:
            restored = self._restore(problem)
            if restored is None:
                raise
            with _raising_the_first(problem), restored:
                return self._step(*args, **kwargs)


@contextmanager
def _raising_the_first(problem: Exception) -> Iterator[None]:
    try:
        yield
    except Exception:  # noqa: BLE001  what the second try raises is not what the user has to know
        raise problem from None
