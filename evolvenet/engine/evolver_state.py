"""What an `Evolver` keeps between events, and how a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from evolvenet._compat.torch import reset_compiled_code
from evolvenet.engine.batch_buffer import BatchBuffer
from evolvenet.engine.depth import apply_removal, find_removals
from evolvenet.engine.distributed import process_group, run_on_all_ranks, run_on_rank_0
from evolvenet.engine.failure_policy import FailurePolicy
from evolvenet.engine.history import History
from evolvenet.engine.original_widths import OriginalWidths
from evolvenet.engine.snapshot import PendingCut
from evolvenet.execution.inputs import is_plain
from evolvenet.execution.step import batch_of
from evolvenet.graph.format_version import FORMAT, FORMAT_KEY, checked_format
from evolvenet.graph.restriction import Restriction
from evolvenet.graph.serialization import check_fits, from_state_dict, to_state_dict
from evolvenet.graph.width_graph import ChosenOutputs, WidthGraph
from evolvenet.measurement.calibration import LEAST
from evolvenet.measurement.cost import macs
from evolvenet.measurement.past_events import PastEvents
from evolvenet.signals import deferred_signals
from evolvenet.surgery.checkpoint import WidthRecord, fit_shapes
from evolvenet.surgery.width_record import remember_widths
from evolvenet.tracing.unreached import trace_for_training


class EvolverState:
    """The state of an `Evolver`, which is the only subclass."""

    model: nn.Module
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
    _outputs: ChosenOutputs
    _path: str
    _buffer: BatchBuffer
    _observed: int
    _past: PastEvents
    _failures: FailurePolicy
    _pending_cut: PendingCut | None

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

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model: plain data, and the tensors of the batches observed so far."""
        return {
            FORMAT_KEY: FORMAT,
            "history": self.history.to_dict(),
            "observed": self._observed,
            **self._past.state_dict(),
            "calibration_batches": self.calibration_batches,
            "graph": to_state_dict(self.graph),
            "original": [each.state_dict() for each in (self.original, self._original_before_cut)],
            **self._buffer.state_dict(),
            **self._failures.state_dict(),
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
            RecordError: if the model does not have the widths of that moment, or a newer EvolveNet has written the state.
                Nothing has changed then.
        """
        checked_format(state, "The state of the Evolver")
        graph = self._restricted(from_state_dict(state["graph"]))
        check_fits(graph, self.model, besides=state["note"]["buffers"])
        fit_shapes(self.model, {}, record=state["note"])
        self.graph = graph
        self.original, self._original_before_cut = map(OriginalWidths.from_state_dict, state["original"])
        remember_widths(self.model, graph, self.original.sizes)
        self.history = replace(History.from_dict(state["history"]), frozen=graph.reasons)
        self._observed, self._past = state["observed"], PastEvents.from_state_dict(state)
        self.calibration_batches = state["calibration_batches"]
        self._buffer.keep(self.calibration_batches or LEAST)
        self._buffer.load_state_dict(state)
        self._failures.load_state_dict(state)
        if self._pending_cut and state.get("pending_cut"):
            self._pending_cut.load_state_dict(state["pending_cut"])

    @deferred_signals("the removal of blocks")
    def remove_blocks(self, share: float = 0.0) -> tuple[str, ...]:
        """Remove residual blocks and branches that carry nothing, whatever the policy, see `evolvenet.remove_blocks`.

        They are looked for on the batches observed so far, on rank 0; all ranks and copies do the same, or none does anything.
        Call it where `step` could be called, for example after each. While a cut is still to be judged (`Tolerance`) nothing is
        removed, so that the cut can be undone.

        Args:
            share: of the energy, that may be lost with each.

        Returns:
            The paths of what was removed.

        Raises:
            EvolveNetError: where it fails on one of several processes. Everything is as before then.
        """
        if self._pending_cut and self._pending_cut.snapshot:
            return ()
        group = process_group()
        batches, _ = self._buffer.gather(group)
        inputs = batches or [self.example_inputs]
        removals = run_on_rank_0(group, lambda: find_removals(self.model, inputs, share))
        if not removals:
            return ()
        copies = run_on_all_ranks(group, self._copies)

        def remove() -> WidthGraph:
            for removal in removals:
                for model in (self.model, *copies):
                    apply_removal(model, removal, self.optimizers if model is self.model else (), undo)
            return trace_for_training(self.model, self.example_inputs, self._outputs)

        history, sizes = self.history, dict(self.history.initial.sizes)
        known, ranks = (self.graph, self.original, history.frozen), dict(history.ranks)

        def go_back() -> None:
            self.graph, self.original, history.frozen = known
            history.initial.sizes.clear()
            history.initial.sizes.update(sizes)
            history.ranks.clear()
            history.ranks.update(ranks)
            # Wrappers that were renewed hold the parameters that have come back.
            self.after_change()

        with ExitStack() as undo:
            undo.callback(go_back)
            graph = run_on_all_ranks(group, remove)
            run_on_all_ranks(group, self.after_change)
            self.adopt(graph)
            undo.pop_all()
        self._macs = macs(self.model, self.example_inputs, self.graph.differentiates)
        reset_compiled_code()
        return tuple(removal.path for removal in reversed(removals))

    @deferred_signals("the exchange of the graph")
    def adopt(self, graph: WidthGraph) -> None:
        """Go on with another graph of the same model as it is, from a trace that has reached more of it."""
        check_fits(graph, self.model)
        graph = self._restricted(graph)
        self.graph, self.original = graph, self.original.renamed(self.graph, graph)
        remember_widths(self.model, graph, self.original.sizes)
        first = {**graph.sizes, **self.history.initial.sizes}
        self.history.initial.sizes.clear()
        # Those of removed blocks are gone.
        self.history.initial.sizes.update({name: size for name, size in first.items() if name in graph.widths})
        self.history.frozen = graph.reasons
        self.history.ranks.update(graph.rank_layers)

    def _restricted(self, graph: WidthGraph) -> WidthGraph:
        # A graph that was read from a checkpoint has no functions.
        return replace(self._restriction.apply(graph, self._path), outputs=self._outputs or graph.outputs)
