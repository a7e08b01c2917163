"""The model run for its outputs alone, without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.execution.inputs import arguments, tensors_of
from evolvenet.execution.shadow_tensors import op_by_op
from evolvenet.execution.state_guard import untouched


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on leaving, training flags, buffers and all that is `untouched` are as before.

    >>> model = nn.Dropout()
    >>> with quiet(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    buffers = [
        (buffer, buffer._version, buffer.clone())
        for buffer in model.buffers()
        # One made under inference mode cannot be written to outside of it, and has no version.
        if not buffer.is_inference()
    ]
    try:
        with untouched(model):
            model.eval()
            with torch.no_grad():
                yield
    finally:
        for buffer, version, value in buffers:
            # Written back only if it changed: a write would spoil a live autograd graph that saved the buffer.
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


def answers(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor that a model answers with, run `quiet` and uncompiled.

    >>> answers(nn.Linear(2, 3), torch.zeros(4, 2))[0].shape
    torch.Size([4, 3])
    """
    args, kwargs = arguments(inputs, model=model)
    with quiet(model), op_by_op():
        return tensors_of(model(*args, **kwargs))
