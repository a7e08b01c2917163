"""What evolved networks are compared with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import evolvenet
from evolvenet.errors import EvolveNetError


class ControlError(EvolveNetError):
    """A control cannot be built from what was given."""


def from_scratch(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """The network of a checkpoint with its widths, and weights as if it had just been built with them.

    Args:
        model: the network as the evolving run began.
        checkpoint: of any moment of that run, or of one of its points.

    Raises:
        RecordError: if the checkpoint is of another model.
        ControlError: if the file is not there, or a layer with weights cannot start anew.
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
