"""`WidthEvolutionCallback`: *when* widths change inside a run of the transformers library's `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import load_state_dict_pre_hooks, tree_map_only
from evolvenet.engine.announcements import announce_end, show_messages
from evolvenet.engine.ddp_wrapper import renew_ddp
from evolvenet.engine.distributed import check_agreement, process_group, run_on_all_ranks
from evolvenet.engine.event_timer import EventState, EventTimer
from evolvenet.engine.evolution_callback import EvolutionCallback
from evolvenet.engine.evolver import Evolver
from evolvenet.engine.invariants import check_resizable
from evolvenet.engine.run_checks import no_event_possible, warn
from evolvenet.engine.run_curves import RunCurves
from evolvenet.errors import MissingPackageError, PolicyError, TraceError, UnsupportedStrategyError
from evolvenet.execution.call_recorder import CallRecorder
from evolvenet.execution.step import Step
from evolvenet.execution.step_recorder import StepRecorder
from evolvenet.graph.format_version import checked_format
from evolvenet.graph.serialization import from_state_dict
from evolvenet.signals import deferred_signals
from evolvenet.surgery.checkpoint import fit_shapes, register_reshape_before_load
from evolvenet.surgery.module_replacement import fit_replacements, replacements
from evolvenet.tracing.unreached import warn_of_unreached

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"evolvenet.transformers: expected the transformers library, got {error}. Install it with pip install "
        "transformers accelerate."
    ) from error

from evolvenet.transformers.adapter_ranks import note_ranks, register_ranks_before_load
from evolvenet.transformers.adapters import is_adapted
from evolvenet.transformers.loss import LossStep, loss_and_logits, trace_with_loss
from evolvenet.transformers.running import (
    load_tensors,
    loaded_folder,
    metrics_of,
    resumed_folder,
    running_trainer,
    save_tensors,
    unwrapped,
)

# Callbacks that are restored by transformers itself are built anew from JSON, which cannot hold a policy. Under a name
# that is no callback's it leaves the entry alone, in the checkpoint and on the way back.
_KEY = "evolvenet"
_OF_EACH_RANK = ("example", "batches", "gradients")


@dataclass(eq=False, repr=False)
class WidthEvolutionCallback(EvolutionCallback, TrainerCallback):
    """Prunes and grows the widths of the model that a `transformers.Trainer` trains.

    Give it to `Trainer(callbacks=[...])`, so that `trainer.train(resume_from_checkpoint=True)` takes the checkpoint's
    widths; a callback that is added later comes too late for that. Events happen between two optimizer steps.
    `logging.getLogger("evolvenet")` gets one line an event, and a table at the end of the training; they appear on stderr
    unless it or the root logger has been set up otherwise. "evolve/parameters" and "evolve/macs" are added to what the
    trainer logs.

    The model is traced on the first training batch; its loss and its logits count, other outputs may change, unless `outputs`
    names them. Where the trainer has a `compute_loss` of its own (distillation,
    contrastive losses, losses of hidden states), that is traced, and statistics and trials run on it. A width that modules
    of the trainer itself read, a projection beside the model for example, keeps its size.

    In several processes (`torchrun`, `accelerate launch`) rank 0 measures on a sample of all ranks' batches and decides, all
    ranks apply the change or none does, and DDP's wrapper is made anew. `Tolerance` judges a cut by what the trainer evaluates
    (`eval_strategy`), under the trainer's name of the metric: "eval_loss", or "loss" for short. While a cut is pending,
    checkpoints hold the network before it in the file evolvenet.pt.

    The arguments are those of `evolvenet.engine.evolution_callback.EvolutionCallback`. An event measures on the last training
    batches.

    Raises:
        PolicyError: for values out of range, a policy without a method `propose`, or, after an evaluation, one that judges by a
            metric that is not evaluated.
        TraceError: after the first batch, if nothing in the model can be resized.
        UnsupportedStrategyError: before training starts, where a process has several devices (`nn.DataParallel`) or
            parameters are sharded (DeepSpeed, FSDP).
        RankMismatchError: during training, if the processes do not agree on the model.

    >>> from evolvenet import Threshold
    >>> callback = WidthEvolutionCallback(policy=Threshold(prune=0.01, grow=0.9), every_n_steps=100)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._inputs: Any = None
        self._loss: LossStep | None = None
        self._steps: StepRecorder | None = None
        self._recording = ExitStack()
        self._events_before = 0
        self._trainer: Trainer | None = None
        self._evaluated: dict[str, float] = {}
        self._was_observed = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Let the model take a checkpoint's widths: the trainer loads one before training begins."""
        _register_before_load(model)

    @deferred_signals("the start of the run")
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Refuse what cannot work, and take up where a checkpoint was written."""
        show_messages()
        _refuse_several_devices(args)
        self.restriction.check(name for name, _ in model.named_modules())
        _register_before_load(model)
        self._stop_recording()
        self.evolver, self._inputs, self._timer = None, self.example_inputs, EventTimer(self.schedule)
        self._trainer = running_trainer()
        loss = None if self._trainer is None else LossStep(self._trainer)
        self._loss = loss if loss is not None and loss.is_own else None
        self._resumed = _evolver_state(state)
        self._events_before = len(self._resumed["history"]["events"]) if self._resumed else 0
        self._was_observed = False
        self.curves = RunCurves()
        for entry in state.log_history:
            self.curves.add(int(entry["step"]), metrics_of(entry))
        self.curves.begin()
        self._evaluated = {**(self._resumed or {}).get("evaluated", {})}
        if self._resumed is None:
            warn(no_event_possible(self.schedule, state.max_steps, epochs=state.num_train_epochs))
        else:
            fit_shapes(model, {}, record=self._resumed["note"])
            self._take_up_pending_cut(self._resumed, args)

    @deferred_signals("the event")
    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **unused: Any,
    ) -> None:
        """Trace once the first inputs are known, change widths when an event is due, record the step's batches."""
        if self.evolver is None and (self._steps.calls() if self._loss and self._steps else self._inputs is not None):
            self._start_on_all_ranks(model, optimizer, state)
        self._judge(state)
        epoch = state.epoch or 0.0
        progress = state.global_step / max(state.max_steps, 1)
        # A resumed run may be due for an event before its first batch: the timer keeps it until the model is traced.
        self._timer.check(state.global_step, progress, int(epoch) if epoch == int(epoch) else None)
        if self.evolver is not None and self._timer.state is EventState.DUE:
            self.evolver.step(at=state.global_step, progress=progress)
            self._timer.finish()
            self._save_state(self.evolver, state)
        self._record(model)

    @deferred_signals("the step's record")
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Stop recording: the model has no hooks of ours while it is evaluated or saved."""
        calls = list(self._recorder.calls("")) if self._recorder else []
        if self.evolver is None:
            self._inputs = calls[0][0] if calls and self._inputs is None else self._inputs
        else:
            for inputs, gradients in self._steps.calls() if self._follows_loss and self._steps else calls:
                self.evolver.observe(inputs, gradients, copy=False)
        self._stop_recording()
        if self._inputs is None and self.evolver is None and self._loss is None:
            raise TraceError(
                f"A training step has run without calling the {type(model).__name__} itself, so there is nothing to trace. "
                "Call model(...) in compute_loss, or give WidthEvolutionCallback(example_inputs=...)."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        """Keep the metrics for a report, and add the network's size to what is logged."""
        self.curves.add(state.global_step, metrics_of(logs or {}))
        if self.history is None:
            return
        latest = self.history.latest
        # The record of the run holds a copy of the logs that was made before this call.
        for entry in (logs, *state.log_history[-1:]):
            if entry is not None:
                entry.update({"evolve/parameters": latest.parameters, "evolve/macs": latest.macs})

    @deferred_signals("the copy of the evolution's state")
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        """Keep what the policy judges by, until widths may change again. Several evaluation sets are evaluated in turn."""
        if self._judged_metric is not None and metrics:
            self._evaluated |= {name: float(each) for name, each in metrics.items() if isinstance(each, (int, float))}
            if self.evolver is not None:
                self._save_state(self.evolver, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Write the network before a pending cut beside the checkpoint's other files."""
        saved = self.evolver.state_dict() if self.evolver is not None and self._judged_metric is not None else {}
        if (saved.get("pending_cut") or {}).get("past") is not None:
            own = tree_map_only(Tensor, torch.Tensor.cpu, {name: saved[name] for name in _OF_EACH_RANK})
            save_tensors(args, state, {"past": saved["pending_cut"]["past"], "ranks": process_group().gather(own)})

    @deferred_signals("the judgement of the last cut")
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Judge the last cut, and leave no hook behind; the best checkpoint, if it was loaded, brings its numbers along."""
        self._stop_recording()
        self.curves.end()
        loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not loaded:
            self._judge(state)
        announce_end(self.evolver, self._events_before)
        if loaded:
            best = TrainerState.load_from_json(str(Path(state.best_model_checkpoint or "", "trainer_state.json")))
            fit_shapes(model, {}, record=(_evolver_state(best) or {}).get("note"))
            self._renew_ddp()
        self._trainer = None

    @property
    def _follows_loss(self) -> bool:
        return self.evolver is not None and isinstance(self.evolver.example_inputs, Step)

    def _record(self, model: nn.Module) -> None:
        """Record the model's calls, and its trainer's where what is traced is the loss, or not known yet."""
        if not self._follows_loss:
            self._recorder = CallRecorder({"": model}, self._most_batches)
        self._steps = None
        if self._loss is not None and (self.evolver is None or self._follows_loss):
            self._steps = StepRecorder(model, self._most_batches)
            self._recording.enter_context(self._loss.recorded_by(self._steps))

    def _stop_recording(self) -> None:
        super()._stop_recording()
        self._recording.close()

    def _start_on_all_ranks(self, model: nn.Module, optimizer: Optimizer, state: TrainerState) -> None:
        """Make the evolver. Where that fails on one rank, all raise."""
        group = process_group()
        run_on_all_ranks(group, lambda: self._start(model, optimizer))
        assert self.evolver is not None
        check_agreement(
            group, "widths and times of events", f"{self.evolver.graph.sizes}, {self.schedule}, {self.seed}"
        )
        if not self._was_observed:
            self.evolver.observe(self._inputs)
        self._inputs = None
        self._timer.start()
        self._save_state(self.evolver, state)

    def _start(self, model: nn.Module, optimizer: Optimizer) -> None:
        inputs, graph = self._inputs, None
        outputs = self.outputs or (loss_and_logits if self._loss is None else None)
        if self._loss is not None and self._steps is not None:
            step = Step(self._loss, self._steps.calls()[0][0])
            if self._resumed is None:
                inputs, graph = trace_with_loss(model, inputs, step, self.outputs)
                check_resizable(model, graph)
                warn_of_unreached(graph)
            else:
                inputs = step if self._resumed.get("follows_loss") else inputs
                graph = from_state_dict(self._resumed["graph"])
        self.evolver = Evolver(
            model, unwrapped(optimizer), self.policy, inputs, self.calibration_batches, self.seed, graph=graph,
            network=self.network, fixed=self.fixed, multiple=self.multiple, new_units=self.new_units, update=self.update,
            outputs=None if isinstance(inputs, Step) else outputs, after_change=self._after_change,
        )  # fmt: skip
        if self._resumed is not None:
            self.evolver.load_state_dict(self._resumed)
        self._inputs = inputs

    def _judge(self, state: TrainerState) -> None:
        """What the last evaluation means for the last cut.

        Raises:
            PolicyError: if it had no metric of the name that the policy judges by.
        """
        name = self._judged_metric
        if not self._evaluated or self.evolver is None or name is None:
            return
        value = next((self._evaluated[each] for each in (name, f"eval_{name}") if each in self._evaluated), None)
        if value is None:
            raise PolicyError(
                f"Expected the trainer to evaluate {name!r}, by which cuts are judged, got {', '.join(sorted(self._evaluated))}. "
                "Return it from compute_metrics, or name another metric."
            )
        self._evaluated = {}
        self.evolver.judge(value, at=state.global_step)
        self._save_state(self.evolver, state)

    def _take_up_pending_cut(self, resumed: dict[str, Any], args: TrainingArguments) -> None:
        """Read the network before the cut that was pending when the checkpoint was saved, and inputs to run it on."""
        pending = resumed.get("pending_cut")
        if not pending or not pending["has_snapshot"]:
            return
        tensors = load_tensors(resumed_folder(), args.device)
        if not all(process_group().all_gather(bool(tensors))):
            warn(
                "The checkpoint holds a cut that is not judged yet, and no evolvenet.pt for all processes: the cut stays."
            )
            return
        own = tensors["ranks"][process_group().rank % len(tensors["ranks"])]
        resumed["pending_cut"] = {**pending, "past": tensors["past"]}
        # An event may follow right after the judgement.
        resumed |= {name: own[name] for name in ("batches", "gradients")}
        if own["example"] and self._inputs is None and not resumed["follows_loss"]:
            (self._inputs,), self._was_observed = own["example"], True

    def _after_change(self) -> None:
        if self.evolver is not None:
            note_ranks(self.evolver.model)
        self._renew_ddp()

    def _renew_ddp(self) -> None:
        if self._trainer is not None and self._trainer.model_wrapped is not None:
            renew_ddp(self._trainer.model_wrapped)

    def _save_state(self, evolver: Evolver, state: TrainerState) -> None:
        """Write the evolver's state into the trainer's, which goes into every checkpoint."""
        # The trainer's state is JSON: no tensors.
        saved = evolver.state_dict()
        pending = saved["pending_cut"]
        _callback_states(state)[_KEY] = {
            **saved,
            "batches": [],
            "gradients": [],
            "example": [],
            "evaluated": dict(self._evaluated),
            "pending_cut": pending and {**pending, "past": None, "has_snapshot": pending["past"] is not None},
            "follows_loss": isinstance(evolver.example_inputs, Step),
            "note": {**saved["note"], "buffers": {}},
            "replaced": {path: dict(module.record()) for path, module in replacements(evolver.model).items()},
        }


def _callback_states(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks in a trainer's state, by name: a dict, whatever its annotation says."""
    return cast(dict[str, Any], state.stateful_callbacks)


def _evolver_state(state: TrainerState) -> dict[str, Any] | None:
    """What `_save_state` wrote; raises a `RecordError` if a newer EvolveNet did."""
    saved = _callback_states(state).get(_KEY)
    return saved and checked_format(saved, "The state of WidthEvolutionCallback in the checkpoint")


def _register_before_load(model: nn.Module) -> None:
    if fit_replaced not in load_state_dict_pre_hooks(model):
        model.register_load_state_dict_pre_hook(fit_replaced)
    (register_ranks_before_load if is_adapted(model) else register_reshape_before_load)(model)


def fit_replaced(module: nn.Module, state: Mapping[str, Any], prefix: str, *unused: Any) -> None:
    """Give a model the factors and the removed blocks of the checkpoint that its trainer is about to load.

    The weights lie in a file without metadata, so they are told by the trainer's state beside it. A load-state-dict pre-hook.

    Raises:
        RecordError: if the checkpoint is of another model.
    """
    folder = loaded_folder()
    path = folder and folder / "trainer_state.json"
    if path is None or prefix or not path.is_file():
        return
    saved = _evolver_state(TrainerState.load_from_json(str(path)))
    if saved is not None and "replaced" in saved:
        fit_replacements(module, saved["replaced"], state)


def _refuse_several_devices(args: TrainingArguments) -> None:
    sharded = [name for name in ("deepspeed", "fsdp") if getattr(args, name, None)]
    if args.n_gpu > 1 or sharded:
        raise UnsupportedStrategyError(
            "WidthEvolutionCallback changes parameters that lie whole on one device of each process, got "
            f"{max(args.n_gpu, 1)} devices in one process{''.join(f', {name}' for name in sharded)}. Start one process for "
            "each device (torchrun --nproc_per_node=2 train.py), or show the run one device (CUDA_VISIBLE_DEVICES=0). A model "
            "that has to be sharded can be afterwards: evolvenet.transformers.save_pretrained, from_pretrained, and shard."
        )
