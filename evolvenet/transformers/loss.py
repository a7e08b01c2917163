"""What a `transformers.Trainer` computes its loss by, as a function of the model and a batch that leaves nothing behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import Trainer

from evolvenet.errors import CollectiveError, OutputNameError, TraceError, is_out_of_memory, memory_for_tracing
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.routes import runs_until_every_route
from evolvenet.execution.state_guard import SavedState
from evolvenet.execution.step import InTurn, Step
from evolvenet.execution.step_recorder import StepRecorder
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.tracing.reconciled import reconciled
from evolvenet.tracing.trace import trace
from evolvenet.tracing.unreached import freeze_possible_inputs, unreached_parameters
from evolvenet.tracing.untrained import freeze_untrained, untrained_parameters

log = logging.getLogger("evolvenet")
SAMPLES = 2
"""Samples of a batch that a trace runs on."""


class LossStep:
    """A trainer's `compute_loss`, for an `execution.step.Step`: distillation, contrastive losses, losses of hidden states.

    Logs and backward passes do nothing in it, and the trainer's attributes are as before after each run, as are the buffers
    of other modules that it holds.

    Args:
        trainer: whose method it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._compute: Callable[..., Any] = trainer.compute_loss

    @property
    def is_own(self) -> bool:
        """Whether the loss may depend on more than the model's first output: a method of a subclass, or a function."""
        method = getattr(self._compute, "__func__", None)
        return method is not Trainer.compute_loss or self._trainer.compute_loss_func is not None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """What `compute_loss` returns.

        Args:
            model: the trainer's.
            batch: {"inputs": of the model, "options": what training passes on by keyword}.
        """
        inside = {id(module) for module in model.modules()}
        # Not the data sets, which may be lists of a million entries.
        kept = {name: value for name, value in vars(self._trainer).items() if not name.endswith("dataset")}
        held = [each for each in kept.values() if isinstance(each, nn.Module) and id(each) not in inside]
        states = [SavedState(module, with_buffers=True) for module in held]
        states.append(SavedState(nn.Module(), with_buffers=False, others=[list(kept.values())]))
        try:
            # On leaving, the attributes that the method has set are as before, too.
            with patch.dict(vars(self._trainer), {"log": _nothing}), patch.object(torch.Tensor, "backward", _nothing):
                return self._compute(model, dict(batch["inputs"]), **batch["options"])
        finally:
            for state in states:
                state.restore()

    @contextmanager
    def recorded_by(self, recorder: StepRecorder) -> Iterator[None]:
        """In the body, each call of the trainer's `compute_loss` is recorded."""

        def compute(model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
            # Trainer's own method takes the labels out of the dict.
            recorder.begin({"inputs": dict(inputs), "options": dict(options)})
            try:
                return self._compute(model, inputs, *rest, **options)
            finally:
                recorder.end()

        # Not by patch.dict, which would also put back what the trainer sets meanwhile.
        before = vars(self._trainer).get("compute_loss")
        vars(self._trainer)["compute_loss"] = compute
        try:
            yield
        finally:
            vars(self._trainer).pop("compute_loss")
            if before is not None:
                vars(self._trainer)["compute_loss"] = before


def trace_with_loss(
    model: nn.Module, inputs: Any, step: Step, outputs: Outputs | None = None
) -> tuple[Any, WidthGraph]:
    """What is traced and measured of a model: itself if its own graph says all about it, else the loss.

    Args:
        model: the trainer's.
        inputs: that it is called with; None if the loss does not call it.
        step: a `LossStep` and a batch.
        outputs: those of the model that count, as for `trace`.

    Returns:
        Inputs for `run_model`, and the graph of the model so run.

    Raises:
        TraceError: if neither can be traced.
    """
    alone = whole = problem = None
    try:
        alone = None if inputs is None else _trained(model, trace(model, first_samples(inputs, SAMPLES), outputs))
    except OutputNameError:
        raise
    except TraceError as error:
        problem = error
    few = first_samples(step, SAMPLES)
    try:
        whole = _trained(model, trace(model, InTurn((few,) * runs_until_every_route(model, few))))
    except Exception as error:
        if is_out_of_memory(error):
            with memory_for_tracing():
                raise
        level = logging.WARNING if isinstance(error, CollectiveError) and alone is not None else logging.DEBUG
        log.log(
            level,
            "compute_loss does not run beside training, so the model is traced alone: %s",
            error,
            exc_info=level < logging.INFO,
        )
        problem = problem or TraceError(f"compute_loss does not run beside training: {type(error).__name__}: {error}.")
    if whole is None or len(unreached_parameters(whole)) == len(whole.trainable):
        if alone is None:
            raise problem or TraceError(f"compute_loss runs no part of {type(model).__name__}.")
        return inputs, alone
    same = None if alone is None or unreached_parameters(alone) else reconciled(alone, whole)
    return (step, whole) if same is None else (inputs, same)


def _trained(model: nn.Module, graph: WidthGraph) -> WidthGraph:
    return freeze_possible_inputs(freeze_untrained(graph, untrained_parameters(model)))


def loss_and_logits(returned: Any) -> Any:
    """What a trainer's own loss and its predictions use of what a model returns: all of it where that is not named.

    >>> loss_and_logits({"loss": 1, "logits": 2, "encoder_last_hidden_state": 3})
    [1, 2]
    """
    names = [name for name in ("loss", "logits") if isinstance(returned, Mapping) and name in returned]
    return [returned[name] for name in names] if "loss" in names else returned


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a method that would have an effect."""
