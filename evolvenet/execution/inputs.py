"""Inputs and outputs of models in any nesting: as arguments of a call, cut to a few samples, moved, and as flat lists.

The inputs of a model are one tensor, a tuple of arguments or a dict of keyword arguments.
"""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from evolvenet._compat.torch import tree_leaves, tree_map_only
from evolvenet.errors import TraceError

_HALF = (torch.bfloat16, torch.float16)
_REAL = (*_HALF, torch.float32, torch.float64)
_INDICES = (torch.int32, torch.int64)


def arguments(
    inputs: Any, device: str | None = None, model: nn.Module | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments.

    Args:
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        device: where tensors are moved, if given.
        model: that is called with them. Without a `device` they are moved to the model's, see `beside`. If all of its
            parameters have one dtype wider than 16 bits, half-precision inputs are cast to it: under autocast a float32
            layer accepts bfloat16, without it (as a model is run here) it does not.

    >>> arguments({"x": 1})
    ((), {'x': 1})
    >>> arguments(torch.zeros(1, 2).half(), model=nn.Linear(2, 2))
    ((tensor([[0., 0.]]),), {})
    """
    if model is not None:
        inputs = cast_to_parameters(inputs, model, _HALF)
    if device is not None:
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    elif model is not None:
        inputs = beside(model, inputs)
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def beside(model: nn.Module, inputs: Any) -> Any:
    """The inputs on the device of a model: example inputs and batches are often on the CPU, averages of weights too.

    They stay where they are if the model is on several devices, or if one of them is on the model's, a GPU, already: a tensor
    on the CPU beside it may be meant to be there, as the lengths of packed sequences.

    >>> beside(nn.Linear(1, 1, device="meta"), (torch.zeros(1), torch.zeros(1)))[1].device
    device(type='meta')
    """
    devices = {leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    first = next(model.parameters(), None)
    if first is None or not devices or devices == {first.device}:
        return inputs
    on_host = first.device.type == "cpu"
    if (first.device in devices and not on_host) or {each.device for each in model.parameters()} != {first.device}:
        return inputs
    return tree_map_only(Tensor, lambda tensor: tensor.to(first.device), inputs)


def copied(inputs: Any) -> Any:
    """Inputs whose tensors are copies: the program that made them may write the next batch into the same memory.

    Tensors in lists, tuples, dicts, `UserDict` (a `BatchEncoding` of the transformers library), dataclasses and classes that
    are registered with `torch.utils._pytree` are copied, and so are these containers. Every other object is the same one.

    >>> buffer = torch.zeros(2)
    >>> kept = copied({"x": (buffer,)})
    >>> _ = buffer.fill_(1)
    >>> kept
    {'x': (tensor([0., 0.]),)}
    """
    return tree_map_only(object, _copied_leaf, inputs)


@singledispatch
def _copied_leaf(leaf: Any) -> Any:
    if not is_dataclass(leaf) or isinstance(leaf, type):
        return leaf
    kept = copy.copy(leaf)
    for each in fields(leaf):
        if hasattr(leaf, each.name):
            # Past `frozen`, and without the checks of its constructor, which the values have passed.
            object.__setattr__(kept, each.name, copied(getattr(leaf, each.name)))
    return kept


@_copied_leaf.register
def _(leaf: Tensor) -> Tensor:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


@_copied_leaf.register
def _(leaf: PackedSequence) -> PackedSequence:
    return PackedSequence(*map(copied, leaf))


@_copied_leaf.register
def _(leaf: UserDict) -> Any:  # type: ignore[type-arg]
    kept = copy.copy(leaf)
    kept.data = copied(dict(leaf.data))
    return kept


def cast_to_parameters(inputs: Any, model: nn.Module, kinds: Sequence[torch.dtype] = _REAL) -> Any:
    """The inputs, with those of some dtypes cast to that of the model's parameters if that is one of more than 16 bits."""
    if not any(isinstance(leaf, Tensor) and leaf.dtype in kinds for leaf in tree_leaves(inputs)):
        return inputs
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) != 1 or dtypes <= set(_HALF):
        return inputs
    dtype = dtypes.pop()
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.dtype in kinds else tensor, inputs)


def inputs_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call as inputs: one tensor, a tuple, or a dict if any was given by keyword.

    >>> inputs_of_call(nn.Bilinear(1, 1, 1), (1,), {"input2": 2})
    {'input1': 1, 'input2': 2}
    """
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args
    if not args:
        return kwargs
    given = inspect.signature(module.forward).bind(*args, **kwargs)
    extra = [name for name, each in given.signature.parameters.items() if each.kind is each.VAR_KEYWORD]
    named = {name: value for name, value in given.arguments.items() if name not in extra}
    return {**named, **(given.arguments[extra[0]] if extra and extra[0] in given.arguments else {})}


def first_samples(inputs: Any, count: int) -> Any:
    """The first samples of a batch: every tensor with the batch size on its first axis is cut to `count` samples.

    A graph's nodes are no samples: nothing is cut where a tensor of another length holds places among those that would be
    (edges), or where a matrix has that length on both axes (an adjacency matrix).

    Raises:
        TraceError: for packed sequences, whose samples are interleaved.

    >>> first_samples((torch.zeros(8, 3), torch.zeros(8)), 2)[0].shape
    torch.Size([2, 3])
    >>> first_samples((torch.zeros(8, 3), torch.tensor([[0, 1, 2], [7, 0, 1]])), 2)[0].shape
    torch.Size([8, 3])
    """
    if any(_is_packed(leaf) for leaf in tree_leaves(inputs, is_leaf=_is_packed)):
        raise TraceError(
            "Expected a model that is called with tensors, got a PackedSequence, of which no sample can be taken. Let the "
            "network take padded sequences and their lengths, and pack them inside."
        )
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or (len(tensors) > 1 and any(_names_places(tensor, len(tensors[0]), count) for tensor in tensors)):
        return inputs
    size = len(tensors[0])
    return tree_map_only(Tensor, lambda t: t[:count].detach() if t.dim() and t.shape[0] == size else t, inputs)


def _names_places(tensor: Tensor, size: int, count: int) -> bool:
    """Whether a tensor says which of `size` nodes are connected, more of them than the first `count`."""
    if tensor.dtype in _INDICES and tensor.dim() > 1 and len(tensor) != size and tensor.numel() and not tensor.is_meta:
        return count <= int(tensor.max()) < size
    return tensor.dtype not in _INDICES and tuple(tensor.shape) == (size, size) and size > count


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence)


def tensors_of(result: Any) -> list[Tensor]:
    """Every tensor in a model's output: of nested lists, tuples and dicts, or of the fields of a dataclass.

    >>> [tensor.item() for tensor in tensors_of({"loss": Tensor([1.0]), "name": "a"})]
    [1.0]
    """
    if hasattr(result, "__dataclass_fields__"):
        result = {name: getattr(result, name) for name in result.__dataclass_fields__}
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def to_device_of(batch: Any, example: Any) -> Any:
    """A batch moved to the device of the first tensor of `example`."""
    devices = [leaf.device for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    return tree_map_only(Tensor, lambda tensor: tensor.to(devices[0]), batch) if devices else batch


def is_plain(batch: Any) -> bool:
    """Whether a `weights_only` checkpoint may contain a batch: tensors, numbers and strings in lists, tuples and dicts.

    >>> is_plain({"x": Tensor([1.0]), "n": 2}), is_plain(object())
    (True, False)
    """
    return all(isinstance(leaf, (Tensor, int, float, bool, str, type(None))) for leaf in tree_leaves(batch))
