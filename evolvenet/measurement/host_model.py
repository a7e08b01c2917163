"""A model's weights on the CPU, where spectra are computed and units are chosen: transferred together, once an event."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import TENSOR_TABLES, child_table, own_tensors, shallow_copy, tensor_tables
from evolvenet.linalg.host_transfers import to_host


def on_host(model: nn.Module) -> nn.Module:
    """The model with its weights on the CPU; the model itself if they are there.

    A copy has the same names, modules of the same types and the same sharing, but no weight of the model: it is for reading.
    Tensors of types of their own (quantised weights) stay on their device.

    >>> model = nn.Linear(2, 1)
    >>> on_host(model) is model
    True
    """
    tensors = {id(tensor): tensor for module in model.modules() for tensor in own_tensors(module).values()}
    away = {key: tensor for key, tensor in tensors.items() if _is_plain(tensor) and tensor.device.type != "cpu"}
    if not away:
        return model
    moved: dict[int, Tensor] = {}
    for (key, tensor), copy in zip(away.items(), to_host(list(away.values())), strict=True):
        moved[key] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return _with_tensors(model, moved, {})


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _with_tensors(module: nn.Module, moved: dict[int, Tensor], known: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module tree with other tensors; a module that it holds twice is copied once."""
    if id(module) in known:
        return known[id(module)]
    made = known[id(module)] = shallow_copy(module)
    vars(made).update({name: dict(vars(module)[name]) for name in TENSOR_TABLES})
    for table in tensor_tables(made):
        table.update({name: moved.get(id(tensor), tensor) for name, tensor in table.items()})
    children = child_table(made)
    for name, child in children.items():
        children[name] = None if child is None else _with_tensors(child, moved, known)
    return made
