"""The strategy's steps, run once more at the first widths where they raise after a change of widths."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

Restore = Callable[[Exception], AbstractContextManager[None] | None]

MISFITS = (RuntimeError, ValueError, IndexError)
"""What torch raises where shapes do not fit each other; anything else is none of the widths' business."""
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class StepGuard:
    """Wraps the steps of a strategy while a run goes on.

    A trace follows the routes that the first batches take. A step that takes another one later may find layers that do not
    fit each other any more. Where a step raises one of `MISFITS`, all widths get their first sizes and the step is run once
    more; if it raises again, widths are as they were and the first exception is raised: it was not about widths then.
    With several processes nothing is restored: the error says what to do.

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
        except MISFITS as problem:
            # Larger widths are no help where memory is short.
            restored = None if isinstance(problem, torch.OutOfMemoryError) else self._restore(problem)
            if restored is None:
                raise
            try:
                with restored:
                    return self._step(*args, **kwargs)
            except MISFITS:
                raise problem from None
