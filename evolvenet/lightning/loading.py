"""The two places where Lightning loads weights into a module that no callback has met.

`Module.load_from_checkpoint(path)` builds a fresh module, and the launchers that spawn or fork processes load the trained
weights into the main process's module, on which `setup` never ran. Both would end in "size mismatch". Lightning has no hook
there, so three of its functions are wrapped; for runs and checkpoints without EvolveNet they do what they always did.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer

from evolvenet._compat.lightning import EXTRA_RESULTS, LOAD_STATE, RECOVER_RESULTS, is_wrapped, wrap
from evolvenet._compat.torch import state_dict_metadata
from evolvenet.surgery.checkpoint import RECORD_KEY, find_record, fit_shapes, register_reshape_before_load

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
    if is_wrapped(LOAD_STATE):
        return
    wrap(LOAD_STATE, _fitting)
    wrap(EXTRA_RESULTS, _with_states)
    wrap(RECOVER_RESULTS, _reshaping)


def _fitting(load_state: Any) -> Any:
    """`load_from_checkpoint`: the fresh module takes the checkpoint's widths."""

    @functools.wraps(load_state)
    def load(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not (issubclass(cls, LightningModule) and evolved(checkpoint)):
            return load_state(cls, checkpoint, *args, **kwargs)

        def load_state_dict(self: Any, state: Mapping[str, Any], *rest: Any, **options: Any) -> Any:
            fit_shapes(self, state, record=find_record(checkpoint))
            return cls.load_state_dict(self, state, *rest, **options)

        # The module is built and loaded in one call: for as long as that takes it is of a subclass.
        fresh = load_state(
            type(cls.__name__, (cls,), {"load_state_dict": load_state_dict}), checkpoint, *args, **kwargs
        )
        fresh.__class__ = cls
        return fresh

    return load


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


def evolved(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a Lightning checkpoint is of a run in which widths may have changed."""
    metadata = state_dict_metadata(checkpoint.get("state_dict"))
    states = checkpoint.get("callbacks", {}).values()
    return any(RECORD_KEY in entry for entry in metadata.values()) or any(
        isinstance(state, Mapping) and {"evolver", "due_since"} <= set(state) for state in states
    )
