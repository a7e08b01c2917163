"""Networks that evolved ones are compared with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import evolvenet
from evolvenet.errors import EvolveNetError


class ControlError(EvolveNetError):
    """A control cannot be built from the given arguments."""


def from_scratch(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """A network with the widths of a checkpoint and newly initialised weights.

    Args:
        model: the network with the widths at the start of the evolving run.
        checkpoint: of any moment of that run, or of one of its points.

    Raises:
        RecordError: if the checkpoint is of another model.
        ControlError: if there is no such file, or a layer with weights has no `reset_parameters()`.
    """
    if not Path(checkpoint).is_file():
        raise ControlError(f"Control: expected a checkpoint of an evolving run, got {checkpoint}, which is no file.")
    evolvenet.load(model, checkpoint)
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        restart = getattr(module, "reset_parameters", None)
        if not callable(restart):
            raise ControlError(
                f"Control: expected reset_parameters() in every layer with weights, {name} ({type(module).__name__}) lacks it."
            )
        restart()
    return model
