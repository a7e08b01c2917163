"""`Evolver`: the engine for any training loop. Observe batches, and step now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from evolvenet.engine.batch_buffer import BatchBuffer
from evolvenet.engine.distributed import (
    ProcessGroup,
    broadcast_surgery,
    check_agreement,
    fingerprint,
    process_group,
    run_on_all_ranks,
    run_on_rank_0,
)
from evolvenet.engine.failure_policy import FailurePolicy
from evolvenet.engine.functional import apply, as_list
from evolvenet.engine.history import Event, History, WidthChange, changed
from evolvenet.engine.invariants import ModelReference, check_finite_weights, check_resizable, validate
from evolvenet.engine.replica_update import plan_replica_update, without_shared_tensors
from evolvenet.engine.snapshot import PendingCut, Snapshot, roll_back
from evolvenet.errors import RankMismatchError, SkippedEvent
from evolvenet.execution.inputs import first_samples, is_plain
from evolvenet.execution.isolation import reset_compiled_code
from evolvenet.graph.serialization import check_fits, from_plain, to_plain
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.loss_test import Gradients, evidence
from evolvenet.growth.plan import plan_growth
from evolvenet.measurement.activation_moments import ActivationMoments, collect
from evolvenet.measurement.cost import Costs, macs, parameters
from evolvenet.measurement.width_spectra import WidthStatistics, measures_of, ranks_and_energies
from evolvenet.policies.base import Judging, Policy, PolicyContext, Proposal, Scheduled
from evolvenet.pruning.allocation import trial_curves
from evolvenet.pruning.reconstruction import QUICK, reconstruct
from evolvenet.pruning.selection import plan_prune
from evolvenet.surgery.checkpoint import Note, fit_shapes
from evolvenet.surgery.resize_model import Surgery
from evolvenet.tracing.trace import trace

log = logging.getLogger("evolvenet")


class Evolver:
    """Changes a model's widths while it trains, in any loop.

    Call `observe` with the model's inputs on some training batches and `step` between two optimizer steps, never between
    a forward and its backward pass.

    Under torch.distributed every process calls both at the same places. Rank 0 measures on batches of all ranks and decides,
    the others do the same. A `DistributedDataParallel` wrapper must be made anew after a change: `after_change` is called
    then.

    Args:
        model: the model; it keeps its parameters' identity throughout.
        optimizer: the optimizer that holds them, or several; None for none.
        policy: proposes sizes from spectra, for example `Threshold`.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        calibration_batches: how many of the last observed batches an event measures on.
        seed: of the new units' random directions; they do not draw from the global generator.
        copies: models with the same tensor names and weights of their own, such as a moving average: they go along. Or what
            gives them when a change is due.
        after_change: called after widths have changed, on every rank.
        graph: the model's widths, from `trace` or an earlier run; None to trace the model here.

    Raises:
        TraceError: if the model does not run on the example inputs, or nothing in it can be resized.

    >>> from evolvenet import Threshold
    >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> evolver = Evolver(model, optimizer, Threshold(prune=0.01, grow=0.9), torch.zeros(1, 4))
    >>> evolver.observe(torch.randn(256, 4))
    >>> event = evolver.step()
    >>> event.sizes["0"] < 64
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        policy: Policy | Scheduled,
        example_inputs: Any,
        calibration_batches: int = 4,
        seed: int = 0,
        copies: Sequence[nn.Module] | Callable[[], Sequence[nn.Module]] = (),
        after_change: Callable[[], object] = lambda: None,
        graph: WidthGraph | None = None,
    ) -> None:
        self.model = model
        self.optimizers = as_list(optimizer)
        self.policy = policy
        # Clones: a view would keep the whole batch in memory.
        self.example_inputs = tree_map_only(Tensor, torch.clone, first_samples(example_inputs, 2))
        self.copies = copies
        self.after_change = after_change
        self.graph = graph or trace(model, self.example_inputs)
        check_resizable(model, self.graph)
        self._macs = macs(model, self.example_inputs)
        self.history = History(self._snapshot(0, (), parameters(model), 0.0))
        self._buffer = BatchBuffer(example_inputs, calibration_batches)
        self._observed = 0
        self._events = 0
        self._changed: dict[str, list[int]] = {}
        self._seed = seed
        self._stage = ""
        self._failures = FailurePolicy()
        self._pending_cut = PendingCut(policy) if isinstance(policy, Judging) else None

    @property
    def off(self) -> str | None:
        """Why widths stay as they are for the rest of the run; None while they may change."""
        return self._failures.off

    @property
    def observed(self) -> int:
        """Batches that an event would measure on now."""
        return len(self._buffer)

    def observe(self, batch: Any, gradients: Sequence[Tensor | None] = ()) -> None:
        """Remember a batch to measure on. Nothing is computed until `step`.

        Args:
            batch: the model's inputs, as `example_inputs`; of a longer tuple (inputs, targets) the first are taken.
            gradients: of the loss with respect to each tensor that the model answered with in training, or to its first
                samples; with them, widths grow only where the loss asks for it. None of them is changed.
        """
        self._buffer.add(batch, gradients)
        self._observed += 1

    def forget(self) -> None:
        """Let go of the batches observed so far."""
        self._buffer.clear()

    def step(self, at: int | None = None, progress: float = 1.0) -> Event:
        """Measure, let the policy decide, and change the widths.

        All or nothing: on any problem the model, its copies and the optimizers are as before, and training goes on. Where
        the same stage fails a second time, evolution is switched off for the rest of the run (`evolver.off` says why).

        Args:
            at: the optimizer step to write into the record; by default the number of batches observed.
            progress: share of the run that is done, 0 … 1, for policies with a schedule.

        Returns:
            What happened; `event.skipped` says why nothing did, if it should have.

        Raises:
            RankMismatchError: if the processes that train the model do not agree on it.
        """
        started = time.perf_counter()
        before = parameters(self.model)
        moment = self._observed if at is None else at
        if self.off is not None:
            return self._snapshot(moment, (), before, 0.0, self.off)
        group = process_group()
        check_agreement(group, "event, step and widths", f"event {self._events} at step {moment}, {self.graph.sizes}")
        # Before anything is done: making DDP's wrapper anew would hide it by sending rank 0's weights to all.
        check_agreement(group, "weights", fingerprint(self.model) if group.size > 1 else "")
        self._events += 1
        skipped, changes = None, []
        ranks, kept = {}, {}
        try:
            with self._all_or_nothing(changes) as undo:
                ranks, kept = self._evolve(group, changes, undo, progress)
        except RankMismatchError:
            raise
        except Exception as problem:  # noqa: BLE001  whatever it was, everything is as before and the run can go on
            skipped = self._failures.explain(group, self._stage, moment, problem)
        _tell(moment, changes)
        check_agreement(group, "weights", fingerprint(self.model) if group.size > 1 else "")
        event = self._snapshot(moment, tuple(changes), before, time.perf_counter() - started, skipped, ranks, kept)
        self.history.events.append(event)
        return event

    def judge(self, value: float, at: int | None = None) -> Event | None:
        """Tell a policy that judges its cuts, such as `Tolerance`, the value of its metric, after a validation.

        Where the last cut cost too much, the model, its copies and the optimizers' state are as before it again, and training
        goes on from there. Call it where `step` could be called. Every rank takes rank 0's value.

        Returns:
            The event, where a cut was taken back.
        """
        group, started = process_group(), time.perf_counter()
        value = group.broadcast(value)
        past = self._pending_cut.judge(value) if self._pending_cut else None
        if self._pending_cut is None or past is None:
            return None
        moment, sizes, count = self._observed if at is None else at, self.graph.sizes, parameters(self.model)
        skipped, reason = None, f"taken back: {value:.6g} after the cut, {self._pending_cut.standing.best:.6g} before"
        self._stage = "taking back"
        try:
            copies = run_on_all_ranks(group, self._copies)
            roll_back(group, past, self._present(copies), self, copies)
            self.graph = past.graph
        except RankMismatchError:
            raise
        except Exception as problem:  # noqa: BLE001  the cut then stays, and the run can go on
            skipped = self._failures.explain(group, self._stage, moment, problem)
        self._macs = macs(self.model, self.example_inputs)
        changes = changed(sizes, self.graph.sizes, dict.fromkeys(sizes, reason))
        _tell(moment, changes)
        event = self._snapshot(moment, tuple(changes), count, time.perf_counter() - started, skipped)
        self.history.events.append(event)
        return event

    def _present(self, copies: Sequence[nn.Module]) -> Snapshot:
        return Snapshot.of(self.model, self.graph, self.optimizers, copies)

    def _copies(self) -> Sequence[nn.Module]:
        return self.copies() if callable(self.copies) else self.copies

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model: plain data, and the tensors of the batches observed so far."""
        return {
            "history": self.history.to_dict(),
            "observed": self._observed,
            "events": self._events,
            "changed": {name: list(entry) for name, entry in self._changed.items()},
            "graph": to_plain(self.graph),
            **self._buffer.state_dict(),
            **self._failures.state_dict(),
            "note": Note.of(self.model, self.graph).read(self.model),
            "pending_cut": self._pending_cut.state_dict() if self._pending_cut else None,
            # A cut may have to be taken back before the first batch of a resumed run.
            "example": [
                x for x in (self.example_inputs,) if self._pending_cut and self._pending_cut.past and is_plain(x)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was called.

        Raises:
            RecordError: if the model does not have the widths of that moment. Nothing has changed then.
        """
        graph = from_plain(state["graph"])
        check_fits(graph, self.model, besides=state["note"]["buffers"])
        fit_shapes(self.model, {}, note=state["note"])
        self.graph = graph
        self.history = History.from_dict(state["history"])
        self._observed, self._events = state["observed"], state["events"]
        self._changed = {name: list(entry) for name, entry in state["changed"].items()}
        self._buffer.load_state_dict(state)
        self._failures.load_state_dict(state)
        if self._pending_cut and state.get("pending_cut"):
            self._pending_cut.load_state_dict(state["pending_cut"])

    @contextmanager
    def _all_or_nothing(self, changes: list[WidthChange]) -> Iterator[ExitStack]:
        """Where the body fails, what it put on the stack is undone, and the evolver is as before."""
        before = self.graph, dict(self._changed), self._macs
        undo = ExitStack()
        try:
            yield undo
        except BaseException:
            touched = bool(changes)
            undo.close()
            self.graph, self._changed, self._macs = before
            changes.clear()
            if touched:
                # What wraps the model was made for the shapes that are no more.
                self.after_change()
            raise
        undo.pop_all()

    def _evolve(
        self, group: ProcessGroup, changes: list[WidthChange], undo: ExitStack, progress: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One event: prune first, so that growth is paid for, then grow. What is done is added to `changes`.

        Returns:
            Of each width measured, the effective rank, and the share of the energy in as many directions as units stay.
        """
        past: Snapshot | None = None
        self._stage = "gathering batches"
        batches, gradients = self._buffer.gather(group)
        found: list[ActivationMoments] = []
        measures, proposals = run_on_rank_0(group, lambda: self._propose(batches, gradients, found, progress))
        sizes = self.graph.sizes
        down = {name: proposal for name, proposal in proposals.items() if proposal.size < sizes[name]}
        up = {name: proposal for name, proposal in proposals.items() if proposal.size > sizes[name]}
        if down or up:
            self._stage = "validation"
            before = run_on_all_ranks(group, lambda: ModelReference.of(self.model, self.example_inputs))
            self._stage = "weight averages"
            copies = run_on_all_ranks(group, self._copies)
            self._stage = "keeping what may be taken back"
            past = run_on_all_ranks(group, lambda: self._present(copies)) if self._pending_cut else None
            if down:
                self._change(
                    group, down, lambda: self._pruning(down, found[0], batches), batches, copies, changes, undo
                )
            if up:
                self._change(group, up, lambda: self._growth(up), batches, copies, changes, undo)
            self._stage = "validation"
            run_on_all_ranks(
                group, lambda: validate(self.model, self.graph, self.optimizers, self.example_inputs, before)
            )
            self._stage = "counting costs"
            self._macs = run_on_all_ranks(group, lambda: macs(self.model, self.example_inputs))
            self._stage = "what follows a change"
            run_on_all_ranks(group, self.after_change)
            reset_compiled_code()
        if self._pending_cut:
            self._pending_cut.cut(past, [change.width for change in changes])
        return ranks_and_energies(measures, self.graph.sizes)

    def _propose(
        self, batches: Sequence[Any], gradients: Sequence[Gradients], found: list[ActivationMoments], progress: float
    ) -> tuple[dict[str, WidthStatistics], dict[str, Proposal]]:
        """What was measured and what the policy makes of it; the statistics are added to `found`."""
        self._stage = "checking weights"
        check_finite_weights(self.model)
        if not batches:
            raise SkippedEvent(
                "Expected at least one observed batch to measure on, got none. Call observe(batch) first."
            )
        policy = self.policy
        if isinstance(policy, Scheduled):
            self._stage = "policy"
            costs = Costs.of(self.model, self.graph, self.example_inputs)
            trials = partial(trial_curves, self.model, self.graph, batches)
            standing = self._pending_cut and self._pending_cut.standing
            asked = partial(
                evidence, self.model, self.graph, batches=batches, gradients=gradients, generator=self._generator()
            )
            policy = policy.at(PolicyContext(progress, self.history.initial.sizes, costs, trials, standing, asked))
            if policy is None:
                return {}, {}
        self._stage = "statistics"
        statistics = collect(self.model, self.graph, batches)
        found.append(statistics)
        self._stage = "spectra"
        measures = measures_of(self.model, self.graph, statistics, self._changed, self._events)
        self._stage = "policy"
        return measures, dict(policy.propose(measures, self.graph))

    def _pruning(
        self, wanted: Mapping[str, Proposal], statistics: ActivationMoments, batches: Sequence[Any]
    ) -> Surgery:
        self._stage = "choosing units"
        surgery = plan_prune(self.model, self.graph, {name: each.size for name, each in wanted.items()}, statistics)
        self._stage = "compensation"
        return reconstruct(self.model, self.graph, surgery, batches, QUICK)

    def _growth(self, wanted: Mapping[str, Proposal]) -> Surgery:
        self._stage = "growth"
        sizes = {name: each.size for name, each in wanted.items()}
        return plan_growth(self.model, self.graph, sizes, generator=self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed + self._events)

    def _change(
        self,
        group: ProcessGroup,
        wanted: Mapping[str, Proposal],
        decide: Callable[[], Surgery],
        batches: Sequence[Any],
        copies: Sequence[nn.Module],
        changes: list[WidthChange],
        undo: ExitStack,
    ) -> None:
        graph = self.graph
        surgery = broadcast_surgery(group, self.model, graph, decide)
        self._stage = "weight averages"
        # Of each copy before the model itself changes, which a copy may share buffers with.
        replicas: list[tuple[nn.Module, Surgery]] = []
        for copy in copies:
            own = broadcast_surgery(group, copy, graph, partial(plan_replica_update, copy, graph, surgery, batches))
            replicas.append((copy, without_shared_tensors(own, self.model)))
        self._stage = "surgery"
        reasons = {name: proposal.reason for name, proposal in wanted.items()}
        changes.extend(changed(graph.sizes, surgery.graph.sizes, reasons))
        run_on_all_ranks(group, lambda: apply(self.model, surgery, self.optimizers, undo))
        for copy, own in replicas:
            run_on_all_ranks(group, partial(apply, copy, own, (), undo))
        self.graph = surgery.graph
        after = self.graph.sizes
        for name in wanted:
            units = after[name] - graph.widths[name].size
            _, last_change, reversals = self._changed.get(name, (0, 0, 0))
            self._changed[name] = [self._events, units, reversals + (units * last_change < 0)]

    def _snapshot(
        self,
        at: int,
        changes: tuple[WidthChange, ...],
        before: int,
        seconds: float,
        skipped: str | None = None,
        ranks: dict[str, float] | None = None,
        kept: dict[str, float] | None = None,
    ) -> Event:
        count = parameters(self.model)
        sizes = dict(self.graph.sizes)
        return Event(at, changes, sizes, before, count, self._macs, seconds, skipped, ranks or {}, kept or {})


def _tell(moment: int, changes: Iterable[WidthChange]) -> None:
    for change in changes:
        log.info("step %d: %s %d → %d: %s", moment, change.width, change.before, change.after, change.reason)
