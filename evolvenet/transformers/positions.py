"""Streams to which computed positions are added (DETR): each unit keeps its own sine or cosine when others go.

The positions of these models are a function of the number of units in the stream: with one less, all would be others. So the
module that computes them gets a buffer with the numbers of the stream's units, and returns the channels of these. The buffer is
resized with the stream, and saved with the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
from transformers.models.table_transformer.modeling_table_transformer import TableTransformerSinePositionEmbedding

from evolvenet.errors import TraceError

BUFFER = "position_channels"
"""Name of the buffer of each module: the channels that the stream's units had at first, `[units]`, as floating-point numbers."""
CHANNELS: dict[type[nn.Module], Callable[[Any], int]] = {
    # The size of one half has had two names.
    DetrSinePositionEmbedding: lambda module: 2 * (vars(module).get("num_position_features") or module.embedding_dim),
    TableTransformerSinePositionEmbedding: lambda module: 2 * module.embedding_dim,
}
"""{type of a module that returns positions of images, `[samples, channels, height, width]`: its number of channels}."""

LARGEST = {torch.bfloat16: 256, torch.float16: 2048}
"""{type: the largest number up to which it holds every whole one}, of the types in which that is less than channels may be."""


def number_position_channels(model: nn.Module) -> int:
    """Let the units of a stream go to which computed positions are added: `trace` finds that they can, then.

    The model computes what it did. Do the same to a freshly built model before `evolvenet.load`;
    `evolvenet.transformers.from_pretrained` does it by itself. A new unit has the positions of one that is there.

    Args:
        model: DETR, Table Transformer, or a model that holds one; it is changed in place, once.

    Returns:
        The number of modules whose channels have numbers now.

    Raises:
        TraceError: if the model has no such module; in a forward pass, if the numbers are in a type that cannot count them.

    >>> module = DetrSinePositionEmbedding(4)
    >>> number_position_channels(module), module.position_channels.tolist()
    (1, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    """
    found = [module for module in model.modules() if _channels_of(module)]
    if not found:
        names = ", ".join(kind.__name__ for kind in CHANNELS)
        raise TraceError(
            f"number_position_channels: expected a model that computes positions of its stream ({names}), got a "
            f"{type(model).__name__} without. Other models need no numbers: trace(model, example_inputs)."
        )
    # The module itself has no tensor to tell a device and a type.
    like = next(iter(model.parameters()), torch.empty(0, device="cpu"))
    for module in found:
        if not hasattr(module, BUFFER):
            numbers = torch.arange(_channels_of(module), dtype=like.dtype, device=like.device)
            module.register_buffer(BUFFER, numbers)
            module.register_forward_hook(take_own_channels)
    return len(found)


def _channels_of(module: nn.Module) -> int:
    """0 for a module of another type."""
    return next((CHANNELS[kind](module) for kind in type(module).__mro__ if kind in CHANNELS), 0)


def take_own_channels(module: Any, args: Any, output: Tensor) -> Tensor:
    """A hook after the forward pass: of the channels of all units those of the present ones."""
    numbers = getattr(module, BUFFER)
    if (last := _channels_of(module) - 1) > (most := LARGEST.get(numbers.dtype, last)):
        raise TraceError(
            f"number_position_channels: expected numbers up to {last} in {BUFFER}, got {numbers.dtype}, exact up to {most} "
            "alone. Keep the model in float32."
        )
    return output[:, numbers.long()]
