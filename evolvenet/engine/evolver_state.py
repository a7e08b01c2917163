"""What an `Evolver` keeps between events, and how a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from evolvenet.engine.announcements import announce
from evolvenet.engine.batch_buffer import BatchBuffer
from evolvenet.engine.distributed import process_group
from evolvenet.engine.failure_policy import FailurePolicy
from evolvenet.engine.history import Event, History, WidthChange
from evolvenet.engine.original_widths import OriginalWidths
from evolvenet.engine.reporting import Reported
from evolvenet.engine.snapshot import PendingCut
from evolvenet.execution.inputs import is_plain
from evolvenet.execution.step import batch_of
from evolvenet.graph.format_version import FORMAT, FORMAT_KEY, checked_format
from evolvenet.graph.plain_data import check_types, reading
from evolvenet.graph.renaming import Rename, same_widths
from evolvenet.graph.restriction import Restriction, fixed_names
from evolvenet.graph.serialization import check_fits, check_shapes, from_state_dict, to_state_dict
from evolvenet.graph.width_graph import ChosenOutputs, WidthGraph
from evolvenet.lowrank.layer_ranks import LowRank
from evolvenet.measurement.calibration import LEAST
from evolvenet.measurement.cost import parameters
from evolvenet.measurement.past_events import PastEvents
from evolvenet.policies.base import Policy
from evolvenet.signals import deferred_signals
from evolvenet.surgery.checkpoint import WidthRecord, fit_shapes
from evolvenet.surgery.width_record import remember_widths


class EvolverState(Reported):
    """The state of an `Evolver`, which alone is made."""

    model: nn.Module
    policy: Policy
    lowrank: LowRank | None
    example_inputs: Any
    graph: WidthGraph
    original: OriginalWidths
    history: History
    calibration_batches: Any
    optimizers: list[Optimizer]
    after_change: Callable[[], object]
    _copies: Callable[[], Sequence[nn.Module]]
    _macs: int
    _original_before_cut: OriginalWidths
    _restriction: Restriction
    _restriction_given: Restriction
    _outputs: ChosenOutputs
    _path: str
    _buffer: BatchBuffer
    _observed: int
    _seed: int
    _past: PastEvents
    _failures: FailurePolicy
    _pending_cut: PendingCut | None
    _fixed: tuple[str, ...] | None = None
    """Names that take the place of the user's patterns once layers have got other names."""

    @property
    def off(self) -> str | None:
        """Why widths stay as they are for the rest of the run; None while they may change."""
        return self._failures.off

    @property
    def has_changed(self) -> bool:
        """Whether any width has other units than at the start, or a layer has become a chain."""
        return self.original.has_changed or self.original.made_chains(self.graph)

    @property
    def observed(self) -> int:
        """Batches that an event would measure on now."""
        return len(self._buffer)

    def state_dict(self, all_ranks: bool = False) -> dict[str, Any]:
        """What a resumed run needs besides the model: plain data, and the tensors of the batches observed so far.

        Args:
            all_ranks: with the batches of all processes, on rank 0, which saves it for all: then all of them call this.
                Otherwise with those of this one.
        """
        ranks = {"ranks": self._buffer.gathered_state_dict(process_group())} if all_ranks else {}
        return {
            FORMAT_KEY: FORMAT,
            **ranks,
            "history": self.history.to_dict(),
            "observed": self._observed,
            **self._past.state_dict(),
            "calibration_batches": self.calibration_batches,
            "graph": to_state_dict(self.graph),
            "original": [each.state_dict() for each in (self.original, self._original_before_cut)],
            **self._buffer.state_dict(),
            **self._failures.state_dict(),
            "fixed": None if self._fixed is None else list(self._fixed),
            "note": WidthRecord.of(self.model, self.graph).values(self.model),
            "pending_cut": self._pending_cut.state_dict() if self._pending_cut else None,
            # A cut may have to be taken back before the first batch of a resumed run.
            "example": [
                batch_of(x)
                for x in (self.example_inputs,)
                if self._pending_cut and self._pending_cut.snapshot and is_plain(x)
            ],
        }

    @deferred_signals("the load of the evolver's state")
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was called.

        Raises:
            RecordError: if the model does not have the widths of that moment, a newer EvolveNet has written the state, or it is
                damaged. Nothing has changed then.
        """
        before = self._fixed
        try:
            with reading("The state of the Evolver"):
                self._load_state_dict(state)
        except BaseException:
            self._fix(before)
            raise

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Read everything, then the model's numbers and buffers, then assign."""
        checked_format(state, "The state of the Evolver")
        check_types(state.get("fixed"), list[str] | None, "fixed")
        self._fix(state.get("fixed"))
        graph = self._restricted(from_state_dict(state["graph"]))
        check_fits(graph, self.model, besides=state["note"]["buffers"])
        check_shapes(graph, state["note"]["buffers"])
        original, before_cut = map(OriginalWidths.from_state_dict, state["original"])
        original.check_fits(graph)
        history = replace(History.from_dict(state["history"]), frozen=graph.reasons)
        past = PastEvents.from_state_dict(state)
        counts = {name: state[name] for name in ("observed", "calibration_batches")}
        check_types(counts, dict[str, int | None], "state")
        buffer = BatchBuffer(self._buffer.example, counts["calibration_batches"] or LEAST)
        buffer.load_state_dict(state, process_group())
        failures, pending = FailurePolicy(self.off), self._pending_cut
        failures.load_state_dict(state)
        if pending and state.get("pending_cut"):
            pending = PendingCut(pending.policy)
            pending.load_state_dict(state["pending_cut"])
        fit_shapes(self.model, {}, record=state["note"])
        self.graph, self.original, self._original_before_cut = graph, original, before_cut
        remember_widths(self.model, graph, original.sizes)
        self.history, self._past, self._buffer, self._failures = history, past, buffer, failures
        self._observed, self.calibration_batches = state["observed"], state["calibration_batches"]
        self._pending_cut = pending

    def _named(self) -> dict[str, Any]:
        """What is kept by the names of widths and modules, as plain data."""
        return {
            "initial": dict(self.history.initial.sizes),
            "ranks": dict(self.history.ranks),
            "past": self._past.state_dict(),
            "fixed": None if self._fixed is None else list(self._fixed),
        }

    def _load_names(self, named: Mapping[str, Any]) -> None:
        """What `_named` returned is as it was then; the number of events goes on."""
        for live, before in ((self.history.initial.sizes, named["initial"]), (self.history.ranks, named["ranks"])):
            live.clear()
            live.update(before)
        before = PastEvents.from_state_dict(named["past"])
        self._past = replace(before, count=self._past.count, progress=self._past.progress)
        self._fix(named["fixed"])

    def _fix(self, names: Sequence[str] | None) -> None:
        """Restrict the run by these names from now on, instead of by the user's patterns, which are older; None for those."""
        self._fixed = None if names is None else tuple(names)
        given = self._restriction_given
        self._restriction = given if names is None else Restriction(None, self._fixed or (), given.multiple)
        if self.lowrank is not None:
            self.lowrank = replace(self.lowrank, restriction=self._restriction)

    @deferred_signals("the exchange of the graph")
    def adopt(self, graph: WidthGraph, rename: Rename = str) -> dict[str, str]:
        """Go on with another graph of the same model as it is, from a trace that has reached more of it.

        Args:
            graph: the widths.
            rename: the names that modules and tensors have in it, where blocks have been removed.

        Returns:
            {name of a width from now on: name before}.
        """
        check_fits(graph, self.model)
        if rename is not str:
            fixed = fixed_names(self._restriction, self._path, self.graph)
            self._fix([new for name in fixed if (new := rename(name)) is not None])
        graph = self._restricted(graph)
        known = same_widths(self.graph, graph, rename)
        original = self.original.renamed(known, graph)
        whole = {name: rename(name) for name in self.history.initial.sizes if name not in self.graph.widths}
        names = {**{new: name for name, new in whole.items() if new is not None and new not in graph.widths}, **known}
        first, ranks = self.history.initial.sizes, self.history.ranks
        sizes = {new: first[name] for new, name in names.items() if name in first} | {
            name: size for name, size in graph.sizes.items() if known.get(name) not in first
        }
        layers = {
            new: layer for new, name in names.items() if name in ranks and (layer := rename(ranks[name])) is not None
        }
        if rename is not str:
            self._past = self._past.renamed(names)
            if self._pending_cut:
                self._pending_cut.rename(names)
        self.graph, self.original = graph, original
        remember_widths(self.model, graph, self.original.sizes)
        first.clear()
        first.update(sizes)
        ranks.clear()
        ranks.update({**layers, **graph.rank_layers})
        self.history.frozen = graph.reasons
        return names

    def _reported_settings(self) -> dict[str, str]:
        limits = self._restriction
        given = {"network": limits.network, "fixed": limits.fixed or None, "multiple": limits.multiple}
        shown = {name: str(value) for name, value in given.items() if value not in (None, 1)}
        return {"seed": str(self._seed), "calibration batches": str(self.calibration_batches), **shown}

    def _restricted(self, graph: WidthGraph) -> WidthGraph:
        # A graph that was read from a checkpoint has no functions.
        return replace(self._restriction.apply(graph, self._path), outputs=self._outputs or graph.outputs)

    def _record(self, event: Event) -> Event:
        announce(event)
        self.history.events.append(event)
        self.history.ranks.update(self.graph.rank_layers)
        return event

    def _event(
        self,
        at: int,
        changes: Sequence[WidthChange],
        before: int,
        seconds: float,
        skipped: str | None = None,
        **found: Any,
    ) -> Event:
        count, sizes = parameters(self.model), dict(self.graph.sizes)
        return Event(at, tuple(changes), sizes, before, count, self._macs, seconds, skipped, **found)
