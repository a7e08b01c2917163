"""`Evolver`: the engine for any training loop. Observe batches, and step now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import reset_compiled_code, tree_map_only
from evolvenet.engine.batch_buffer import BatchBuffer
from evolvenet.engine.decision import decide
from evolvenet.engine.distributed import (
    ProcessGroup,
    check_agreement,
    fingerprint,
    process_group,
    run_on_all_ranks,
    run_on_rank_0,
)
from evolvenet.engine.event_data import EventData
from evolvenet.engine.event_record import OutputChange, recorded
from evolvenet.engine.evolver_cuts import EvolverCuts
from evolvenet.engine.failure_policy import FailurePolicy
from evolvenet.engine.history import Event, History, WidthChange, changed
from evolvenet.engine.invariants import ModelReference, check_resizable, validate
from evolvenet.engine.original_widths import OriginalWidths, at_first_sizes
from evolvenet.engine.proposals import apply_proposals
from evolvenet.engine.repetitions import Repetitions
from evolvenet.engine.run_checks import (
    fixed_by_optimizers,
    have_state,
    rank_changes_possible,
    unreachable,
    warn,
    without_loss,
)
from evolvenet.engine.snapshot import PendingCut
from evolvenet.engine.transaction import Transaction
from evolvenet.errors import RankMismatchError, stage, stage_times
from evolvenet.execution.chosen_outputs import Outputs, normalized
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.step import Step
from evolvenet.graph.current import check_current
from evolvenet.graph.restriction import Patterns, Restriction
from evolvenet.graph.whole import check_whole
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.plan import NewUnits
from evolvenet.lowrank.layer_ranks import low_rank
from evolvenet.measurement.calibration import LEAST, batches_needed, places_per_sample
from evolvenet.measurement.cost import macs, parameters
from evolvenet.measurement.past_events import PastEvents
from evolvenet.policies.base import JudgingPolicy, Policy, judged_metric
from evolvenet.signals import deferred_signals
from evolvenet.surgery.optimizer_parameters import as_list
from evolvenet.surgery.width_record import remember_widths
from evolvenet.tracing.unreached import trace_for_training


class Evolver(EvolverCuts):
    """Changes a model's widths while it trains, in any loop.

    Call `observe` with the model's inputs on some training batches and `step` between two optimizer steps, never between
    a forward and its backward pass.

    Under torch.distributed every process calls both at the same places. Rank 0 measures on batches of all ranks and decides,
    the others do the same. A `DistributedDataParallel` wrapper must be made anew after a change: `after_change` is called
    then.

    Args:
        model: the model; it keeps its parameters' identity throughout.
        optimizer: the optimizer that holds them, or several; None for none.
        policy: proposes sizes, for example `Threshold`, or one of your own (see `Policy`).
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments. With
            `step` a batch.
        calibration_batches: how many of the last batches an event measures on; None for as many as the widest width needs.
        seed: of the new units' random directions; they do not draw from the global generator.
        copies: models with the same tensor names, such as a moving average: they go along. Or what gives them when it is due.
        after_change: called after widths have changed, on every rank.
        graph: the model's widths, from `trace` or an earlier run; None to trace the model here.
        step: a function of a batch that computes the loss as training does, for several networks, or losses that read what
            lies between layers. It is traced and measured in place of calls of the model, in eval mode and without
            gradients, so it must not step an optimizer.
        network: parts outside of which widths stay, like the next two see `evolvenet.graph.restriction.Restriction`.
        fixed: widths that stay.
        multiple: of which the channels of a width that changes are a multiple.
        path: of the model in a larger module, by whose names `network` and `fixed` may go.
        outputs: which of the model's outputs count, as for `trace`; with `step`, of what that returns.
        new_units: how they start, see the `method` of `grow`; "gradmax" and "tiny" need the loss, from `step` or a model that
            returns its own as `loss`. Without it new units are "orthogonal", with a warning when the evolver is made.
        update: whether the weights around new units then move so that the loss of the observed batches falls, see `grow`; needs
            the loss as well, and moves only what the optimizer holds.

    Raises:
        TraceError: if the model does not run on the example inputs, or nothing in it can be resized.
        PolicyError: for a policy without a method `propose`, an unknown `new_units`, or a name in `network` or `fixed` that
            matches nothing.

    >>> from evolvenet import Threshold
    >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> evolver = Evolver(model, optimizer, Threshold(prune=0.2), torch.zeros(1, 4))
    >>> evolver.observe(torch.randn(256, 4))
    >>> event = evolver.step()
    >>> event.sizes["0"] < 64
    True
    """

    _optimizers_checked: bool | None = None
    """Whether the optimizers had state when they were last checked."""

    def __init__(  # noqa: PLR0913  public: each is one setting of a run
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        policy: Policy,
        example_inputs: Any,
        calibration_batches: int | None = None,
        seed: int = 0,
        copies: Sequence[nn.Module] | Callable[[], Sequence[nn.Module]] = (),
        after_change: Callable[[], object] = lambda: None,
        graph: WidthGraph | None = None,
        step: Callable[[Any], Any] | None = None,
        network: Patterns | None = None,
        fixed: Patterns = (),
        multiple: int = 1,
        path: str = "",
        outputs: Outputs | None = None,
        new_units: str = "orthogonal",
        update: bool = False,
    ) -> None:
        # Over 40 lines: the signature, whose arguments are listed one a line.
        self._pending_cut = PendingCut(cast(JudgingPolicy, policy)) if judged_metric(policy) is not None else None
        if step is not None:
            example_inputs = Step(lambda _, batch: step(batch), example_inputs)
        self.model, self.policy = model, policy
        self.optimizers = as_list(optimizer)
        # Clones: a view would keep the whole batch in memory.
        self.example_inputs = tree_map_only(Tensor, torch.clone, first_samples(example_inputs, 2))
        self.copies, self.after_change = copies, after_change
        self._restriction = self._restriction_given = Restriction(network, fixed, multiple)
        self._path, self._new_units = path, NewUnits(new_units, update)
        self._outputs = normalized(outputs)
        self.graph = self._restricted(graph or trace_for_training(model, self.example_inputs, outputs))
        self.original = self._original_before_cut = OriginalWidths.of(self.graph)
        (check_resizable if graph is None else check_current)(model, self.graph)
        if not path:
            self._restriction.check((name for name, _ in model.named_modules()), self.graph)
        remember_widths(model, self.graph)
        self.lowrank = low_rank(policy, self._restriction, path)
        self._macs = macs(self.model, self.example_inputs, self.graph.differentiates)
        self.history = History.of(self._event(0, (), parameters(model), 0.0), self.graph)
        self.calibration_batches, self._seed, self._observed = calibration_batches, seed, 0
        self._buffer = BatchBuffer(example_inputs, calibration_batches or LEAST)
        self._past, self._failures = PastEvents(), FailurePolicy()
        self._check_optimizers()
        warn(without_loss(self._new_units, model, self.example_inputs))
        warn(unreachable(policy, model, self.graph, self.example_inputs, self.lowrank))

    def observe(self, batch: Any, gradients: Sequence[Tensor | None] = (), copy: bool = True) -> None:
        """Remember a copy of a batch to measure on. Nothing is computed until `step`.

        Args:
            batch: the model's inputs, as `example_inputs`; of a longer tuple (inputs, targets) the first are taken.
            gradients: of the loss with respect to each tensor that the model answered with in training, or to its first
                samples; with them, widths grow only where the loss test passes. None of them is changed.
            copy: False for what nobody writes to any more: it is kept itself, without a copy.
        """
        self._check_optimizers()
        self.calibrate(batch)
        self._buffer.add(batch, gradients, copy, process_group().size)
        self._observed += 1

    def calibrate(self, batch: Any, epoch: float = math.inf) -> None:
        """Set how many batches like this one an event measures on, if that was not given; an epoch has `epoch`."""
        if self.calibration_batches is None:
            places = places_per_sample(self.model, self.graph, self.example_inputs)
            needed = process_group().broadcast(batches_needed(self.graph, places, batch, epoch))
            self.calibration_batches = needed
            self._buffer.keep(needed)

    def forget(self) -> None:
        """Let go of the batches observed so far."""
        self._buffer.clear()

    @deferred_signals("the event")
    def step(self, at: int | None = None, progress: float | None = None) -> Event:
        """Measure, let the policy decide, and change the widths.

        All or nothing: on any problem the model, its copies and the optimizers are as before, and training goes on. A width
        on which measuring, planning or validating fails is frozen with the reason, and the event is repeated without it. Where
        no single width is at fault and the same stage fails a second time, evolution is switched off (`evolver.off` says why).

        Args:
            at: the optimizer step to write into the record; by default the number of batches observed.
            progress: share of the run that is done, 0 … 1, for policies with a schedule; None where that is unknown, which
                is the end of every schedule.

        Returns:
            What happened; `event.skipped` says why nothing did, if it should have.

        Raises:
            RankMismatchError: if the processes that train the model do not agree on it.
            UnsupportedStrategyError: if the model is sharded, see `evolvenet.whole_parameters`.
        """
        check_whole(self.model)
        started = time.perf_counter()
        before = parameters(self.model)
        moment = self._observed if at is None else at
        group = process_group()
        self._check_optimizers()
        if (off := self._agree_on_off(group)) is not None:
            return self._event(moment, (), before, 0.0, off)
        check_agreement(
            group, "event, step and widths", f"event {self._past.count} at step {moment}, {self.graph.sizes}"
        )
        # Before anything is done: making DDP's wrapper anew would hide it by sending rank 0's weights to all.
        check_agreement(group, "weights", fingerprint(self.model) if group.size > 1 else "")
        # A second run begins at 0 again.
        previous = None if progress is None else self._past.progress if progress >= self._past.progress else 0.0
        self._past = self._past.next(1.0 if progress is None else progress)
        changes: list[WidthChange] = []
        with stage_times() as stages:
            removed = self._remove_by_policy(group, moment, previous)
            found, skipped = self._attempt(group, moment, changes, previous)
        check_agreement(group, "weights", fingerprint(self.model) if group.size > 1 else "")
        seconds = time.perf_counter() - started
        return self._record(
            self._event(moment, changes, before, seconds, skipped, removed_blocks=removed, stages=stages, **found)
        )

    @contextmanager
    def restored(self, why: str) -> Iterator[None]:
        """All widths get their first sizes, since the model's code has met layers that do not fit each other any more.

        If the body raises, everything is as before. If not, evolution is off: what must fit what is not known. `why` is recorded.
        """
        with deferred_signals("the return to the first widths"):
            before, started, count = self.history.sizes(self.graph), time.perf_counter(), parameters(self.model)
            with at_first_sizes(self.original, self.model, self.graph, self.optimizers, self._copies()) as graph:
                yield
            self.graph, self.original = graph, OriginalWidths.of(graph)
            reset_compiled_code()
            self._macs = macs(self.model, self.example_inputs, self.graph.differentiates)
            self._failures.off = f"all widths have their first sizes again, and keep them: {why}"
            changes = changed(before, self.history.sizes(self.graph), dict.fromkeys(before, self._failures.off))
            self._record(self._event(self._observed, changes, count, time.perf_counter() - started))

    def _check_optimizers(self) -> None:
        """Switch evolution, or the changes of ranks alone, off where an optimizer could not follow; with a warning.

        Checked twice: with what the optimizers hold before the run, and once they have made their state in its first step.
        """
        found = have_state(self.optimizers)
        if self._optimizers_checked is None or found > self._optimizers_checked:
            self._optimizers_checked = found
            self._failures.off = self.off or fixed_by_optimizers(self.optimizers, self.model)
            if self.off is None:
                self.lowrank = rank_changes_possible(self.lowrank, self.optimizers, self.model)

    def _copies(self) -> Sequence[nn.Module]:
        return self.copies() if callable(self.copies) else self.copies

    def _revert(self, state: tuple[Any, ...], changes: list[WidthChange]) -> None:
        """Restore the evolver's own state, after the model's, where an event has failed."""
        self.graph, self.original, self._past, self._macs = state
        if changes:
            changes.clear()
            # Wrappers of the model were made for the shapes that have just been reverted.
            with stage("after_change"):
                self.after_change()

    def _attempt(
        self, group: ProcessGroup, moment: int, changes: list[WidthChange], previous: float | None
    ) -> tuple[dict[str, Any], str | None]:
        """One event, repeated without the widths on which it fails; what `_evolve` returns, and why it was skipped."""
        whole, tried, event = self.graph, list[str](), Repetitions(self._failures, group, moment, self.graph)
        while True:
            tried.clear()
            try:
                with ExitStack() as undo:
                    undo.callback(self._revert, (self.graph, self.original, self._past, self._macs), changes)
                    # Before the changes are taken back.
                    undo.callback(lambda: tried.extend(change.width for change in changes))
                    found = self._evolve(group, changes, undo, previous)
                    if event.ends_after_success():
                        undo.pop_all()
                        break
            except RankMismatchError:
                raise
            except Exception as problem:  # noqa: BLE001  whatever it was, everything is as before and the run can go on
                if event.ends_after_failure(problem, tried):
                    self.graph = whole
                    return {}, self._failures.explain(group, moment, problem)
            self.graph = event.graph
        if event.rests:
            self.graph = event.with_widths_back(self.graph)
            self.history.frozen = self.graph.reasons
            remember_widths(self.model, self.graph, self.original.sizes)
        for each in event.rests:
            warn(each.message)
        return found, None

    def _evolve(
        self, group: ProcessGroup, changes: list[WidthChange], undo: ExitStack, previous: float | None
    ) -> dict[str, Any]:
        """One event; the changed widths are appended to `changes`, and `undo` reverts them.

        Returns:
            What was measured, as fields of an `Event`.
        """
        # Over 40 lines: every step of an event is named as a stage, in the order in which they are undone.
        with stage("batch gathering"):
            batches, gradients = self._buffer.gather(group)
        inputs = self.example_inputs
        data = EventData(
            self.model, self.graph, inputs, batches, gradients, self._past, previous, self._seed, self.lowrank,
            self._new_units, self.optimizers,
        )  # fmt: skip
        initial = self.history.initial.sizes
        measures, proposals = run_on_rank_0(group, lambda: decide(self.policy, data, initial, self._pending_cut))
        known = {name: each.energies for name, each in measures.items() if name in self.graph.widths}
        self._past = self._past.with_energies(known)
        past, own, compared = None, self.graph.differentiates, {}
        with stage("policy"):
            due = any(proposal.size != self.graph.sizes.get(name) for name, proposal in proposals.items())
        if due:
            with stage("validation"):
                before = run_on_all_ranks(group, lambda: ModelReference.of(self.model, inputs, self.graph))
            with stage("replica update"):
                copies = run_on_all_ranks(group, self._copies)
            with stage("snapshot"):
                past = self._snapshot(group, copies) if self._pending_cut else None
                self._original_before_cut = self.original
            with stage("output change"):
                outputs = OutputChange.of(group, self.model, batches, self.graph)
            change = Transaction(group, self.model, self.optimizers, copies, batches, undo, changes)
            found = apply_proposals(change, proposals, data, self.original, self._past, initial)
            self.graph, self.original, self._past = found
            with stage("output change"):
                compared = outputs.compared(self.model, self.graph, measures)
            with stage("validation"):
                kept = before.with_layers_of(self.model) if self.lowrank else before
                run_on_all_ranks(group, lambda: validate(self.model, self.graph, self.optimizers, inputs, kept))
            with stage("cost count"):
                self._macs = run_on_all_ranks(group, lambda: macs(self.model, self.example_inputs, own))
            with stage("after_change"):
                run_on_all_ranks(group, self.after_change)
            reset_compiled_code()
        if self._pending_cut:
            undo.callback(vars(self._pending_cut).update, dict(vars(self._pending_cut)))
            self._pending_cut.record(past, [change.width for change in changes])
        return {**recorded(measures, self.graph.sizes), **compared}
