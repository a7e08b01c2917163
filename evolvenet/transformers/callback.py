"""`WidthEvolutionCallback`: *when* widths change inside a run of the transformers library's `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from evolvenet.engine.evolver import Evolver
from evolvenet.engine.history import History
from evolvenet.errors import MissingPackageError, PolicyError, TraceError, UnsupportedStrategyError
from evolvenet.execution.call_recorder import CallRecorder
from evolvenet.policies.base import Policy, judged_metric
from evolvenet.policies.schedule import Schedule
from evolvenet.surgery.checkpoint import fit_shapes, let_load_reshape

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"evolvenet.transformers: expected the transformers library, got {error}. Install it with pip install "
        "'evolvenet[transformers]'."
    ) from error

# Callbacks that are restored by transformers itself are built anew from JSON, which cannot hold a policy. Under a name
# that is no callback's it leaves the entry alone, in the checkpoint and on the way back.
_KEY = "evolvenet"


class WidthEvolutionCallback(TrainerCallback):
    """Prunes and grows the widths of the model that a `transformers.Trainer` trains.

    Give it to `Trainer(callbacks=[...])`, so that `trainer.train(resume_from_checkpoint=True)` takes the checkpoint's
    widths; a callback that is added later comes too late for that. The model is traced on the first training batch.
    Events happen between two optimizer steps. Each changed width is logged through `logging.getLogger("evolvenet")`;
    "evolve/parameters" and "evolve/macs" are added to what the trainer logs.

    Args:
        policy: proposes sizes, for example `evolvenet.Threshold`, or one of your own (see `evolvenet.Policy`).
        every_n_epochs: an event at the start of every n-th epoch; the default, with n = 1, if neither is given.
        every_n_steps: or an event every n optimizer steps.
        start_step: no event before this optimizer step.
        stop: share of the run's optimizer steps, 0 … 1, after which widths stay and the network settles.
        example_inputs: what the model is called with, if the first training batch should not be waited for.
        calibration_batches: how many of the last training batches an event measures on.
        seed: of the new units' random directions.

    Raises:
        PolicyError: for values out of range, a policy without a method `propose`, or one that takes cuts back.
        TraceError: after the first batch, if nothing in the model can be resized.
        UnsupportedStrategyError: before training starts, with several processes or devices.

    >>> from evolvenet import Threshold
    >>> callback = WidthEvolutionCallback(policy=Threshold(prune=0.01, grow=0.9), every_n_steps=100)
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
    ) -> None:
        if calibration_batches < 1:
            raise PolicyError(f"Expected calibration_batches of 1 or more, got {calibration_batches}.")
        if judged_metric(policy) is not None:
            raise PolicyError(
                f"Expected a policy that does not take cuts back, got {type(policy).__name__}: what it would go back to cannot "
                "be kept in the JSON of a transformers checkpoint. Take Threshold or Budget here, or Evolver in your own loop."
            )
        self.policy = policy
        self.schedule = Schedule(every_n_epochs, every_n_steps, start_step, stop)
        self.example_inputs = example_inputs
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.evolver: Evolver | None = None
        self._resumed: dict[str, Any] | None = None
        self._inputs: Any = None
        self._listener: CallRecorder | None = None
        self._owed = False

    @property
    def history(self) -> History | None:
        """The run's events, None before the model is traced."""
        return self.evolver.history if self.evolver else None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Let the model take a checkpoint's widths: the trainer loads one before training begins."""
        let_load_reshape(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Refuse what cannot work, and take up where a checkpoint was written."""
        _refuse_several_devices(args)
        let_load_reshape(model)
        self._deafen()
        self.evolver, self._inputs, self._owed = None, self.example_inputs, False
        self._resumed = _evolver_state(state)
        if self._resumed is not None:
            fit_shapes(model, {}, note=self._resumed["note"])

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **unused: Any,
    ) -> None:
        """Trace once the first inputs are known, change widths when an event is due, listen to the step's batches."""
        if self.evolver is None and self._inputs is not None:
            self._begin(model, optimizer, state)
        due = self._due(state) or self._owed
        # A resumed run may start right at an event, before its first batch: it is made up for after that.
        self._owed = due and self.evolver is None
        if due and self.evolver is not None:
            self.evolver.step(at=state.global_step, progress=state.global_step / max(state.max_steps, 1))
            self._remember(self.evolver, state)
        self._listener = CallRecorder({"": model}, self.calibration_batches)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Stop listening: nothing of ours is on the model while it is evaluated or saved."""
        for inputs, gradients in self._listener.calls("") if self._listener else ():
            if self.evolver is not None:
                self.evolver.observe(inputs, gradients)
            elif self._inputs is None:
                self._inputs = inputs
        self._deafen()
        if self._inputs is None and self.evolver is None:
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
        """Add the network's size to what is logged."""
        if self.history is None:
            return
        latest = [self.history.initial, *self.history.events][-1]
        # The record of the run holds a copy of the logs that was made before this call.
        for entry in (logs, *state.log_history[-1:]):
            if entry is not None:
                entry.update({"evolve/parameters": latest.parameters, "evolve/macs": latest.macs})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **unused: Any
    ) -> None:
        """Leave no hook behind; the best checkpoint, if it was loaded, brings its numbers along."""
        self._deafen()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = TrainerState.load_from_json(str(Path(state.best_model_checkpoint, "trainer_state.json")))
            fit_shapes(model, {}, note=(_evolver_state(best) or {}).get("note"))

    def _begin(self, model: nn.Module, optimizer: Optimizer, state: TrainerState) -> None:
        inner = _unwrapped(optimizer)
        self.evolver = Evolver(model, inner, self.policy, self._inputs, self.calibration_batches, self.seed)
        if self._resumed is not None:
            self.evolver.load_state_dict(self._resumed)
        self.evolver.observe(self._inputs)
        self._inputs = None
        self._remember(self.evolver, state)

    def _due(self, state: TrainerState) -> bool:
        epoch = state.epoch or 0.0
        share = state.global_step / max(state.max_steps, 1)
        return self.schedule.due(state.global_step, share, int(epoch) if epoch == int(epoch) else None)

    def _deafen(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    @staticmethod
    def _remember(evolver: Evolver, state: TrainerState) -> None:
        """Write into the trainer's state, which goes into every checkpoint, what a resumed run needs."""
        # The trainer's state is JSON: no tensors.
        known = evolver.state_dict()
        _kept(state)[_KEY] = {**known, "batches": [], "gradients": [], "note": {**known["note"], "buffers": {}}}


def _kept(state: TrainerState) -> dict[str, Any]:
    """What a trainer's state keeps for callbacks, by name: a dict, whatever its annotation says."""
    return cast(dict[str, Any], state.stateful_callbacks)


def _evolver_state(state: TrainerState) -> dict[str, Any] | None:
    """What `_remember` wrote; JSON has made lists of tuples."""
    kept = _kept(state).get(_KEY)
    if kept is None:
        return None
    numbers = [[path, name, tuple(v) if isinstance(v, list) else v] for path, name, v in kept["note"]["numbers"]]
    return {**kept, "note": {**kept["note"], "numbers": numbers}}


def _refuse_several_devices(args: TrainingArguments) -> None:
    sharded = [name for name in ("deepspeed", "fsdp") if getattr(args, name, None)]
    if args.world_size > 1 or args.n_gpu > 1 or sharded:
        raise UnsupportedStrategyError(
            "WidthEvolutionCallback changes parameters of one process on one device, got "
            f"{args.world_size} processes with {max(args.n_gpu, 1)} devices each{''.join(f', {name}' for name in sharded)}: "
            "the other copies would keep the old shapes. Show the run one device (CUDA_VISIBLE_DEVICES=0) and start it "
            "without a launcher."
        )


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of accelerate's wrappers."""
    inner = getattr(optimizer, "optimizer", None)
    return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer
