"""`Module.load_from_checkpoint(path)`: the fresh module takes the checkpoint's widths.

It would end in "size mismatch". Lightning has no hook there, so one of its functions is wrapped as soon as Lightning is
imported (`evolvenet/__init__.py`); for checkpoints without EvolveNet it does what it always did. Nothing here imports
Lightning: it may be on the way of being imported, under either of the names in which it is published.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from evolvenet._compat.torch import state_dict_metadata
from evolvenet._compat.wrapping import load_state, wrap
from evolvenet.surgery.checkpoint import RECORD_KEY, find_record, fit_shapes, refuse_other_widths
from evolvenet.surgery.module_replacement import REPLACEMENT_KEY, find_replacements, fit_replacements


def wrap_loading(saving: ModuleType) -> None:
    """Wrap the function in Lightning's module that loads checkpoints, once in a process."""
    wrap(load_state(saving), _fitting)


def _fitting(load_state: Any) -> Any:
    """`load_from_checkpoint`: the fresh module takes the checkpoint's widths."""

    @functools.wraps(load_state)
    def load(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not (issubclass(cls, nn.Module) and evolved(checkpoint)):
            return load_state(cls, checkpoint, *args, **kwargs)

        def load_state_dict(self: Any, state: Mapping[str, Any], *rest: Any, **options: Any) -> Any:
            fit_replacements(self, find_replacements(checkpoint), state)
            record = find_record(checkpoint)
            refuse_other_widths(self, state, record, "The checkpoint")
            fit_shapes(self, state, record=record)
            return cls.load_state_dict(self, state, *rest, **options)

        # The module is built and loaded in one call: for as long as that takes it is of a subclass.
        fresh = load_state(
            type(cls.__name__, (cls,), {"load_state_dict": load_state_dict}), checkpoint, *args, **kwargs
        )
        fresh.__class__ = cls
        return fresh

    return load


def evolved(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a Lightning checkpoint is of a run in which widths may have changed, or holds factorized layers."""
    metadata = state_dict_metadata(checkpoint.get("state_dict"))
    states = checkpoint.get("callbacks", {}).values()
    return any({RECORD_KEY, REPLACEMENT_KEY} & set(entry) for entry in metadata.values()) or any(
        isinstance(state, Mapping) and {"evolver", "due_since"} <= set(state) for state in states
    )
