"""When events are due in a training run, counted in optimizer steps or epochs."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from evolvenet.errors import PolicyError


@dataclass(frozen=True)
class Schedule:
    """Every n epochs or every n optimizer steps, between a first step and a share of the run.

    Args:
        every_n_epochs: an event at the start of every n-th epoch; with n = 1 if neither is given.
        every_n_steps: or an event every n optimizer steps.
        start_step: no event before this optimizer step.
        stop: share of the run's optimizer steps, 0 … 1, after which no event is due.

    Raises:
        PolicyError: for values out of range.

    >>> schedule = Schedule(every_n_steps=4, stop=0.5)
    >>> [step for step in range(20) if schedule.due(step, step / 20)]
    [4, 8]
    """

    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    start_step: int = 0
    stop: float = 0.75

    def __post_init__(self) -> None:
        if self.every_n_epochs is not None and self.every_n_steps is not None:
            raise PolicyError("Expected every_n_epochs or every_n_steps, got both. Give one of them.")
        for name, value in (("every_n_epochs", self.every_n_epochs), ("every_n_steps", self.every_n_steps)):
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise PolicyError(f"Expected {name} of 1 or more, a whole number, got {value!r}.")
        if not 0 <= self.stop <= 1:
            raise PolicyError(f"Expected stop as a share of the run in 0 … 1, got {self.stop}.")

    def due(self, step: int, share: float, epoch: int | None = None, before: int | None = None) -> bool:
        """Whether an event is due between two optimizer steps.

        Args:
            step: optimizer steps done.
            share: of the whole run that is done, 0 … 1.
            epoch: epochs done, where one has just ended; None within an epoch.
            before: steps that were done when this was last asked; several optimizers step over a multiple.
        """
        if step < max(self.start_step, 1) or self.stop == 0 or share > self.stop:
            return False
        if self.every_n_steps is not None:
            return step // self.every_n_steps > (step - 1 if before is None else before) // self.every_n_steps
        return bool(epoch) and epoch % (self.every_n_epochs or 1) == 0
