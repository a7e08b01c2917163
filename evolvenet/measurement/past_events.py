"""What the events of a run so far leave behind for the statistics of the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from evolvenet.graph.plain_data import check_types
from evolvenet.measurement.running_energies import RunningEnergies

_NEVER = 1_000_000


@dataclass(frozen=True)
class LastChange:
    """The last change of a width.

    Args:
        event: its number.
        units: that were added; negative if they were removed.
        reversals: so far.
        progress: share of the run that was done, 0 … 1.
    """

    event: int = -_NEVER
    units: int = 0
    reversals: int = 0
    progress: float = -math.inf


@dataclass(frozen=True)
class PastEvents:
    """Every width's last change and average energies, and when the last event was.

    Args:
        changed: {width: its last change}.
        energies: averages over the events.
        progress: share of the run that was done at the last event, 0 … 1; 0 before the first.
        count: how many events there were.

    >>> past = PastEvents().next(0.2).changed_by({"0": 8, "2": 4}, {"0": 6, "2": 4})
    >>> past.changed["0"]
    LastChange(event=1, units=-2, reversals=0, progress=0.2)
    >>> past.next(0.4).changed_by({"0": 6}, {"0": 9}).changed["0"]
    LastChange(event=2, units=3, reversals=1, progress=0.4)
    """

    changed: Mapping[str, LastChange] = field(default_factory=dict[str, LastChange])
    energies: RunningEnergies = field(default_factory=RunningEnergies)
    progress: float = 0.0
    count: int = 0

    def next(self, progress: float) -> PastEvents:
        """With one more event, at this share of the run."""
        return replace(self, count=self.count + 1, progress=progress)

    def with_energies(self, energies: Mapping[str, tuple[float, ...]]) -> PastEvents:
        """With the averages that the last event has brought up to date."""
        return replace(self, energies=self.energies.adopted(energies, self.progress))

    def changed_by(self, before: Mapping[str, int], after: Mapping[str, int]) -> PastEvents:
        """With the changes of the last event, from the sizes before and after it."""
        found = dict(self.changed)
        for name, size in after.items():
            units = size - before.get(name, size)
            if units:
                last = self.changed.get(name, LastChange())
                reversals = last.reversals + (units * last.units < 0)
                found[name] = LastChange(self.count, units, reversals, self.progress)
        return replace(self, changed=found)

    def renamed(self, known: Mapping[str, str]) -> PastEvents:
        """The same by other names; widths that have none are left out.

        Args:
            known: {new name: name here}.
        """
        changed = {new: self.changed[name] for new, name in known.items() if name in self.changed}
        averages = self.energies.known
        energies = {new: averages[name] for new, name in known.items() if name in averages}
        return replace(self, changed=changed, energies=RunningEnergies(energies))

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "changed": {name: list(astuple(each)) for name, each in self.changed.items()},
            "energies": self.energies.state_dict(),
            "progress": self.progress,
            "events": self.count,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PastEvents:
        """What `state_dict` returned; other keys are passed over."""
        changed = {name: LastChange(*entry) for name, entry in state["changed"].items()}
        past = cls(changed, RunningEnergies.from_state_dict(state["energies"]), state["progress"], state["events"])
        check_types(past, cls, "past events")
        return past
