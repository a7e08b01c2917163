"""When the next event of a run happens: a small state machine that the callbacks of all trainers share."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from evolvenet.policies.schedule import Schedule


class EventState(Enum):
    """Where a run stands between two events."""

    WAITING = "waiting for the first inputs"
    IDLE = "no event is due"
    GATHERING = "an event is due, and batches for it are recorded"
    DUE = "the event happens at the next boundary between two optimizer steps"


class EventTimer:
    """Counts optimizer steps and batches, and tells from them when an event is due.

                 start              check                count_batch            finish
        WAITING ───────▶  IDLE  ───────────▶  GATHERING  ───────────▶   DUE  ───────────▶  IDLE

    An event may come due while WAITING, in a run that was interrupted before one: it is GATHERING, or DUE, from `start` on.

    Args:
        schedule: when events come due.
        needed: batches to record between an event's coming due and the event.

    >>> timer = EventTimer(Schedule(every_n_steps=4), needed=2)
    >>> timer.start()
    >>> states = []
    >>> for step in range(7):
    ...     timer.count_batch()
    ...     if timer.state is EventState.DUE:
    ...         timer.finish()
    ...     timer.check(step, progress=0.0)
    ...     states.append(timer.state.name)
    >>> states
    ['IDLE', 'IDLE', 'IDLE', 'IDLE', 'GATHERING', 'GATHERING', 'IDLE']
    >>> timer.stop()
    >>> timer.state.name
    'WAITING'
    """

    def __init__(self, schedule: Schedule, needed: int = 0) -> None:
        self.schedule = schedule
        self.needed = needed
        self.retried = False
        """Whether batches are gathered anew, since no call was recorded on the first ones."""
        self.batches_without_call = 0
        """Batches while WAITING on which no module was called."""
        self._started = False
        self._due_since: int | None = None
        self._batches = 0
        self._step: int | None = None

    @property
    def state(self) -> EventState:
        """The present state."""
        if not self._started:
            return EventState.WAITING
        if self._due_since is None:
            return EventState.IDLE
        return EventState.GATHERING if self._batches < self.needed else EventState.DUE

    @property
    def recording(self) -> bool:
        """Whether the network's calls are to be recorded for an event: the timer is GATHERING or DUE."""
        return self.state in (EventState.GATHERING, EventState.DUE)

    def start(self) -> None:
        """The first inputs are known, and the network is traced."""
        self._started = True

    def stop(self) -> None:
        """No event may come due until `start` is called: the timer is WAITING. What it has counted stays."""
        self._started = False

    def check(self, step: int, progress: float, epoch: int | None = None) -> None:
        """Let an event come due if the schedule has one here, and none is due yet.

        Args:
            step: optimizer steps done.
            progress: share of the run that is done, 0 … 1.
            epoch: epochs done, where one has just ended; None within an epoch.
        """
        due = self.schedule.due(step, progress, epoch, self._step)
        self._step = step
        if due and self._due_since is None:
            self._due_since, self._batches = step, 0

    def count_batch(self) -> None:
        """One batch more has been recorded, if an event is due."""
        if self._due_since is not None:
            self._batches += 1

    def retry(self) -> None:
        """Gather batches anew: on those that were counted, no call was recorded."""
        self.retried, self._batches = True, 0

    def finish(self) -> None:
        """The event has happened."""
        self.retried, self._due_since = False, None

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain data for a checkpoint."""
        return {"due_since": self._due_since, "batches": self._batches, "seen_step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts; the timer is WAITING until `start` is called."""
        self.stop()
        self._due_since = state.get("due_since")
        self._batches = state.get("batches", 0)
        self._step = state.get("seen_step")
