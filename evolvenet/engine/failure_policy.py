"""How failed events are handled: a warning the first time, evolution off for the run where a stage fails again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from evolvenet.engine.distributed import ProcessGroup
from evolvenet.errors import SkippedEvent, SpectrumError, stage_of

FAILURES = 2
"""Failures of one stage after which evolution is switched off for the rest of the run."""

log = logging.getLogger("evolvenet")


class FailurePolicy:
    """Counts failures by stage. `off` is the reason why evolution is switched off, None while it is on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.off: str | None = None

    def explain(self, group: ProcessGroup, moment: int, problem: Exception) -> str:
        """Warn, and switch off where a stage failed again; the same on every rank.

        Args:
            group: the processes; all of them count the stage in which rank 0 failed.
            moment: the optimizer step, for the message.
            problem: what was raised, tagged with its `stage`.

        Returns:
            Why nothing was changed.
        """
        passing = isinstance(problem, (SkippedEvent, SpectrumError))
        stage, passing = group.broadcast((stage_of(problem) or "event", passing))
        reason = str(problem) if passing else f"{stage} failed: {problem or type(problem).__name__}"
        log.debug("step %d: %s", moment, stage, exc_info=problem)
        if not passing:
            self.counts[stage] += 1
            if self.counts[stage] >= FAILURES:
                self.off = f"{reason}. It was not the first time, so widths stay as they are for the rest of the run."
                if group.rank == 0:
                    log.error("step %d: %s", moment, self.off)
                return self.off
        if group.rank == 0:
            log.warning("step %d: widths are left as they are: %s", moment, reason)
        return reason

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain data for a checkpoint."""
        return {"failures": dict(self.counts), "off": self.off}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.counts, self.off = Counter(state["failures"]), self.off or state["off"]
