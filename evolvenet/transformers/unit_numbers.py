"""Buffers that a model gets after it is built, with the numbers that units had at first: of heads, of channels of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from evolvenet.transformers import alibi, positions
from evolvenet.transformers.configuration import shapes_of_built

NUMBERED: Mapping[str, Callable[[nn.Module], int]] = {
    alibi.BUFFER: alibi.number_alibi_heads,
    positions.BUFFER: positions.number_position_channels,
}
"""{name of a buffer: what gives it to a model}."""


def is_number(name: str) -> bool:
    """Whether a tensor's name is that of such a buffer.

    >>> is_number("h.0.self_attention.alibi_heads"), is_number("h.0.self_attention.dense.weight")
    (True, False)
    """
    return name.rpartition(".")[2] in NUMBERED


def number_as(model: nn.Module, names: Iterable[str]) -> None:
    """Give a freshly built model the buffers that another one has.

    Args:
        model: is changed in place.
        names: of the other model's tensors.
    """
    for kind in {name.rpartition(".")[2] for name in names if is_number(name)}:
        NUMBERED[kind](model)


def has_all_units(model: PreTrainedModel) -> bool:
    """Whether a model has such buffers, and they are those that its configuration builds: they say nothing then."""
    own = {name: buffer for name, buffer in model.named_buffers() if is_number(name)}
    if not own or not all(buffer.tolist() == list(range(len(buffer))) for buffer in own.values()):
        return False
    built = shapes_of_built(type(model), model.config, partial(number_as, names=own))
    return {name: shape for name, shape in built.items() if is_number(name)} == {
        name: tuple(buffer.shape) for name, buffer in own.items()
    }
