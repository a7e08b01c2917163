"""Sharded models (FSDP2) between two optimizer steps: parameters and optimizer state whole on every rank for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import tree_map_only
from evolvenet.errors import UnsupportedStrategyError
from evolvenet.graph.whole import REMEDY, check_whole
from evolvenet.surgery.optimizer_tensors import with_inner


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) was called on the model or a module inside of it.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    # Where it is not imported, it was not called; importing it takes a while.
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from evolvenet._compat import fsdp

    return fsdp.is_sharded(model)


def check_sharding(model: nn.Module) -> None:
    """Check that a model's parameters are whole on every rank, or can be made so and sharded again as they were.

    Raises:
        UnsupportedStrategyError: for tensor parallelism, FSDP1, DeepSpeed, and settings of `fully_shard` that could not be
            repeated.
    """
    if not is_sharded(model):
        check_whole(model)
        return
    from evolvenet._compat import fsdp

    problem = fsdp.sharding_problem(model)
    if problem is not None:
        raise UnsupportedStrategyError(
            f"Widths of a model that fully_shard has sharded over all processes can change, got {problem}. {REMEDY}"
        )


@contextmanager
def whole_parameters(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Within the body, a sharded model is an ordinary one: parameters, gradients and optimizer state lie whole on every rank.

    Afterwards `fully_shard` has been called again with the same meshes, policies and groups. All ranks enter it at once,
    between two optimizer steps; each needs memory for the whole model and its optimizer state meanwhile. The parameters are
    other objects within the body and after it, in the model and in the optimizers alike. A model that is not sharded is left
    as it is.

    Args:
        model: the outermost module that is sharded, or one around it.
        optimizers: those that hold its parameters.

    Raises:
        UnsupportedStrategyError: see `check_sharding`.
    """
    if not is_sharded(model):
        check_whole(model)
        yield
        return
    from evolvenet._compat import fsdp

    check_sharding(model)
    fsdp.reshard(model)
    sharded = dict(model.named_parameters())
    gathered = {name: _gathered(parameter) for name, parameter in sharded.items()}
    calls = fsdp.unwrap(model)
    _replace(model, optimizers, sharded, gathered, lambda tensor, _: _full(tensor))
    try:
        yield
    finally:
        present = dict(model.named_parameters())
        fsdp.wrap_again(model, calls)
        again = dict(model.named_parameters())
        for name, parameter in present.items():
            if parameter.grad is not None and again[name] is not parameter:
                again[name].grad = _part(parameter.grad, again[name])
        _replace(None, optimizers, present, again, _part)


def _replace(
    model: nn.Module | None,
    optimizers: Sequence[Optimizer],
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    converted: Any,
) -> None:
    """Put parameters into the places of others, in a model and in optimizers, whose state is converted for them."""
    names = {id(parameter): name for name, parameter in before.items()}
    for module in model.modules() if model is not None else ():
        for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            module.register_parameter(key, after[names[id(parameter)]])
    lists: dict[int, list[Any]] = {}
    states: dict[int, Any] = {}
    for optimizer in with_inner(optimizers):
        lists |= {id(group["params"]): group["params"] for group in optimizer.param_groups}
        states[id(optimizer.state)] = optimizer.state
    for parameters in lists.values():
        parameters[:] = [after[names[id(each)]] if id(each) in names else each for each in parameters]
    for state in states.values():
        entries = list(state.items())
        state.clear()
        for key, value in entries:
            name = names.get(id(key))
            new = key if name is None else after[name]
            state[new] = value if name is None else _converted(value, key, new, converted)


def _converted(value: Any, old: Tensor, new: Tensor, converted: Any) -> Any:
    """An optimizer's entry for a parameter: tensors of its shape are converted with it."""
    return tree_map_only(
        Tensor, lambda each: converted(each, new) if each.dim() and each.shape == old.shape else each, value
    )


def _gathered(parameter: nn.Parameter) -> nn.Parameter:
    """The whole parameter, with its whole gradient; one that is not sharded stays the same object."""
    with torch.no_grad():
        value = _full(parameter)
    if value is parameter:
        return parameter
    found = nn.Parameter(value, parameter.requires_grad)
    found.grad = None if parameter.grad is None else _full(parameter.grad)
    return found


def _full(tensor: Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, laid out as a parameter. Nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None)
