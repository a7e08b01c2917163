"""The record of a run's events, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from evolvenet.engine import history_table
from evolvenet.graph.plain_data import check_types

if TYPE_CHECKING:
    from rich.console import Group

    from evolvenet.graph.width_graph import WidthGraph


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
        spectra: and the energies of its units before the event, descending, as multiples of their mean; of a wide one those of
            `evolvenet.engine.event_record.POINTS` units, evenly spaced from the first to the last.
        predicted_change: how far its prunes were predicted to move outputs, see `evolvenet.engine.event_record`; None if there
            were none.
        measured_change: how far the event has moved the network's outputs, as a share of their variance; None if nothing
            changed, or where it is not known.
        stages: {part of the event: seconds}.
        removed_blocks: paths of residual blocks that it has removed whole, by the names before it; those of layers that follow
            in a list, and of their widths, are other ones from then on.
        restored_blocks: paths of blocks that are back, since their removal was taken back.
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
    spectra: dict[str, list[float]] = field(default_factory=dict)
    predicted_change: float | None = None
    measured_change: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()
    restored_blocks: tuple[str, ...] = ()


@dataclass
class History:
    """A run's events. `print(history)` is a table of sizes at the start and now, and so is its display in a notebook.

    Args:
        initial: the network before the first event.
        events: in order.
        frozen: {width: why it keeps its size}.
        ranks: {width that is or was the rank of a factorized layer: path of that layer}; empty in older records.

    >>> start = Event(0, (), {"hidden": 64}, 900, 900, 800, 0.0)
    >>> change = WidthChange("hidden", 64, 16, "the last 48 directions carry no energy")
    >>> print(History(start, [Event(100, (change,), {"hidden": 16}, 900, 250, 200, 0.1)]))
                      start   now   change
    ──────────────────────────────────────
    parameters          900   250    ÷ 3.6
    MACs per sample     800   200    ÷ 4.0
    <BLANKLINE>
    hidden               64    16    ÷ 4.0
    <BLANKLINE>
    1 event, 1 of them with changed widths, 0 skipped
    """

    initial: Event
    events: list[Event] = field(default_factory=list)
    frozen: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, initial: Event, graph: WidthGraph) -> History:
        """The history of a run that begins with this graph."""
        return cls(initial, [], graph.reasons, graph.rank_layers)

    def sizes(self, graph: WidthGraph) -> dict[str, int]:
        """{width: size} in this graph, and of each rank whose layer is whole again the size while it was whole."""
        return {**self.initial.sizes, **graph.sizes}

    @property
    def latest(self) -> Event:
        """The network after the last event."""
        return self.events[-1] if self.events else self.initial

    def __str__(self) -> str:
        return history_table.plain_text(self)

    def __rich__(self) -> Group:
        """The table that rich prints."""
        return history_table.rich_table(self)

    def _repr_html_(self) -> str:
        """The table that a notebook displays."""
        return history_table.html_page_part(self)

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, numbers and strings, fit for JSON and for `weights_only` checkpoints."""
        plain = asdict(self)
        for event in (plain["initial"], *plain["events"]):
            for name in ("changes", "removed_blocks", "restored_blocks"):
                event[name] = list(event[name])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> History:
        """Restore what `to_dict` returned.

        Raises:
            TypeError: if it holds something else.
        """

        def event(entry: Mapping[str, Any]) -> Event:
            changes = tuple(WidthChange(**change) for change in entry["changes"])
            blocks = {name: tuple(entry.get(name, ())) for name in ("removed_blocks", "restored_blocks")}
            return Event(**{**entry, **blocks, "changes": changes, "sizes": dict(entry["sizes"])})

        events = [event(entry) for entry in plain["events"]]
        history = cls(event(plain["initial"]), events, dict(plain.get("frozen", {})), dict(plain.get("ranks", {})))
        check_types(history, cls, "history")
        return history


def changed(before: Mapping[str, int], after: Mapping[str, int], reasons: Mapping[str, str]) -> list[WidthChange]:
    """The widths among `reasons` that have another size after than before.

    >>> changed({"0": 8, "2": 4}, {"0": 6, "2": 4}, {"0": "too wide", "2": "too wide"})
    [WidthChange(width='0', before=8, after=6, reason='too wide')]
    """
    return [
        WidthChange(name, before[name], after[name], reason)
        for name, reason in reasons.items()
        if name in after and before[name] != after[name]
    ]
