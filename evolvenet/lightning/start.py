"""The start of `WidthEvolution`: what is traced, on which batch, and the evolver that is made of it, the same on every rank."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from evolvenet.engine.announcements import announce_start
from evolvenet.engine.distributed import check_agreement, process_group, run_on_all_ranks
from evolvenet.engine.evolution_callback import EvolutionCallback
from evolvenet.engine.evolver import Evolver
from evolvenet.engine.replica_discovery import ReplicaDiscovery
from evolvenet.engine.run_checks import warn
from evolvenet.errors import TraceError
from evolvenet.execution.routes import modules_called
from evolvenet.graph.serialization import to_state_dict
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lightning.first_runs import FirstRuns
from evolvenet.lightning.loggers import log_event
from evolvenet.lightning.module import find_network, logging_muted, optimizers_of, weight_averages
from evolvenet.lightning.module_summary import ModulesBefore
from evolvenet.lightning.recording import SubjectRecorder
from evolvenet.lightning.subject import (
    NETWORK,
    NETWORKS,
    TRAINING_STEP,
    Subject,
    choose_subject,
    resumed_subject,
    subject_of_example,
)
from evolvenet.lightning.trainer_parts import default_dtype, rebuild_ddp
from evolvenet.surgery.checkpoint import fit_shapes
from evolvenet.tracing.unreached import warn_of_unreached

log = logging.getLogger("evolvenet")
MAX_BATCHES_WITHOUT_CALL = 8
"""Batches without a call of any module, since a training step may skip some, before there seems to be no network."""


@dataclass(eq=False, repr=False)
class EvolutionStart(EvolutionCallback, ABC):
    """What is traced, and when. `LightningEvolution` is the only subclass.

    Args:
        policy, every_n_epochs, every_n_steps, start_step, stop, example_inputs, calibration_batches, seed, network, fixed,
            multiple: see `EvolutionCallback`.
        copies: see `WidthEvolution`.
    """

    copies: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._subject: Subject | None = None
        self._ignores_example = False
        self._untraceable = False
        self._recorder: SubjectRecorder | None = None
        self._batches: dict[str, tuple[Any, int]] = {}
        self._first_calls: list[Any] = []
        self._first_runs: FirstRuns | None = None
        self._module: LightningModule | None = None
        self._cleanup = ExitStack()
        self._replicas: ReplicaDiscovery | None = None
        self._averages: list[nn.Module] = []
        self._metric: float | None = None
        self._has_trained = self._has_failed = False
        self._optimizer_norms: list[dict[str, float]] = []
        self._events_before = 0
        self._modules_before = ModulesBefore()
        self._record_handle: RemovableHandle | None = None

    def _start_on_all_ranks(
        self, trainer: Trainer, pl_module: LightningModule, find: Callable[[], Subject | None]
    ) -> None:
        """Make the evolver on every rank, if `find` returns what is to be changed."""
        if self._untraceable:
            return
        group, resumed = process_group(), self._resumed
        try:
            subject = run_on_all_ranks(group, find)
            if all(group.all_gather(subject is not None)):
                assert subject is not None
                subject = self._of_the_rank_that_calls_most(pl_module, subject)
                run_on_all_ranks(group, lambda: self._start(trainer, pl_module, subject))
        except TraceError as problem:
            # Also where another rank has failed, and this one has its evolver.
            self._abandon_start(resumed)
            warn(f"Widths stay as they are in this run: {problem}")
            return
        if self.evolver is not None:
            assert self._subject is not None
            with default_dtype(trainer), logging_muted(pl_module):
                self.evolver.calibrate(self._subject.inputs, trainer.num_training_batches)
            for call in self._first_calls:
                self.evolver.observe(*call, copy=False)
            self._first_calls = []
            times = f"{self.schedule}, calibration_batches={self.calibration_batches}, seed={self.seed}"
            check_agreement(process_group(), "widths and times of events", f"{self.evolver.graph.sizes}, {times}")

    def _abandon_start(self, resumed: dict[str, Any] | None) -> None:
        """Leave the widths as they are in this run: nothing stays of an evolver, and of a resumed run its state."""
        self._untraceable, self._resumed = True, resumed
        self._stop_recording()
        if self._first_runs is not None:
            self._first_runs.close()
        self._forget_record()
        self.evolver = self._subject = self._first_runs = None
        self._first_calls, self._averages = [], []
        self._timer.stop()

    def _called_on_all_ranks(self, pl_module: LightningModule) -> bool:
        """Whether the training step has called a module on every rank, each on any of its batches so far."""
        if self._untraceable:
            return False
        called = self._recorder is not None and bool(self._recorder.names)
        if all(process_group().all_gather(called)):
            return True
        self._timer.batches_without_call += 1
        if self._timer.batches_without_call >= MAX_BATCHES_WITHOUT_CALL:
            self._untraceable = True
            self._stop_recording()
            warn(
                f"Widths stay as they are in this run: {type(pl_module).__name__}'s training step has run on "
                f"{MAX_BATCHES_WITHOUT_CALL} batches without calling any module, so there is nothing to trace. Call the network "
                "as a module (self(x) or self.net(x), not self.forward(x)), or give WidthEvolution(example_inputs=...)."
            )
        return False

    @property
    def _may_be_known(self) -> bool:
        """Whether there may be inputs to trace on before the first batch; the same on every rank."""
        given = self.example_inputs is not None and not self._ignores_example
        return not self._untraceable and (self._resumed is not None or given)

    def _known_subject(self, trainer: Trainer, pl_module: LightningModule) -> Subject | None:
        """What is to be changed, where inputs for it are known before the first batch."""
        if self._resumed is not None:
            # Interrupted while batches were gathered, or between a validation and the judgement of the last cut.
            kept = self._resumed["evolver"]["batches"] or self._resumed["evolver"].get("example")
            inputs = trainer.strategy.batch_to_device(kept[0]) if kept else self.example_inputs
            return None if inputs is None else resumed_subject(self._resumed, inputs)
        if self.example_inputs is None or self._ignores_example:
            return None
        with default_dtype(trainer), logging_muted(pl_module):
            return subject_of_example(pl_module, self.example_inputs, self._settle, self.outputs)

    def _recorded_subject(self, trainer: Trainer, pl_module: LightningModule) -> Subject:
        """What is to be changed, from what the first batch that called a module ran."""
        assert self._recorder is not None
        if self._resumed is not None:
            return self._subject_of_state(self._recorder, self._resumed)
        first = {path: self._recorder.inputs(path)[0] for path in self._recorder.names}
        path = find_network(pl_module, self._recorder.names, optimizers_of(trainer, pl_module))
        with default_dtype(trainer), logging_muted(pl_module):
            return choose_subject(
                pl_module, path, first, self._batches, self._settle, self.outputs, self._new_units.needs_loss
            )

    @abstractmethod
    def _settle(self, root: nn.Module, graph: WidthGraph) -> WidthGraph:
        """The graph without widths that replicas and copies of the weights keep as they are."""

    @abstractmethod
    def _models_to_update(self) -> list[nn.Module]:
        """The replicas of the network that go through an event's changes."""

    @abstractmethod
    def _keep_record(self, pl_module: LightningModule) -> None:
        """Keep the module's record, and write it into its state dicts until the run ends."""

    @abstractmethod
    def _forget_record(self) -> None:
        """State dicts of the module are written without a record again."""

    def _subject_of_state(self, recorder: SubjectRecorder, state: Mapping[str, Any]) -> Subject:
        """What an interrupted run or another rank has chosen, with inputs of the first batch that called a module.

        Raises:
            TraceError: where no batch of this process has called it.
        """
        first = {path: recorder.inputs(path)[0] for path in recorder.names}
        networks = {path: inputs for path, inputs in first.items() if path}
        batch, _ = self._batches.get("training_step", (None, 0))
        inputs = {NETWORK: first.get(state["root"]), NETWORKS: networks or None, TRAINING_STEP: batch}[state["kind"]]
        if inputs is None:
            raise TraceError(
                f"Expected inputs of {state['root'] or 'the module'} ({state['kind']}), on which the interrupted run or another "
                f"process has traced it, got calls of {', '.join(sorted(first)) or 'nothing'} alone in this process. Let the "
                "training step call the same modules in the first batch of every process, or give "
                "WidthEvolution(example_inputs=...)."
            )
        return resumed_subject(state, inputs)

    def _of_the_rank_that_calls_most(self, pl_module: LightningModule, subject: Subject) -> Subject:
        """The subject, or that of another rank, whose batch has called modules that this rank's has not."""
        group = process_group()
        found = group.all_gather(subject.graph.sizes)
        if all(sizes == found[0] for sizes in found):
            return subject
        root = pl_module.get_submodule(subject.path)
        called = run_on_all_ranks(group, lambda: len(modules_called(root, subject.inputs)))
        calls = group.all_gather(called)
        state = {**subject.state_dict(), "evolver": {"graph": to_state_dict(subject.graph)}}
        best = calls.index(max(calls))
        chosen = group.all_gather(state if group.rank == best else None)[best]

        def own() -> Subject:
            if called == max(calls) or self._recorder is None:
                return subject  # Where the graphs differ all the same, `check_agreement` says so.
            return self._subject_of_state(self._recorder, chosen)

        return run_on_all_ranks(group, own)

    def _start(self, trainer: Trainer, pl_module: LightningModule, subject: Subject) -> None:
        """Make the evolver of what was chosen."""
        self._subject = subject
        calls = self._recorder.calls(subject.kind, subject.path) if self._recorder else []
        self._stop_recording()
        root = pl_module.get_submodule(subject.path)
        self._averages = [copy.get_submodule(subject.path) for copy in weight_averages(trainer, pl_module)]
        state = self._resumed["evolver"] if self._resumed else None
        self.restriction.check((name for name, _ in pl_module.named_modules()), subject.graph, subject.path)
        with default_dtype(trainer), logging_muted(pl_module):
            self.evolver = Evolver(
                root, optimizers_of(trainer, pl_module), self.policy, subject.inputs, self.calibration_batches, self.seed,
                self._models_to_update, after_change=partial(rebuild_ddp, trainer.strategy, pl_module),
                graph=subject.graph, network=self.network, fixed=self.fixed, multiple=self.multiple, path=subject.path,
                outputs=self.outputs if subject.kind == NETWORK else None, new_units=self.new_units, update=self.update,
            )  # fmt: skip
        warn_of_unreached(subject.graph)
        if not self.evolver.graph.resizable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.evolver.graph.reasons.items())
            log.warning("No width of %s can be resized: %s", type(root).__name__, reasons)
        self._first_runs = FirstRuns(pl_module, subject, self.evolver.graph, self._settle)
        if state is not None:
            self.evolver.load_state_dict(state)
            self._resumed = None
            for copy in self._averages:
                fit_shapes(copy, {}, record=state["note"])
        self._timer.start()
        self._first_calls = calls if self._timer.recording else []
        self._keep_record(pl_module)
        log_event(trainer, self.evolver.history.initial, self.evolver.history)
        announce_start(self.evolver.graph)
