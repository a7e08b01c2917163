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
from evolvenet.surgery.optimizer_entries import weights_rules
from evolvenet.surgery.optimizer_places import copy_attributes, first_entries, replace_held
from evolvenet.surgery.optimizer_state import validate_state
from evolvenet.surgery.optimizer_state_rules import Rule
from evolvenet.surgery.optimizer_tensors import with_inner

NewStates = Callable[[Optimizer, Mapping[str, Any]], Sequence[dict[str, Any]] | None]
"""(optimizer, state of a parameter) → a state for each parameter in its place; None for fresh ones."""


@singledispatch
def fresh_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter on which the optimizer has made no step.

    Empty for torch's optimizers, which fill it in their first step, but for those below. One of another type gets the keys
    that the state of the replaced parameter has, with the values of `optimizer_places.first_entries`, unless a function is
    registered for it by `fresh_state.register(TheClass)`.
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
    The optimizers inside of these take part, and what they keep in lists and dicts of their own or on parameters; where an
    inner one steps on copies of the weights, new copies take their places.

    Args:
        optimizers: all that may hold the parameters.
        replaced: {parameter: those in its place}; none removes it.
        names: of the new parameters, for groups that name theirs.
        undo: closing it puts everything back.
        states: {parameter: the states of those in its place, from its own}; fresh for all others.

    Raises:
        OptimizerStateError: if the remaining state does not fit, or an entry cannot be replaced.

    >>> old, new = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([old], lr=0.1)
    >>> with ExitStack() as undo:
    ...     replace_parameters([optimizer], {old: [new]}, {new: "new"}, undo)
    ...     optimizer.param_groups[0]["params"][0] is new
    True
    >>> optimizer.param_groups[0]["params"][0] is old
    True
    """
    every, now = with_inner(optimizers), dict(replaced)
    held = {optimizer: [list(group["params"]) for group in optimizer.param_groups] for optimizer in every}
    if not any(parameter in now for lists in held.values() for group in lists for parameter in group):
        return
    copy_attributes(replaced)
    for optimizer in every:
        # Before its groups: an inner optimizer may have the very same ones.
        _remember(optimizer, undo)
        now |= replace_held(optimizer, now, names, undo)
    for optimizer in every:
        rules = weights_rules(
            (key, entry, own)
            for group in held[optimizer]
            for own in group
            for key, entry in optimizer.state.get(own, {}).items()
        )
        for group, own in zip(optimizer.param_groups, held[optimizer], strict=True):
            _replace_states(optimizer, group, own, now, states or {}, rules)
    lists: dict[int, dict[str, Any]] = {id(group["params"]): group for each in every for group in each.param_groups}
    for group in lists.values():
        _replace_in(group, now, names)
    for optimizer in every:
        if isinstance(optimizer, LBFGS):
            _restart(optimizer)
        validate_state(optimizer)


def check_replaceable(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Check that factors can take the places of weights in what the optimizers hold by now; nothing is changed.

    Each weight of two axes and more is replaced by two small ones, which is taken back.

    Args:
        optimizers: of the model.
        model: the model.

    Raises:
        OptimizerStateError: for an optimizer, or one inside of it, in which they cannot.
    """
    replaced: dict[Tensor, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel():
            shapes = (1, *parameter.shape[1:]), (len(parameter), *[1] * (parameter.dim() - 1))
            replaced[parameter] = [nn.Parameter(parameter.detach().new_zeros(shape)) for shape in shapes]
    names = {part: name for name, old in model.named_parameters() for part in replaced.get(old, ())}
    with ExitStack() as undo:
        replace_parameters(optimizers, replaced, names, undo)


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


def _replace_states(
    optimizer: Optimizer,
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    replaced: Mapping[Tensor, Sequence[Tensor]],
    states: Mapping[Tensor, NewStates],
    rules: Mapping[str, Rule],
) -> None:
    """Replace the states of a group's parameters, which are those of before; `rules` as for `first_entries`."""
    for parameter in parameters:
        if parameter not in replaced:
            continue
        old, carry = optimizer.state.pop(parameter, {}), states.get(parameter)
        found = carry(optimizer, old) if carry and old else None
        for place, new in enumerate(replaced[parameter]):
            state = _first_state(optimizer, group, parameter, new, old, rules) if found is None else found[place]
            if state:
                optimizer.state[new] = state


def _first_state(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    old: Tensor,
    new: Tensor,
    state: Mapping[str, Any],
    rules: Mapping[str, Rule],
) -> dict[str, Any]:
    """The state of a new parameter: as registered for the optimizer, or with the keys of the old one's."""
    known = type(optimizer).__module__.startswith("torch.optim")
    known = known or fresh_state.dispatch(type(optimizer)).__module__ != __name__
    made = fresh_state(optimizer, group, new)
    return made if known else {**first_entries(optimizer, group, old, new, state, rules), **made}


def _replace_in(
    group: dict[str, Any], replaced: Mapping[Tensor, Sequence[Tensor]], names: Mapping[Tensor, str]
) -> None:
    old_names = list(group.get("param_names", [None] * len(group["params"])))
    made: list[tuple[Tensor, str | None]] = []
    for parameter, name in zip(group["params"], old_names, strict=True):
        new = replaced.get(parameter)
        made += [(parameter, name)] if new is None else [(each, names.get(each, name)) for each in new]
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


def as_list(optimizers: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """One optimizer, several or none, as a list."""
    if optimizers is None:
        return []
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """{parameter: its first name}."""
    return {parameter: name for name, parameter in model.named_parameters()}
