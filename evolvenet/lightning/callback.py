"""`WidthEvolution`: *when* widths change inside a Lightning run. What changes is decided and done below."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from evolvenet._compat.torch import reset_compiled_code, state_dict_metadata
from evolvenet.engine.distributed import check_agreement, process_group, run_on_all_ranks
from evolvenet.engine.event_timer import EventState, EventTimer
from evolvenet.engine.evolution_callback import EvolutionCallback
from evolvenet.engine.evolver import Evolver
from evolvenet.engine.history import History
from evolvenet.engine.replica_discovery import ReplicaDiscovery
from evolvenet.errors import RecordError, TraceError
from evolvenet.execution.call_recorder import CallRecorder
from evolvenet.execution.inputs import first_samples
from evolvenet.graph.serialization import check_fits, from_state_dict
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lightning.loading import install
from evolvenet.lightning.module import (
    find_network,
    logging_muted,
    modules_to_search,
    optimizers_of,
    record_calls,
    weight_averages,
)
from evolvenet.lightning.trainer_parts import (
    check_strategy,
    default_dtype,
    log_event,
    metric_of,
    progress_of,
    rebuild_ddp,
)
from evolvenet.surgery.checkpoint import RECORD_KEY, WidthRecord, fit_shapes, register_reshape_before_load
from evolvenet.tracing.trace import trace

log = logging.getLogger("evolvenet")
install()

MAX_BATCHES_WITHOUT_CALL = 8
"""Batches without a call of any module, since a training step may skip some, before there seems to be no network."""


@dataclass(eq=False, repr=False)
class WidthEvolution(EvolutionCallback, Callback):
    """Prunes and grows the widths of whatever the trainer trains.

    The model is traced on the first training batch, with the inputs that its own training step gives it. When an event is
    due, the model's inputs are kept for `calibration_batches` batches; the event measures on them and happens before the
    next batch, at an accumulation boundary. So nothing has to be kept between events, and a checkpoint holds what a resumed
    run needs to go on as if nothing had happened, bit for bit.

    Each changed width is logged through `logging.getLogger("evolvenet")`. "evolve/parameters" and "evolve/macs" go to the
    trainer's loggers and progress bar; after each event, "evolve/size/…", "evolve/effective_rank/…" and
    "evolve/kept_energy/…" of every width to the loggers.

    Averages of the weights that other callbacks keep (`WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging`)
    go through the same changes, and so do copies in the module itself (a momentum teacher, a target network) once they have
    moved; until then events are skipped, since a frozen reference must stay: `copies` settles it. Under DDP rank 0 decides
    from batches of all ranks, and the wrapper is made anew.

    An event measures on at most half of an epoch's batches, or on those of `every_n_steps` optimizer steps.

    Args:
        policy, every_n_epochs, every_n_steps, start_step, stop, example_inputs, calibration_batches, seed: see
            `evolvenet.engine.evolution_callback.EvolutionCallback`.
        copies: {name of a submodule that follows another one: name of that one}, no other is taken for a copy then; None
            to find them.

    Raises:
        PolicyError: for values out of range, or a policy without a method `propose`.
        TraceError: in the first batches, if nothing in the model can be resized.
        UnsupportedStrategyError: before training starts, under a strategy that shards parameters.
        RankMismatchError: during training, if the processes of a DDP run do not agree on the model.

    >>> from evolvenet import Threshold
    >>> callback = WidthEvolution(policy=Threshold(prune=0.01, grow=0.9), every_n_epochs=1)
    """

    copies: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._root = ""
        self._module: LightningModule | None = None
        self._record_hook: RemovableHandle | None = None
        self._replicas: ReplicaDiscovery | None = None
        self._averages: list[nn.Module] = []
        self._metric: float | None = None

    @property
    def history(self) -> History | None:
        """The run's events, None before the model is traced."""
        if self.evolver is None and self._resumed:
            return History.from_dict(self._resumed["evolver"]["history"])
        return super().history

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the model take a checkpoint's widths when one is loaded."""
        check_strategy(trainer.strategy)
        # Other callbacks may have copied the module before this one was asked.
        for module in (pl_module, *weight_averages(trainer, pl_module)):
            register_reshape_before_load(module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the training step calls the model with."""
        self._module, self._timer.batches_without_call = pl_module, 0
        if self.evolver is not None:
            self._continue_from(pl_module, self.evolver)
        self._recorder = record_calls(pl_module)
        self._replicas = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change widths when an event is due."""
        boundary = batch_idx % trainer.accumulate_grad_batches == 0
        if self._replicas is None:
            # Only now has everybody made the copies that they need.
            self._replicas = ReplicaDiscovery(modules_to_search(trainer, pl_module), self.copies)
            self._replicas.load_state_dict(self._resumed.get("replicas", {}) if self._resumed else {})
        if self.evolver is None:
            self._start_on_all_ranks(trainer, pl_module, lambda: self._known_inputs(trainer))
        if boundary:
            self._judge(trainer, pl_module)
        self._timer.needed = self._batches_needed(trainer)
        self._timer.count_batch()
        if boundary and self._timer.state is EventState.DUE:
            self._change_widths(trainer, pl_module)
        if boundary:
            epoch = trainer.current_epoch if batch_idx == 0 else None
            self._timer.check(trainer.global_step, progress_of(trainer), epoch)
        if self._timer.recording and self._recorder is None:
            self._record_network()
        if self.evolver is not None:
            latest = [self.evolver.history.initial, *self.evolver.history.events][-1]
            pl_module.log("evolve/parameters", float(latest.parameters), prog_bar=True)
            pl_module.log("evolve/macs", float(latest.macs))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Trace once the first inputs are known, before a checkpoint is saved, which must hold an event that is due."""
        if self.evolver is None:
            self._start_on_all_ranks(trainer, pl_module, lambda: self._recorded_inputs(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metric that the policy judges by, until widths may change again."""
        if self._judged_metric is not None and not trainer.sanity_checking:
            self._metric = metric_of(trainer, self._judged_metric)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last cut, and leave no hook behind."""
        self._judge(trainer, pl_module)
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._remove_hooks()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the width record to the state dict where no hook does: before the first batch and after the run."""
        metadata = state_dict_metadata(checkpoint["state_dict"])
        record = self._checkpoint_record(pl_module)
        if record is not None:
            metadata.setdefault("", {})[RECORD_KEY] = record.state_dict(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The run's events and what the next ones depend on, for the checkpoint."""
        if self.evolver is None:
            return self._resumed or {}
        self._observe_recorded()
        return {
            "evolver": self.evolver.state_dict(),
            "root": self._root,
            "replicas": self._replicas.state_dict() if self._replicas else {},
            **self._timer.state_dict(),
            "metric": self._metric,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the resumed run until its first inputs are known."""
        self.evolver = None
        self._resumed = state_dict or None
        self._timer.load_state_dict(state_dict)
        self._metric = state_dict.get("metric")

    def load_worker_state(self, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Restore the state of a spawned process, and the module's attributes that no state dict holds."""
        self.load_state_dict(state)
        if self._resumed is not None:
            fit_shapes(pl_module.get_submodule(self._resumed["root"]), {}, record=self._resumed["evolver"]["note"])

    def _start_on_all_ranks(
        self, trainer: Trainer, pl_module: LightningModule, find: Callable[[], tuple[str, list[Any]] | None]
    ) -> None:
        """Make the evolver on every rank, if `find` returns the network's path and inputs."""

        def start() -> None:
            found = find()
            if found is not None:
                self._start(trainer, pl_module, *found)

        run_on_all_ranks(process_group(), start)
        if self.evolver is not None:
            times = f"{self.schedule}, calibration_batches={self.calibration_batches}, seed={self.seed}"
            check_agreement(process_group(), "widths and times of events", f"{self.evolver.graph.sizes}, {times}")

    def _known_inputs(self, trainer: Trainer) -> tuple[str, list[Any]] | None:
        """The network's path and inputs for it, where some are known before the first batch."""
        if self.example_inputs is not None:
            return self._resumed_root() or "", [self.example_inputs]
        state = self._resumed["evolver"] if self._resumed else {}
        if self._resumed and (kept := state["batches"] or state.get("example")):
            # Interrupted while batches were gathered, or between a validation and the judgement of the last cut.
            return self._resumed["root"], [trainer.strategy.batch_to_device(each) for each in kept]
        return None

    def _recorded_inputs(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, list[Any]] | None:
        """The network's path and its recorded inputs; None if the training step has called no module so far."""
        if self._recorder is None or not self._recorder.names:
            self._timer.batches_without_call += 1
            if self._timer.batches_without_call < MAX_BATCHES_WITHOUT_CALL:
                return None
            raise TraceError(
                f"{type(pl_module).__name__}'s training step has run on {MAX_BATCHES_WITHOUT_CALL} batches without calling "
                "any module, so there is nothing to trace. Call the network as a module "
                "(self(x) or self.net(x), not self.forward(x)), or give "
                "WidthEvolution(example_inputs=...)."
            )
        root = self._resumed_root() or find_network(pl_module, self._recorder, optimizers_of(trainer, pl_module))
        return root, self._recorder.inputs(root)

    def _start(self, trainer: Trainer, pl_module: LightningModule, path: str, inputs: list[Any]) -> None:
        """Make the evolver of the network at a path of the module."""
        self._root = path
        calls = self._recorder.calls(self._root) if self._recorder else []
        self._stop_recording()
        root = pl_module.get_submodule(self._root)
        self._averages = [copy.get_submodule(self._root) for copy in weight_averages(trainer, pl_module)]
        state = self._resumed["evolver"] if self._resumed else None
        with default_dtype(trainer), logging_muted(pl_module):
            self.evolver = Evolver(
                root, optimizers_of(trainer, pl_module), self.policy, inputs[0], self.calibration_batches, self.seed,
                self._models_to_update, after_change=partial(rebuild_ddp, trainer.strategy, pl_module),
                graph=self._trace(root, inputs[0]) if state is None else from_state_dict(state["graph"]),
            )  # fmt: skip
        if state is not None:
            self.evolver.load_state_dict(state)
            self._resumed = None
            for copy in self._averages:
                fit_shapes(copy, {}, record=state["note"])
        self._timer.start()
        for call in calls if self._timer.recording else ():
            self.evolver.observe(*call)
        self._record_hook = self._record(self.evolver).register(pl_module)
        log_event(trainer, self.evolver.history.initial)
        log.info(
            "%d resizable widths hold %.1f %% of the %s parameters; %d frozen",
            len(self.evolver.graph.resizable),
            100 * self.evolver.graph.coverage,
            f"{self.evolver.graph.parameters:,}",
            sum(width.frozen is not None for width in self.evolver.graph.widths.values()),
        )

    def _continue_from(self, pl_module: LightningModule, evolver: Evolver) -> None:
        """In a second `fit` with this callback: resume from the first one's evolver, if the network is still the same."""
        self._timer = EventTimer(self.schedule)
        state = evolver.state_dict()
        self.evolver, self._resumed = None, None
        known = dict(pl_module.named_modules()).get(self._root) is evolver.model
        if known and _fits(evolver):
            replicas = self._replicas.state_dict() if self._replicas else {}
            self._resumed = {"evolver": {**state, "batches": []}, "root": self._root, "replicas": replicas}

    def _checkpoint_record(self, pl_module: LightningModule) -> WidthRecord | None:
        """The width record that a checkpoint holds beside the tensors; None before they are known."""
        if self.evolver is not None:
            return self._record(self.evolver)
        if self._resumed is None:
            return None
        root = self._resumed["root"]
        return WidthRecord.of(pl_module.get_submodule(root), from_state_dict(self._resumed["evolver"]["graph"]), root)

    def _trace(self, root: nn.Module, inputs: Any) -> WidthGraph:
        graph = trace(root, first_samples(inputs, 2))
        return self._replicas.without_replicas(root, graph) if self._replicas else graph

    def _models_to_update(self) -> list[nn.Module]:
        """The replicas of the network that go through an event's changes."""
        if self.evolver is None or self._replicas is None:
            return self._averages
        evolver = self.evolver
        return [*self._averages, *self._replicas.models_to_update(evolver.model, evolver.graph, evolver.optimizers)]

    def _record(self, evolver: Evolver) -> WidthRecord:
        record = WidthRecord.of(evolver.model, evolver.graph, self._root)
        return record.with_replicas(self._replicas.pairs(evolver.model, evolver.graph)) if self._replicas else record

    def _resumed_root(self) -> str | None:
        return self._resumed["root"] if self._resumed else None

    def _change_widths(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The event, or, where none of its calls was recorded, once more the gathering of batches for it."""
        assert self.evolver is not None
        evolver = self.evolver
        self._observe_recorded()
        if not evolver.observed and not self._timer.retried:
            # Code that was compiled before the recorder's hooks were there does not run them.
            self._timer.retry()
            reset_compiled_code()
            return
        # Some runs replace their optimizers on the way.
        evolver.optimizers = optimizers_of(trainer, pl_module)
        with default_dtype(trainer), logging_muted(pl_module):
            event = evolver.step(at=trainer.global_step, progress=progress_of(trainer))
        evolver.forget()
        self._stop_recording()
        if self._timer.retried:
            reset_compiled_code()
        self._timer.finish()
        log_event(trainer, event)

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the last validation means for the last cut."""
        if self._metric is None or self.evolver is None:
            return
        self.evolver.optimizers = optimizers_of(trainer, pl_module)
        with default_dtype(trainer), logging_muted(pl_module):
            event = self.evolver.judge(self._metric, at=trainer.global_step)
        self._metric = None
        if event is not None:
            log_event(trainer, event)

    def _observe_recorded(self) -> None:
        """Pass the recorded calls on to the evolver, each of them once."""
        if self.evolver is not None and self._recorder is not None:
            for call in self._recorder.calls(self._root):
                self.evolver.observe(*call)
            self._stop_recording()
            if self._timer.recording:
                self._record_network()

    def _record_network(self) -> None:
        assert self.evolver is not None
        self._recorder = CallRecorder({self._root: self.evolver.model}, self.calibration_batches, self._module)

    def _batches_needed(self, trainer: Trainer) -> int:
        """Batches to measure on; not so many that the next event would be due before, or most of a short epoch gone."""
        steps = self.schedule.every_n_steps
        if steps is None:
            until = max(1.0, trainer.num_training_batches * (self.schedule.every_n_epochs or 1) / 2)
        else:
            until = steps * trainer.accumulate_grad_batches
        return int(min(self.calibration_batches, until))

    def _remove_hooks(self) -> None:
        self._observe_recorded()
        self._stop_recording()
        if self._record_hook is not None:
            self._record_hook.remove()
        self._record_hook, self._module = None, None


def _fits(evolver: Evolver) -> bool:
    """Whether the model still has the widths that its evolver knows."""
    try:
        check_fits(evolver.graph, evolver.model)
    except RecordError:
        return False
    return True
