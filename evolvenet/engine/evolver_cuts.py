"""Cuts of an `Evolver` besides those of widths: blocks that are removed whole, and cuts that are taken back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import cast

from torch import nn

from evolvenet._compat.torch import reset_compiled_code
from evolvenet.engine.depth import (
    Removal,
    apply_removal,
    energy_limit,
    find_removals,
    removals_of_policy,
    removes_blocks,
    renaming,
)
from evolvenet.engine.distributed import (
    ProcessGroup,
    process_group,
    run_on_all_ranks,
    run_on_rank_0,
)
from evolvenet.engine.event_data import EventData
from evolvenet.engine.evolver_state import EvolverState
from evolvenet.engine.failure_policy import BLOCK_REMOVAL
from evolvenet.engine.history import Event, changed
from evolvenet.engine.snapshot import Snapshot, TrainingRun, roll_back
from evolvenet.errors import RankMismatchError, stage
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.cost import macs, parameters
from evolvenet.signals import deferred_signals
from evolvenet.surgery.width_record import remember_widths
from evolvenet.tracing.unreached import trace_for_training


class EvolverCuts(EvolverState):
    """What an `Evolver` does to blocks, and to cuts that a policy judges."""

    @deferred_signals("the judgement of the last cut")
    def judge(self, value: float, at: int | None = None) -> Event | None:
        """Tell a policy that judges its cuts, such as `Tolerance`, the value of its metric, after a validation.

        Where the last cut cost too much, the model, its copies and the optimizers' state are as before it again, and training
        goes on from there. Call it where `step` could be called. Every rank takes rank 0's value.

        Returns:
            The event, where a cut was taken back.
        """
        # Over 40 lines: each step of a rollback is named as a stage, with what follows where it fails.
        group, started = process_group(), time.perf_counter()
        value = group.broadcast(value)
        cut, moment = self._pending_cut, self._observed if at is None else at
        if cut is None or self._agree_on_off(group) is not None:
            return None
        try:
            with stage("judgement"):
                judgement, past = run_on_all_ranks(group, lambda: cut.judge(value))
        except Exception as problem:  # noqa: BLE001  a policy may raise anything: the cut stays pending
            self._failures.explain(group, moment, problem)
            return None
        if past is None:
            return None
        count = parameters(self.model)
        sizes, blocks = self.history.sizes(self.graph), tuple((past.names or {}).get("blocks", ()))
        skipped, reason = None, f"taken back: {judgement.reason}"
        try:
            with stage("rollback"):
                copies = run_on_all_ranks(group, self._copies)
                roll_back(group, past, self._snapshot(group, copies), cast(TrainingRun, self), copies)
            self.graph, self.original = past.graph, self._original_before_cut
            if past.names is not None:
                self._load_names(past.names)
                cut.rename(past.names["renamed"])
            # The model's own was made after the cut.
            remember_widths(self.model, self.graph, self.original.sizes)
        except RankMismatchError:
            raise
        except Exception as problem:  # noqa: BLE001  the cut then stays, and the run can go on
            skipped, blocks = self._failures.explain(group, moment, problem), ()
        try:
            with stage("cost count"):
                self._macs = run_on_all_ranks(group, self._count_macs)
        except RankMismatchError:
            raise
        except Exception as problem:  # noqa: BLE001  the cut is undone, and only the record lacks the new count
            self._failures.explain_count(group, moment, problem)
        # Where blocks have come back, a name may have been that of another width.
        changes = changed(sizes, {} if blocks else self.history.sizes(self.graph), dict.fromkeys(sizes, reason))
        seconds = time.perf_counter() - started
        return self._record(self._event(moment, changes, count, seconds, skipped, restored_blocks=blocks))

    @deferred_signals("the removal of blocks")
    def remove_blocks(self, share: float = 0.0) -> tuple[str, ...]:
        """Remove residual blocks and branches that carry nothing, whatever the policy, see `evolvenet.remove_blocks`.

        They are looked for on the batches observed so far, on rank 0; all ranks and copies do the same, or none does anything.
        Call it where `step` could be called, for example after each. While a cut is still to be judged (`Tolerance`) nothing is
        removed, so that the cut can be undone. What `fixed`, `network` or frozen weights keep stays.

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
        inputs, accept = batches or [self.example_inputs], energy_limit(share)

        def find() -> list[Removal]:
            return find_removals(self.model, inputs, share, lambda _: accept, self.graph, self._may_go)

        removals = run_on_rank_0(group, find)
        if removals:
            self._remove(group, removals)
        return tuple(removal.path for removal in reversed(removals))

    def _remove_by_policy(self, group: ProcessGroup, moment: int, previous: float | None) -> tuple[str, ...]:
        """Remove the blocks that a policy with `depth` gives up, all or nothing; a failure is warned of, widths may still change.

        Where the policy judges its changes, they are pending until then, and the widths stay in this event.
        """
        pending = self._pending_cut
        if not removes_blocks(self.policy) or not self._failures.may_remove_blocks or (pending and pending.snapshot):
            return ()
        try:
            with stage(BLOCK_REMOVAL):
                batches, gradients = self._buffer.gather(group)
                data = EventData(
                    self.model, self.graph, self.example_inputs, batches, gradients, self._past, previous, 0, None
                )
                data.expect({})
                context = data.context(self.history.initial.sizes, pending and pending.state)
                find = partial(removals_of_policy, self.policy, context, data, self._may_go)
                removals = run_on_rank_0(group, find)
                if not removals:
                    return ()
                past = None
                if pending:
                    past = self._snapshot(group, run_on_all_ranks(group, self._copies))
                    self._original_before_cut = self.original
                named, paths = self._named(), tuple(removal.path for removal in reversed(removals))
                now = {before: new for new, before in self._remove(group, removals).items()}
        except RankMismatchError:
            raise
        except Exception as problem:  # noqa: BLE001  whatever it was, everything is as before and the run can go on
            self._failures.explain_blocks(group, moment, problem)
            return ()
        if pending and past:
            pending.record(replace(past, names={**named, "blocks": list(paths), "renamed": now}), paths)
        return paths

    def _remove(self, group: ProcessGroup, removals: Sequence[Removal]) -> dict[str, str]:
        """Apply removals on all ranks and to all copies, all or nothing, and go on with the graph of what is left.

        Returns:
            {name of a width from now on: name before}.
        """
        copies = run_on_all_ranks(group, self._copies)

        def remove() -> WidthGraph:
            for removal in removals:
                for model in (self.model, *copies):
                    apply_removal(model, removal, self.optimizers if model is self.model else (), undo)
            return trace_for_training(self.model, self.example_inputs, self._outputs)

        named, known = self._named(), (self.graph, self.original, self.history.frozen, self._macs)

        def go_back() -> None:
            self._load_names(named)
            self.graph, self.original, self.history.frozen, self._macs = known
            # Wrappers that were renewed hold the parameters that have come back.
            self.after_change()

        with ExitStack() as undo:
            undo.callback(go_back)
            graph = run_on_all_ranks(group, remove)
            run_on_all_ranks(group, self.after_change)
            names = self.adopt(graph, renaming(removals))
            self._macs = run_on_all_ranks(group, self._count_macs)
            undo.pop_all()
        reset_compiled_code()
        return names

    def _count_macs(self) -> int:
        return macs(self.model, self.example_inputs, self.graph.differentiates)

    def _snapshot(self, group: ProcessGroup, copies: Sequence[nn.Module]) -> Snapshot:
        """The present state of the model, its copies and the optimizers; where one rank cannot take it, all ranks raise."""
        return run_on_all_ranks(group, partial(Snapshot.of, self.model, self.graph, self.optimizers, copies))

    def _agree_on_off(self, group: ProcessGroup) -> str | None:
        """Why evolution is off on any rank, and so on all of them from now on; None while it is on.

        What an optimizer has in its state may differ between ranks.
        """
        self._failures.off = next((off for off in group.all_gather(self.off) if off is not None), None)
        return self.off

    def _may_go(self, path: str) -> bool:
        """Whether a block may be removed: what the user has fixed stays, and what is not trained."""
        block = self.model.get_submodule(path)
        names = [f"{path}.{name}".rstrip(".") for name, _ in block.named_modules()]
        return all(self._restriction.permits(name, self._path) for name in names) and all(
            parameter.requires_grad for parameter in block.parameters()
        )
