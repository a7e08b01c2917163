"""What a model is called with, a tensor, a tuple of arguments or a dict of keyword arguments, and what it answers with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def arguments(inputs: Any, device: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments, moved to a device if one is named.

    >>> arguments({"x": 1})
    ((), {'x': 1})
    """
    if device is not None:
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def first_samples(inputs: Any, count: int) -> Any:
    """The first samples of a batch: every tensor with the batch's length on its first axis is cut to `count`."""
    sizes: list[int] = []
    tree_map_only(Tensor, lambda tensor: sizes.append(tensor.shape[0]) if tensor.dim() else None, inputs)
    if not sizes:
        return inputs
    return tree_map_only(Tensor, lambda t: t[:count].detach() if t.dim() and t.shape[0] == sizes[0] else t, inputs)


def tensors_of(result: Any) -> list[Tensor]:
    """Every tensor of what a model answered: nested lists, tuples and dicts, or the fields of a dataclass.

    >>> [tensor.item() for tensor in tensors_of({"loss": Tensor([1.0]), "name": "a"})]
    [1.0]
    """
    if hasattr(result, "__dataclass_fields__"):
        result = {name: getattr(result, name) for name in result.__dataclass_fields__}
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
