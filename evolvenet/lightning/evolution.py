"""What `WidthEvolution` does in a run of Lightning once the network is traced: records its calls, and changes its widths."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from evolvenet._compat.lightning import trainer_of
from evolvenet._compat.torch import reset_compiled_code
from evolvenet.engine.announcements import short_number
from evolvenet.engine.bare_copies import bare_copies
from evolvenet.engine.distributed import process_group
from evolvenet.engine.event_timer import EventTimer
from evolvenet.engine.evolver import Evolver
from evolvenet.engine.replica_widths import frozen_tensors
from evolvenet.engine.sharding import is_sharded, whole_parameters
from evolvenet.errors import RecordError
from evolvenet.graph.serialization import check_fits, from_state_dict
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lightning.guard import StepGuard
from evolvenet.lightning.loggers import log_event
from evolvenet.lightning.module import (
    logging_muted,
    optimizers_of,
)
from evolvenet.lightning.recording import SubjectRecorder
from evolvenet.lightning.run_length import progress_of
from evolvenet.lightning.start import EvolutionStart
from evolvenet.lightning.trainer_parts import (
    default_dtype,
    shown_in_progress_bar,
)
from evolvenet.surgery.checkpoint import WidthRecord
from evolvenet.surgery.width_record import remember

log = logging.getLogger("evolvenet")


@dataclass(eq=False, repr=False)
class LightningEvolution(EvolutionStart):
    """The parts of `WidthEvolution` that are no hooks of Lightning.

    Args:
        policy, every_n_epochs, every_n_steps, start_step, stop, example_inputs, calibration_batches, seed, network, fixed,
            multiple: see `EvolutionCallback`.
        copies: see `WidthEvolution`.
    """

    def _continue_from(self, pl_module: LightningModule, evolver: Evolver) -> None:
        """In a second `fit` with this callback: resume from the first one's evolver, if the network is still the same."""
        self._timer = EventTimer(self.schedule)
        state = evolver.state_dict()
        self.evolver, self._resumed = None, None
        assert self._subject is not None
        known = dict(pl_module.named_modules()).get(self._subject.path) is evolver.model
        if known and _fits(evolver):
            replicas = self._replicas.state_dict() if self._replicas else {}
            self._resumed = {
                "evolver": {**state, "batches": []},
                **self._subject.state_dict(),
                "replicas": replicas,
            }

    def _checkpoint_record(self, pl_module: LightningModule) -> WidthRecord | None:
        """The width record that a checkpoint holds beside the tensors; None before they are known."""
        if self.evolver is not None:
            return self._record(self.evolver)
        if self._resumed is None:
            return None
        root = self._resumed["root"]
        state = self._resumed["evolver"]
        graph, sizes = from_state_dict(state["graph"]), state["original"][0]["sizes"]
        return WidthRecord.of(pl_module.get_submodule(root), graph, root, sizes)

    def _settle(self, root: nn.Module, graph: WidthGraph) -> WidthGraph:
        return self._without_bare_copies(root, self._replicas.settled(root, graph) if self._replicas else graph)

    def _without_bare_copies(self, root: nn.Module, graph: WidthGraph) -> WidthGraph:
        """The graph without widths of which somebody keeps a copy that no change would reach."""
        if self._module is None:
            return graph
        holders: dict[str, object] = {"": self._module}
        trainer = trainer_of(self._module)
        for callback in [] if trainer is None else trainer.callbacks:  # type: ignore[attr-defined]
            if callback is not self:
                holders[type(callback).__name__] = callback
        for name, where in bare_copies(holders, root).items():
            reason = f"{where} holds a copy of {name} as a bare tensor, which would keep its size"
            graph = frozen_tensors(graph, [graph.aliases.get(name, name)], reason)
        return graph

    def _trace_first_runs(self, name: str, batch: Any, index: int) -> None:
        """Go on with a new graph where the step has called a module that no trace had reached."""
        if self._module is None or self._first_runs is None or not self._first_runs.any_called:
            return
        if is_sharded(self._module):
            return  # One rank alone cannot gather the parameters.
        graph = self._first_runs.graph_after(name, batch, index)
        if graph is not None and self.evolver is not None:
            self.evolver.adopt(graph)
            self._keep_record(self._module)

    def _restore(self, problem: Exception) -> AbstractContextManager[None] | None:
        """All widths at their first sizes, where they have changed since.

        Of several processes, one may be in a step that raises while the others wait for its gradients: no exchange that all
        take part in can follow, so nothing is restored there.
        """
        if self.evolver is None or not self.evolver.has_changed:
            return None
        group = process_group()
        if group.size > 1:
            log.error(
                "A step on rank %d of %d has raised %s after widths had changed: if layers do not fit each other, the step has "
                "taken a route that no traced batch took. With several processes widths are not restored, and the run ends. "
                "Resume from the last checkpoint with WidthEvolution(fixed=[...]) for the widths before these layers.",
                group.rank,
                group.size,
                type(problem).__name__,
            )
            return None
        return self.evolver.restored(f"{type(problem).__name__}: {problem}")

    def _models_to_update(self) -> list[nn.Module]:
        """The replicas of the network that go through an event's changes."""
        if self.evolver is None or self._replicas is None:
            return self._averages
        evolver = self.evolver
        return [*self._averages, *self._replicas.models_to_update(evolver.model, evolver.graph)]

    def _keep_record(self, pl_module: LightningModule) -> None:
        """Keep the module's record, and write it into its state dicts until the run ends."""
        assert self.evolver is not None
        record = self._record(self.evolver)
        remember(pl_module, record)
        self._forget_record()
        self._record_handle = record.register(pl_module)

    def _forget_record(self) -> None:
        """State dicts of the module are written without a record again."""
        if self._record_handle is not None:
            self._record_handle.remove()
        self._record_handle = None

    def _record(self, evolver: Evolver) -> WidthRecord:
        root = self._subject.path if self._subject else ""
        record = WidthRecord.of(evolver.model, evolver.graph, root, evolver.original.sizes)
        return record.with_replicas(self._replicas.pairs(evolver.model, evolver.graph)) if self._replicas else record

    def _change_widths(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The event, or, where none of its calls was recorded, once more the gathering of batches for it."""
        assert self.evolver is not None
        evolver = self.evolver
        self._observe_recorded()
        # One of several ranks may have skipped the network in all of its batches.
        observed = any(process_group().all_gather(bool(evolver.observed)))
        if not observed and self._timer.retried and self.example_inputs is not None:
            # The training step never calls the module itself, whatever it would do with the example inputs.
            self._begin_anew(trainer, pl_module)
            return
        if not observed and not self._timer.retried:
            # Code that was compiled before the recorder's hooks were there does not run them.
            self._timer.retry()
            reset_compiled_code()
            return
        # Some runs replace their optimizers on the way.
        evolver.optimizers = optimizers_of(trainer, pl_module)
        if self._replicas is not None:
            graph = self._replicas.reviewed(evolver.model, evolver.graph)
            graph = self._without_bare_copies(evolver.model, graph)
            if graph is not evolver.graph:
                evolver.adopt(graph)
        if evolver.lowrank is not None:
            bare = bare_copies({"": pl_module}, evolver.model)
            evolver.lowrank = replace(evolver.lowrank, whole=frozenset(name.rpartition(".")[0] for name in bare))
        with default_dtype(trainer), logging_muted(pl_module):
            event = evolver.step(at=trainer.global_step, progress=progress_of(trainer))
        if (evolver.lowrank is not None and event.changes) or event.removed_blocks:
            self._keep_record(pl_module)
        evolver.forget()
        self._stop_recording()
        if self._timer.retried:
            reset_compiled_code()
        self._timer.finish()
        log_event(trainer, event, evolver.history)

    def _announce_modules(self, pl_module: LightningModule) -> None:
        """Log the modules before and after this fit, see `ModulesBefore.announce`."""
        if self.evolver is None or self._subject is None or process_group().rank:
            return
        history = self.evolver.history
        first = [history.initial, *history.events][self._events_before].sizes
        above = f"{self._subject.path}." if self._subject.path else ""
        sizes = {
            f"{above}{name}": (first.get(name, size), size)
            for name, size in history.latest.sizes.items()
            if name not in history.ranks
        }
        self._modules_before.announce(pl_module, sizes)

    def _shown(self) -> dict[str, str]:
        """What the progress bar shows."""
        return {"params": short_number(self.evolver.history.latest.parameters)} if self.evolver else {}

    def _begin_anew(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose what is to be changed from the next batch."""
        self._stop_recording()
        if self._first_runs is not None:
            self._first_runs.close()
        self._cleanup.close()
        self._forget_record()
        self._cleanup.callback(StepGuard(trainer.strategy, self._restore).remove)
        self._cleanup.enter_context(shown_in_progress_bar(trainer, self._shown))
        self.evolver, self._ignores_example, self._events_before = None, True, 0
        self._recorder = SubjectRecorder(pl_module, self._most_batches)
        self._batches.pop("training_step", None)
        self._timer = EventTimer(self.schedule)

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the last validation means for the last cut."""
        if self._metric is None or self.evolver is None:
            return
        self.evolver.optimizers = optimizers_of(trainer, pl_module)
        with whole_parameters(pl_module, self.evolver.optimizers), default_dtype(trainer), logging_muted(pl_module):
            event = self.evolver.judge(self._metric, at=trainer.global_step)
        self._metric = None
        if event is not None:
            self._keep_record(pl_module)
            log_event(trainer, event, self.evolver.history)

    def _observe_recorded(self) -> None:
        """Pass the recorded calls on to the evolver, each of them once."""
        if self.evolver is not None and self._recorder is not None and self._subject is not None:
            for call in self._recorder.calls(self._subject.kind, self._subject.path):
                self.evolver.observe(*call, copy=False)
            self._stop_recording()
            if self._timer.recording:
                self._record_subject()

    def _record_subject(self) -> None:
        assert self._module is not None
        assert self._subject is not None
        self._recorder = SubjectRecorder(self._module, self._most_batches, self._subject.kind, self._subject.path)

    def _batches_needed(self, trainer: Trainer) -> int:
        """Batches to measure on; not so many that the next event would be due before, or most of a short epoch gone."""
        steps = self.schedule.every_n_steps
        if steps is None:
            until = max(1.0, trainer.num_training_batches * (self.schedule.every_n_epochs or 1) / 2)
        else:
            until = steps * trainer.accumulate_grad_batches
        return int(min(self._most_batches, until))

    def _remove_hooks(self) -> None:
        self._observe_recorded()
        self._stop_recording()
        if self._first_runs is not None:
            self._first_runs.close()
        self._cleanup.close()
        self._forget_record()
        self._first_runs = self._module = None


def _fits(evolver: Evolver) -> bool:
    """Whether the model still has the widths that its evolver knows."""
    try:
        check_fits(evolver.graph, evolver.model)
    except RecordError:
        return False
    return True
