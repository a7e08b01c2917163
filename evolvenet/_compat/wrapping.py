"""Functions of Lightning that are replaced by ones that call them, and the one that can be without importing Lightning."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

Place = tuple[Any, str]
"""A module or class of Lightning, and the name of a function in it."""

SAVING = ("lightning.pytorch.core.saving", "pytorch_lightning.core.saving")
"""The module that loads checkpoints, under the names of the two packages in which Lightning is published."""


def load_state(saving: ModuleType) -> Place:
    """`load_state(cls, checkpoint, …)` builds a module for `load_from_checkpoint` and loads its weights.

    Args:
        saving: one of `SAVING`.
    """
    return saving, "_load_state"


def wrap(place: Place, wrapper: Callable[[Any], Any]) -> None:
    """Replace the function there, if there is one, by what `wrapper` makes of it, for the whole process.

    It is done once if the wrapper uses `functools.wraps`.
    """
    owner, name = place
    function = getattr(owner, name, None)
    if function is not None and not hasattr(function, "__wrapped__"):
        setattr(owner, name, wrapper(function))


def hparams_name(module: Any) -> str | None:
    """The argument of a LightningModule's `__init__` that holds all its hyperparameters; None if each has its own."""
    return getattr(module, "_hparams_name", None)
