"""The record of a run's events, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class WidthChange:
    """One width that changed at an event, from how many units to how many, and why."""

    width: str
    before: int
    after: int
    reason: str


@dataclass(frozen=True)
class Event:
    """The network after an event.

    Args:
        step: optimizer steps done before it.
        changes: the widths that changed.
        sizes: every resizable width's units after it.
        parameters_before: parameters of the network before it.
        parameters: parameters after it.
        macs: multiply-accumulates of one sample's forward pass after it.
        seconds: how long the event took.
        skipped: None, or why nothing was changed although it was due.
        effective_rank: of each width that was measured, the effective rank (Roy and Vetterli 2007) of its spectrum.
        kept_energy: and the share of its energy that lies in as many directions as it has units now, 0 … 1.
    """

    step: int
    changes: tuple[WidthChange, ...]
    sizes: dict[str, int]
    parameters_before: int
    parameters: int
    macs: int
    seconds: float
    skipped: str | None = None
    effective_rank: dict[str, float] = field(default_factory=dict)
    kept_energy: dict[str, float] = field(default_factory=dict)


@dataclass
class History:
    """A run's events. `initial` is the network before the first one."""

    initial: Event
    events: list[Event] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, numbers and strings, fit for JSON and for `weights_only` checkpoints."""
        plain = asdict(self)
        for event in (plain["initial"], *plain["events"]):
            event["changes"] = list(event["changes"])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> History:
        """Restore what `to_dict` returned."""

        def event(entry: Mapping[str, Any]) -> Event:
            changes = tuple(WidthChange(**change) for change in entry["changes"])
            return Event(**{**entry, "changes": changes, "sizes": dict(entry["sizes"])})

        return cls(event(plain["initial"]), [event(entry) for entry in plain["events"]])


def changed(before: Mapping[str, int], after: Mapping[str, int], reasons: Mapping[str, str]) -> list[WidthChange]:
    """The widths among `reasons` that have another size after than before.

    >>> changed({"0": 8, "2": 4}, {"0": 6, "2": 4}, {"0": "too wide", "2": "too wide"})
    [WidthChange(width='0', before=8, after=6, reason='too wide')]
    """
    return [
        WidthChange(name, before[name], after[name], reason)
        for name, reason in reasons.items()
        if before[name] != after[name]
    ]
