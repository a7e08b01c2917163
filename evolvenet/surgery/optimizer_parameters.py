"""Parameters of optimizers replaced by others: they keep their place and options; their state is fresh, or as stated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Optimizer

from evolvenet._compat.torch import LBFGS_SIZE_CACHE
from evolvenet.surgery.optimizer_state import validate_state

NewStates = Callable[[Optimizer, Mapping[str, Any]], Sequence[dict[str, Any]] | None]
"""(optimizer, state of a parameter) → a state for each parameter in its place; None for fresh ones."""


@singledispatch
def fresh_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter on which the optimizer has made no step.

    Empty for most optimizers, which fill it in their first step. One that fills it when it is built gets its own function
    by `fresh_state.register(TheClass)`.
    """
    return {}


@fresh_state.register
def _(optimizer: Adagrad, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    device = parameter.device if group.get("fused") else None
    total = torch.full_like(parameter, float(group["initial_accumulator_value"]), memory_format=torch.preserve_format)
    return {"step": torch.tensor(0.0, device=device), "sum": total.detach()}


@fresh_state.register
def _(optimizer: SGD, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    # The fused kernel takes momenta of all parameters or of none.
    started = any(state.get("momentum_buffer") is not None for state in optimizer.state.values())
    if not (group.get("fused") and group["momentum"] and started):
        return {}
    return {"momentum_buffer": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()}


def replace_parameters(
    optimizers: Sequence[Optimizer],
    replaced: Mapping[Tensor, Sequence[Tensor]],
    names: Mapping[Tensor, str],
    undo: ExitStack,
    states: Mapping[Tensor, NewStates] | None = None,
) -> None:
    """Put other parameters into the places of some, in every parameter group that holds them.

    The new ones stand where the old one stood, with the group's options (learning rate, weight decay), and their state is
    fresh, its step count 0, unless `states` has another one. Parameters that an optimizer does not hold are not added to it.

    Args:
        optimizers: all that may hold the parameters.
        replaced: {parameter: those in its place}; none removes it.
        names: of the new parameters, for groups that name theirs.
        undo: closing it puts everything back.
        states: {parameter: the states of those in its place, from its own}; fresh for all others.

    Raises:
        OptimizerStateError: if the remaining state does not fit.

    >>> old, new = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([old], lr=0.1)
    >>> with ExitStack() as undo:
    ...     replace_parameters([optimizer], {old: [new]}, {new: "new"}, undo)
    ...     optimizer.param_groups[0]["params"][0] is new
    True
    >>> optimizer.param_groups[0]["params"][0] is old
    True
    """
    for optimizer in optimizers:
        if _holds_any(optimizer, replaced):
            _remember(optimizer, undo)
            for group in optimizer.param_groups:
                _replace_in(optimizer, group, replaced, names, states or {})
            if isinstance(optimizer, LBFGS):
                _restart(optimizer)
            validate_state(optimizer)


def _holds_any(optimizer: Optimizer, replaced: Mapping[Tensor, Sequence[Tensor]]) -> bool:
    return any(parameter in replaced for group in optimizer.param_groups for parameter in group["params"])


def _remember(optimizer: Optimizer, undo: ExitStack) -> None:
    state = dict(optimizer.state)
    lists = [(group[key], list(group[key])) for group in optimizer.param_groups for key in _LISTS if key in group]
    cached = getattr(optimizer, LBFGS_SIZE_CACHE, None)

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for live, before in lists:
            live[:] = before
        if isinstance(optimizer, LBFGS):
            setattr(optimizer, LBFGS_SIZE_CACHE, cached)

    undo.callback(restore)


_LISTS = ("params", "param_names")


def _replace_in(
    optimizer: Optimizer,
    group: dict[str, Any],
    replaced: Mapping[Tensor, Sequence[Tensor]],
    names: Mapping[Tensor, str],
    states: Mapping[Tensor, NewStates],
) -> None:
    old_names = list(group.get("param_names", [None] * len(group["params"])))
    made: list[tuple[Tensor, str | None]] = []
    for parameter, name in zip(group["params"], old_names, strict=True):
        if parameter not in replaced:
            made.append((parameter, name))
            continue
        old, carry = optimizer.state.pop(parameter, {}), states.get(parameter)
        found = carry(optimizer, old) if carry and old else None
        for place, new in enumerate(replaced[parameter]):
            made.append((new, names[new]))
            state = fresh_state(optimizer, group, new) if found is None else found[place]
            if state:
                optimizer.state[new] = state
    # In place: LBFGS keeps the list itself.
    group["params"][:] = [parameter for parameter, _ in made]
    if "param_names" in group:
        group["param_names"][:] = [name for _, name in made]


def _restart(optimizer: LBFGS) -> None:
    """LBFGS stores all parameters as one flat vector under the first of them: its curvature history starts anew."""
    evaluations = [state["func_evals"] for state in optimizer.state.values() if "func_evals" in state]
    optimizer.state.clear()
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"func_evals": max(evaluations, default=0), "n_iter": 0}
    setattr(optimizer, LBFGS_SIZE_CACHE, None)


def as_list(optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """One optimizer, or several, as a list."""
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """{parameter: its first name}."""
    return {parameter: name for name, parameter in model.named_parameters()}
