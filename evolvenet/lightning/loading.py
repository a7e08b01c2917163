"""The widths in the state dict that a trainer saves, and what comes back from the processes in which a run trains.

A trainer's checkpoints after a run, of weights alone too, have the record of its widths, though no hook of it is left. The
launchers that spawn or fork processes load the trained weights into the main process's module, on which `setup` never
ran. That would end in "size mismatch". A checkpoint with an average of the weights has its chains recorded beside the
average alone. Lightning has no hook for any of these, so four of its functions are wrapped; for runs
without EvolveNet they do what they always did.
"""

from __future__ import annotations

import functools
import io
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from evolvenet._compat.lightning import EXTRA_RESULTS, RECOVER_RESULTS
from evolvenet._compat.torch import load_state_dict_pre_hooks, state_dict_metadata
from evolvenet._compat.wrapping import wrap
from evolvenet.lightning.module import weight_averages
from evolvenet.surgery.checkpoint import register_reshape_before_load, reshape_before_load
from evolvenet.surgery.module_replacement import find_replacements, fit_replacements
from evolvenet.surgery.width_record import RECORD_KEY, record_of

EXTRA = "evolvenet"


@runtime_checkable
class ReturnsState(Protocol):
    """A callback whose state comes back from the process that trained."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""
        ...

    def load_worker_state(self, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned in the other process."""
        ...


def install() -> None:
    """Wrap Lightning's functions, once in a process."""
    wrap((Strategy, "lightning_module_state_dict"), _with_record)
    wrap((Strategy, "load_model_state_dict"), _with_chains)
    wrap(EXTRA_RESULTS, _with_states)
    wrap(RECOVER_RESULTS, _reshaping)


def _with_record(get_state_dict: Any) -> Any:
    """What a checkpoint holds: the module's state dict with the record of its widths, where they are known."""

    @functools.wraps(get_state_dict)
    def get(self: Any) -> dict[str, Any]:
        state = get_state_dict(self)
        metadata = state_dict_metadata(state).get("")
        record = None if metadata is None or RECORD_KEY in metadata else record_of(self.lightning_module)
        if metadata is not None and record is not None:
            metadata[RECORD_KEY] = record.state_dict(self.lightning_module)
        return state

    return get


def _with_chains(load: Any) -> Any:
    """The module and averages of its weights have the chains of a checkpoint before any state dict of it is loaded."""

    @functools.wraps(load)
    def load_state(self: Any, checkpoint: Any, *args: Any, **rest: Any) -> Any:
        module, records = self.lightning_module, find_replacements(checkpoint)
        if records and reshape_before_load in load_state_dict_pre_hooks(module):
            for each in (module, *weight_averages(module.trainer, module)):
                fit_replacements(each, records, checkpoint["state_dict"])
        return load(self, checkpoint, *args, **rest)

    return load_state


def _with_states(get_extra_results: Any) -> Any:
    """In the process that trained: what the callbacks know goes back with the metrics."""

    @functools.wraps(get_extra_results)
    def get(self: Any, trainer: Trainer) -> dict[str, Any]:
        if not _returning(trainer):
            return get_extra_results(self, trainer)
        buffer = io.BytesIO()
        torch.save([callback.state_dict() for callback in _returning(trainer)], buffer)
        return {**get_extra_results(self, trainer), EXTRA: buffer.getvalue()}

    return get


def _reshaping(recover: Any) -> Any:
    """In the main process: its module takes the trained widths with the weights."""

    @functools.wraps(recover)
    def take(self: Any, worker_output: Any, trainer: Trainer) -> None:
        if not _returning(trainer):
            # The other process may never have imported this module.
            return recover(self, worker_output, trainer)
        register_reshape_before_load(trainer.lightning_module)
        recover(self, worker_output, trainer)
        states = torch.load(io.BytesIO(worker_output.extra[EXTRA]), weights_only=True)
        for callback, state in zip(_returning(trainer), states, strict=True):
            callback.load_worker_state(trainer.lightning_module, state)

    return take


def _returning(trainer: Trainer) -> list[ReturnsState]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ReturnsState)]  # type: ignore[attr-defined]
