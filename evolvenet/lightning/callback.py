"""`WidthEvolution`: *when* widths change inside a Lightning run. What changes is decided and done below."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from evolvenet.engine.distributed import check_agreement, process_group, run_on_all_ranks
from evolvenet.engine.evolver import Evolver
from evolvenet.engine.history import History
from evolvenet.engine.replica_discovery import ReplicaDiscovery
from evolvenet.errors import PolicyError, RecordError, TraceError
from evolvenet.execution.call_recorder import CallRecorder
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.isolation import reset_compiled_code
from evolvenet.graph.serialization import check_fits, from_plain
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
from evolvenet.policies.base import Policy, judged_metric
from evolvenet.policies.schedule import Schedule
from evolvenet.surgery.checkpoint import NOTE, Note, fit_shapes, let_load_reshape
from evolvenet.tracing.trace import trace

log = logging.getLogger("evolvenet")
install()

MAX_BATCHES_WITHOUT_CALL = 8
"""Batches without a call of any module, since a training step may skip some, before there seems to be no network."""


class WidthEvolution(Callback):
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

    Args:
        policy: proposes sizes, for example `evolvenet.Threshold`, or one of your own (see `evolvenet.Policy`).
        every_n_epochs: an event at the start of every n-th epoch; the default, with n = 1, if neither is given. It measures
            on at most half of the epoch's batches.
        every_n_steps: or an event every n optimizer steps; it then measures on at most the batches of n steps.
        start_step: no event before this optimizer step.
        stop: share of the run's optimizer steps, 0 … 1, after which widths stay and the network settles.
        example_inputs: what the model is called with, if the first training batch should not be waited for.
        calibration_batches: how many training batches an event measures on.
        seed: of the new units' random directions.
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

    def __init__(
        self,
        policy: Policy,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        start_step: int = 0,
        stop: float = 0.75,
        example_inputs: Any = None,
        calibration_batches: int = 4,
        seed: int = 0,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        if calibration_batches < 1:
            raise PolicyError(f"WidthEvolution: expected calibration_batches of 1 or more, got {calibration_batches}.")
        self.policy = policy
        self._judged_metric = judged_metric(policy)
        self.schedule = Schedule(every_n_epochs, every_n_steps, start_step, stop)
        self.example_inputs = example_inputs
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.copies = copies
        self.evolver: Evolver | None = None
        self._resumed: dict[str, Any] | None = None
        self._listener: CallRecorder | None = None
        self._note: RemovableHandle | None = None
        self._root = ""
        self._outer: LightningModule | None = None
        self._replicas: ReplicaDiscovery | None = None
        self._averages: list[nn.Module] = []
        self._silent = 0
        self._deaf = False
        self._due_since: int | None = None
        self._batches = 0
        self._seen_step: int | None = None
        self._metric: float | None = None

    @property
    def history(self) -> History | None:
        """The run's events, None before the model is traced."""
        if self.evolver is not None:
            return self.evolver.history
        return History.from_dict(self._resumed["evolver"]["history"]) if self._resumed else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the model take a checkpoint's widths when one is loaded."""
        check_strategy(trainer.strategy)
        # Other callbacks may have copied the module before this one was asked.
        for module in (pl_module, *weight_averages(trainer, pl_module)):
            let_load_reshape(module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to what the training step calls the model with."""
        self._outer, self._silent = pl_module, 0
        if self.evolver is not None:
            self._take_up(trainer, pl_module, self.evolver)
        else:
            self._listener = record_calls(pl_module)
        self._replicas = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change widths when an event is due."""
        boundary = batch_idx % trainer.accumulate_grad_batches == 0
        if self._replicas is None:
            # Only now has everybody made the copies that they need.
            self._replicas = ReplicaDiscovery(modules_to_search(trainer, pl_module), self.copies)
            self._replicas.load_state_dict(self._resumed.get("replicas", {}) if self._resumed else {})
        if self.evolver is None:
            self._begin_with(trainer, pl_module, lambda: self._known(trainer))
        if boundary:
            self._judge(trainer, pl_module)
        if self._due_since is not None:
            self._batches += 1
            if self.evolver is not None and boundary and self._batches >= self._wanted(trainer):
                self._hear()
                if self.evolver.observed or self._deaf:
                    self._event(trainer, pl_module, self.evolver)
                else:
                    # Code compiled before the hook was there does not run it.
                    self._deaf, self._batches = True, 0
                    reset_compiled_code()
        if boundary and self._is_due(trainer, batch_idx) and self._due_since is None:
            self._due_since, self._batches = trainer.global_step, 0
        if self._due_since is not None and self.evolver is not None and self._listener is None:
            self._listener = CallRecorder({self._root: self.evolver.model}, self.calibration_batches, self._outer)
        if self.evolver is not None:
            latest = [self.evolver.history.initial, *self.evolver.history.events][-1]
            pl_module.log("evolve/parameters", float(latest.parameters), prog_bar=True)
            pl_module.log("evolve/macs", float(latest.macs))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Trace once the first inputs are known: before a checkpoint is saved, for it must know of an event that is due."""
        if self.evolver is None:
            self._begin_with(trainer, pl_module, lambda: self._called(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metric that the policy judges by, until widths may change again."""
        if self._judged_metric is not None and not trainer.sanity_checking:
            self._metric = metric_of(trainer, self._judged_metric)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last cut, and leave no hook behind."""
        self._judge(trainer, pl_module)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._leave()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """When the hook that notes what a state dict does not say is not there yet, or gone after the run."""
        metadata = getattr(checkpoint["state_dict"], "_metadata", None)
        note = self._noted(pl_module)
        if note is not None and metadata is not None:
            metadata.setdefault("", {})[NOTE] = note.read(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The run's events and what the next ones depend on, for the checkpoint."""
        if self.evolver is None:
            return self._resumed or {}
        self._hear()
        return {
            "evolver": self.evolver.state_dict(),
            "root": self._root,
            "replicas": self._replicas.state_dict() if self._replicas else {},
            "due_since": self._due_since,
            "batches": self._batches,
            "seen_step": self._seen_step,
            "metric": self._metric,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the resumed run until its first inputs are known."""
        self.evolver = None
        self._resumed = state_dict or None
        self._due_since = state_dict.get("due_since")
        self._batches = state_dict.get("batches", 0)
        self._seen_step = state_dict.get("seen_step")
        self._metric = state_dict.get("metric")

    def load_worker_state(self, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """After a run in processes of their own: its events, and the module's numbers that no state dict holds."""
        self.load_state_dict(state)
        if self._resumed is not None:
            fit_shapes(pl_module.get_submodule(self._resumed["root"]), {}, note=self._resumed["evolver"]["note"])

    def _begin_with(
        self, trainer: Trainer, pl_module: LightningModule, find: Callable[[], tuple[str, list[Any]] | None]
    ) -> None:
        """Make the evolver on every process, if what is to be found is there."""

        def begin() -> None:
            found = find()
            if found is not None:
                self._begin(trainer, pl_module, *found)

        run_on_all_ranks(process_group(), begin)
        if self.evolver is not None:
            check_agreement(
                process_group(), "widths and times of events", f"{self.evolver.graph.sizes}, {self._when()}"
            )

    def _known(self, trainer: Trainer) -> tuple[str, list[Any]] | None:
        """The network's path and inputs of its, where some are known before the first batch."""
        if self.example_inputs is not None:
            return self._resumed_root() or "", [self.example_inputs]
        state = self._resumed["evolver"] if self._resumed else {}
        if self._resumed and (kept := state["batches"] or state.get("example")):
            # Interrupted among the batches of an event, or between a validation and what it means for the last cut.
            return self._resumed["root"], [trainer.strategy.batch_to_device(each) for each in kept]
        return None

    def _called(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, list[Any]] | None:
        """The network's path and what the first batch that was not skipped called it with."""
        if self._listener is None or not self._listener.names:
            self._silent += 1
            if self._silent < MAX_BATCHES_WITHOUT_CALL:
                return None
            raise TraceError(
                f"{type(pl_module).__name__}'s training step has run on {MAX_BATCHES_WITHOUT_CALL} batches without calling "
                "any module, so there is nothing to trace. Call the network as a module "
                "(self(x) or self.net(x), not self.forward(x)), or give "
                "WidthEvolution(example_inputs=...)."
            )
        root = self._resumed_root() or find_network(pl_module, self._listener, optimizers_of(trainer, pl_module))
        return root, self._listener.inputs(root)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, path: str, calls: list[Any]) -> None:
        """Make the evolver of the network there, with inputs to run it on."""
        self._root = path
        heard = self._listener.calls(self._root) if self._listener else []
        self._silence()
        root = pl_module.get_submodule(self._root)
        self._averages = [copy.get_submodule(self._root) for copy in weight_averages(trainer, pl_module)]
        state = self._resumed["evolver"] if self._resumed else None
        with default_dtype(trainer), logging_muted(pl_module):
            self.evolver = Evolver(
                root, optimizers_of(trainer, pl_module), self.policy, calls[0], self.calibration_batches, self.seed,
                self._along, after_change=partial(rebuild_ddp, trainer.strategy, pl_module),
                graph=self._graph(root, calls[0]) if state is None else from_plain(state["graph"]),
            )  # fmt: skip
        if state is not None:
            self.evolver.load_state_dict(state)
            self._resumed = None
            for copy in self._averages:
                fit_shapes(copy, {}, note=state["note"])
        for call in heard if self._due_since is not None else ():
            self.evolver.observe(*call)
        self._note = self._numbers(self.evolver).register(pl_module)
        log_event(trainer, self.evolver.history.initial)
        log.info(
            "%d resizable widths hold %.1f %% of the %s parameters; %d frozen",
            len(self.evolver.graph.resizable),
            100 * self.evolver.graph.coverage,
            f"{self.evolver.graph.parameters:,}",
            sum(width.frozen is not None for width in self.evolver.graph.widths.values()),
        )

    def _take_up(self, trainer: Trainer, pl_module: LightningModule, evolver: Evolver) -> None:
        """A second `fit` with this callback: the same network goes on, with whatever optimizers and widths it has now."""
        self._due_since, self._seen_step = None, None
        state = evolver.state_dict()
        self.evolver, self._resumed = None, None
        known = dict(pl_module.named_modules()).get(self._root) is evolver.model
        if known and _fits(evolver):
            replicas = self._replicas.state_dict() if self._replicas else {}
            self._resumed = {"evolver": {**state, "batches": []}, "root": self._root, "replicas": replicas}
        self._listener = record_calls(pl_module)

    def _noted(self, pl_module: LightningModule) -> Note | None:
        """What a checkpoint has to say of the widths besides shapes; None before they are known."""
        if self.evolver is not None:
            return self._numbers(self.evolver)
        if self._resumed is None:
            return None
        root = self._resumed["root"]
        return Note.of(pl_module.get_submodule(root), from_plain(self._resumed["evolver"]["graph"]), root)

    def _graph(self, root: nn.Module, inputs: Any) -> WidthGraph:
        graph = trace(root, first_samples(inputs, 2))
        return self._replicas.settle(root, graph) if self._replicas else graph

    def _along(self) -> list[nn.Module]:
        """What goes through an event with the network: copies of its weights."""
        if self.evolver is None or self._replicas is None:
            return self._averages
        evolver = self.evolver
        return [*self._averages, *self._replicas.along(evolver.model, evolver.graph, evolver.optimizers)]

    def _numbers(self, evolver: Evolver) -> Note:
        note = Note.of(evolver.model, evolver.graph, self._root)
        return note.mirrored(self._replicas.pairs(evolver.model, evolver.graph)) if self._replicas else note

    def _resumed_root(self) -> str | None:
        return self._resumed["root"] if self._resumed else None

    def _when(self) -> str:
        return f"{self.schedule}, calibration_batches={self.calibration_batches}, seed={self.seed}"

    def _event(self, trainer: Trainer, pl_module: LightningModule, evolver: Evolver) -> None:
        # Some runs make new ones on their way.
        evolver.optimizers = optimizers_of(trainer, pl_module)
        with default_dtype(trainer), logging_muted(pl_module):
            event = evolver.step(at=trainer.global_step, progress=progress_of(trainer))
        evolver.forget()
        self._silence()
        if self._deaf:
            reset_compiled_code()
        self._deaf = False
        self._due_since = None
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

    def _hear(self) -> None:
        """Hand what was heard to the evolver."""
        if self.evolver is not None and self._listener is not None:
            for call in self._listener.calls(self._root):
                self.evolver.observe(*call)
            self._silence()
            if self._due_since is not None:
                self._listener = CallRecorder({self._root: self.evolver.model}, self.calibration_batches, self._outer)

    def _wanted(self, trainer: Trainer) -> int:
        """Batches to measure on; not so many that the next event would be due before, or most of a short epoch gone."""
        steps = self.schedule.every_n_steps
        if steps is None:
            until = max(1.0, trainer.num_training_batches * (self.schedule.every_n_epochs or 1) / 2)
        else:
            until = steps * trainer.accumulate_grad_batches
        return int(min(self.calibration_batches, until))

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        before, self._seen_step = self._seen_step, trainer.global_step
        epoch = trainer.current_epoch if batch_idx == 0 else None
        return self.schedule.due(trainer.global_step, progress_of(trainer), epoch, before)

    def _silence(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._listener = None

    def _leave(self) -> None:
        self._hear()
        self._silence()
        if self._note is not None:
            self._note.remove()
        self._note, self._outer = None, None


def _fits(evolver: Evolver) -> bool:
    """Whether the model still has the widths that its evolver knows."""
    try:
        check_fits(evolver.graph, evolver.model)
    except RecordError:
        return False
    return True
