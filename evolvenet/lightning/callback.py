"""`WidthEvolution`: *when* widths change inside a Lightning run. What changes is decided and done below."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from evolvenet._compat.torch import state_dict_metadata
from evolvenet.engine.announcements import announce_end, show_messages
from evolvenet.engine.distributed import process_group
from evolvenet.engine.event_timer import EventState
from evolvenet.engine.history import History
from evolvenet.engine.replica_discovery import ReplicaDiscovery
from evolvenet.engine.run_checks import warn
from evolvenet.engine.sharding import whole_parameters
from evolvenet.graph.format_version import checked_format
from evolvenet.lightning.evolution import LightningEvolution
from evolvenet.lightning.guard import StepGuard
from evolvenet.lightning.loading import install
from evolvenet.lightning.module import (
    logging_muted,
    modules_to_search,
    optimizers_of,
    weight_averages,
)
from evolvenet.lightning.module_summary import ModulesBefore
from evolvenet.lightning.recording import SubjectRecorder
from evolvenet.lightning.run_length import length_problem, progress_of, skipped_validation
from evolvenet.lightning.sharded import check_shards, fit_before_load, no_longer_fit_before_load
from evolvenet.lightning.trainer_parts import (
    check_strategy,
    default_dtype,
    metric_of,
    shown_in_progress_bar,
)
from evolvenet.signals import deferred_signals
from evolvenet.surgery.checkpoint import RECORD_KEY, fit_shapes, register_reshape_before_load
from evolvenet.surgery.optimizer_values import norms_of, not_restored

OPTIMIZERS_KEY = "evolvenet.optimizers"
"""The key of a checkpoint under which the norms of what its optimizers keep are, see `norms_of`."""

install()


@dataclass(eq=False, repr=False)
class WidthEvolution(LightningEvolution, Callback):
    """Prunes and grows the widths of whatever the trainer trains.

    The model is traced on the first training batch, with the inputs that its own training step gives it. When an event is
    due, the model's inputs are kept for `calibration_batches` batches; the event measures on them and happens before the
    next batch, at an accumulation boundary. So nothing has to be kept between events, and a checkpoint holds what a resumed
    run needs to go on as if nothing had happened, bit for bit.

    `logging.getLogger("evolvenet")` gets one line an event and a table at the end of the fit, both at level INFO, and each
    changed width with its reason at DEBUG. Where the trainer has a `ModelSummary`, as by default, a table of its modules with
    parameters and widths before → after follows at the end. They appear on stderr as Lightning's own messages do, unless that
    logger or the root logger has been set up otherwise; `logging.getLogger("evolvenet").setLevel("WARNING")` leaves the
    warnings alone.
    The progress bar has the parameters as `params`. "evolve/parameters" and "evolve/macs" go to the trainer's loggers, and
    so do, after each event, "evolve/size/…", "evolve/effective_rank/…" and "evolve/kept_energy/…" of every width.

    Averages of the weights that other callbacks keep (`WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging`)
    go through the same changes, and so do copies in the module itself (a momentum teacher, a target network) once they have
    moved; until then events are skipped, since a frozen reference must stay: `copies` settles it. Under DDP rank 0 decides
    from batches of all ranks, and the wrapper is made anew.

    An event measures on at most half of an epoch's batches, or on those of `every_n_steps` optimizer steps.

    The arguments before `copies` are those of `evolvenet.engine.evolution_callback.EvolutionCallback`. Names are those of the
    LightningModule's submodules, or of widths as the table at the end of a fit has them.

    Args:
        copies: {name of a submodule that follows another one: name of that one}, no other is taken for a copy then; None
            to find them.

    Raises:
        PolicyError: for values out of range, or a policy without a method `propose`.
        UnsupportedStrategyError: before training starts, under a strategy that shards parameters otherwise than FSDP2.
        RankMismatchError: during training, if the processes of a DDP run do not agree on the model.

    >>> from evolvenet import Threshold
    >>> callback = WidthEvolution(policy=Threshold(prune=0.01, grow=0.9), every_n_epochs=1)
    """

    @property
    def history(self) -> History | None:
        """The run's events, None before the model is traced."""
        if self.evolver is None and self._resumed:
            return History.from_dict(self._resumed["evolver"]["history"])
        return super().history

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the model take a checkpoint's widths when one is loaded."""
        if stage == "fit":
            show_messages()
        check_strategy(trainer.strategy)
        # Other callbacks may have copied the module before this one was asked.
        for module in (pl_module, *weight_averages(trainer, pl_module)):
            register_reshape_before_load(module)
        fit_before_load(trainer.strategy, self.state_key)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse names that are none of the module's, all of whose parts are there by now."""
        self.restriction.check(name for name, _ in pl_module.named_modules())
        check_shards(pl_module, self.policy)
        self._has_trained = self._has_failed = False
        self._modules_before = ModulesBefore.of(trainer, pl_module)

    @deferred_signals("the start of the run")
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the training step calls the model with, and warn if no event falls into the run."""
        self._has_trained = True
        self.curves.begin()
        if self._optimizer_norms:
            warn(not_restored(trainer.optimizers, self._optimizer_norms))
            self._optimizer_norms = []
        if self._resumed is None:
            warn(length_problem(trainer, pl_module, self.schedule))
        else:
            warn(skipped_validation(trainer, self._resumed))
        self._module, self._timer.batches_without_call = pl_module, 0
        if self.evolver is not None:
            self._continue_from(pl_module, self.evolver)
        self._events_before = len(self.history.events) if self.history else 0
        self._recorder = SubjectRecorder(pl_module, self._most_batches)
        self._batches.pop("training_step", None)
        self._replicas = None
        self._cleanup.callback(StepGuard(trainer.strategy, self._restore).remove)
        self._cleanup.enter_context(shown_in_progress_bar(trainer, self._shown))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a first batch to trace the validation step on."""
        self._batches.setdefault("validation_step", (batch, batch_idx))

    @deferred_signals("the trace")
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Trace anew where a module has run for the first time."""
        self._trace_first_runs("validation_step", batch, batch_idx)

    @deferred_signals("the event")
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change widths when an event is due."""
        boundary = batch_idx % trainer.accumulate_grad_batches == 0
        if self._replicas is None:
            # Only now has everybody made the copies that they need.
            self._replicas = ReplicaDiscovery(
                modules_to_search(trainer, pl_module), self.copies, partial(optimizers_of, trainer, pl_module)
            )
            self._replicas.load_state_dict(self._resumed.get("replicas", {}) if self._resumed else {})
        if self.evolver is None and self._may_be_known:
            with whole_parameters(pl_module, optimizers_of(trainer, pl_module)):
                self._start_on_all_ranks(trainer, pl_module, lambda: self._known_subject(trainer, pl_module))
        if boundary:
            self._judge(trainer, pl_module)
        self._timer.needed = self._batches_needed(trainer)
        self._timer.count_batch()
        if boundary and self._timer.state is EventState.DUE:
            with whole_parameters(pl_module, optimizers_of(trainer, pl_module)):
                self._change_widths(trainer, pl_module)
        if boundary:
            epoch = trainer.current_epoch if batch_idx == 0 else None
            self._timer.check(trainer.global_step, progress_of(trainer), epoch)
        if self._timer.recording and self._recorder is None and self.evolver is not None:
            self._record_subject()
        if self._recorder is not None:
            self._recorder.begin(batch)
        if self.evolver is not None:
            latest = self.evolver.history.latest
            # As tensors of the CPU: of a number Lightning makes one on the device, and the host waits for that in every step.
            pl_module.log("evolve/parameters", torch.tensor(float(latest.parameters), device="cpu"))
            pl_module.log("evolve/macs", torch.tensor(float(latest.macs), device="cpu"))

    @deferred_signals("the trace")
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Trace once the first inputs are known, before a checkpoint is saved, which must hold an event that is due."""
        if self._recorder is not None:
            self._recorder.end()
        if self.evolver is None:
            if self._recorder is not None and self._recorder.names:
                self._batches.setdefault("training_step", (batch, batch_idx))
            if self._called_on_all_ranks(pl_module):
                with whole_parameters(pl_module, optimizers_of(trainer, pl_module)):
                    self._start_on_all_ranks(trainer, pl_module, lambda: self._recorded_subject(trainer, pl_module))
        self._trace_first_runs("training_step", batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metric that the policy judges by, until widths may change again, and all for a report."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self.curves.add(trainer.global_step, trainer.callback_metrics)
        if self._judged_metric is not None and not trainer.sanity_checking:
            self._metric = metric_of(trainer, self._judged_metric)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics for a report."""
        self.curves.add(trainer.global_step, trainer.callback_metrics)

    @deferred_signals("the judgement of the last cut")
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last cut, leave no hook behind, and log what has become of the widths."""
        self._judge(trainer, pl_module)
        self._remove_hooks()
        self.curves.end()
        with (
            whole_parameters(pl_module, optimizers_of(trainer, pl_module)),
            default_dtype(trainer),
            logging_muted(pl_module),
        ):
            announce_end(self.evolver, self._events_before)
            self._announce_modules(pl_module)
        if self.evolver is None and not self._untraceable:
            warn(
                "All widths are as they were: the training step has called no module in this run. Call the network as a module "
                "(self(x) or self.net(x), not self.forward(x)), or give WidthEvolution(example_inputs=...)."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there was nothing to train on."""
        if not self._has_trained:
            warn(
                "No batch was trained on, so all widths are as they were: expected batches and epochs to go, got "
                f"limit_train_batches={trainer.limit_train_batches}, max_epochs={trainer.max_epochs}, "  # type: ignore[attr-defined]
                f"max_steps={trainer.max_steps}, of which {trainer.current_epoch} epochs and {trainer.global_step} steps were "
                "done before. Raise what is too small."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._has_failed = True
        self._remove_hooks()
        self.curves.end()
        no_longer_fit_before_load(trainer.strategy)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing in the strategy, which may get another module next."""
        no_longer_fit_before_load(trainer.strategy)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the width record to the state dict where no hook does: before the first batch and after the run."""
        metadata = state_dict_metadata(checkpoint["state_dict"])
        record = self._checkpoint_record(pl_module)
        if record is not None:
            metadata.setdefault("", {})[RECORD_KEY] = record.state_dict(pl_module)
        if norms := norms_of(trainer.optimizers):
            checkpoint[OPTIMIZERS_KEY] = norms
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        # All ranks save, but rank 0 alone writes. After an exception on one of them the others do not save.
        if self.evolver is not None and own is not None and not self._has_failed and process_group().size > 1:
            own["evolver"] = self.evolver.state_dict(all_ranks=True)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember norms of what the optimizers kept, to warn where they do not get it back."""
        self._optimizer_norms = checkpoint.get(OPTIMIZERS_KEY, [])

    @deferred_signals("the copy of the evolution's state")
    def state_dict(self) -> dict[str, Any]:
        """The run's events and what the next ones depend on, for the checkpoint."""
        if self.evolver is None or self._subject is None:
            return self._resumed or {}
        self._observe_recorded()
        return {
            "evolver": self.evolver.state_dict(),
            **self._subject.state_dict(),
            "replicas": self._replicas.state_dict() if self._replicas else {},
            **self._timer.state_dict(),
            "metric": self._metric,
            "curves": self.curves.state_dict(),
        }

    @deferred_signals("the load")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the resumed run until its first inputs are known.

        Raises:
            RecordError: if a newer EvolveNet has written it.
        """
        checked_format(state_dict.get("evolver", {}), "The state of WidthEvolution in the checkpoint")
        self.evolver = None
        self._resumed = state_dict or None
        self._timer.load_state_dict(state_dict)
        self._metric = state_dict.get("metric")
        self.curves.load_state_dict(state_dict.get("curves", {}))

    def load_worker_state(self, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Restore the state of a spawned process, and the module's attributes that no state dict holds."""
        self.load_state_dict(state)
        if self._resumed is not None:
            fit_shapes(pl_module.get_submodule(self._resumed["root"]), {}, record=self._resumed["evolver"]["note"])
