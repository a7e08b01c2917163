"""Optimizer state through index maps: kept units keep their entries, new units get momenta of 0 and mean second moments.

The rule of each key is in `optimizer_state_rules`; what optimizers keep outside of their state is in `optimizer_tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, AdamW, Optimizer

from evolvenet._compat.torch import LBFGS_SIZE_CACHE
from evolvenet.errors import OptimizerStateError, stage
from evolvenet.linalg.host_transfers import all_true
from evolvenet.surgery.optimizer_entries import CopyChange, carried, fitting, weights_rules
from evolvenet.surgery.optimizer_state_rules import Change, is_weights, mapped, with_new_units
from evolvenet.surgery.optimizer_tensors import held_tensors, tensors_on, with_inner
from evolvenet.surgery.resize_model import carried_gradient, exchange


@dataclass(frozen=True, eq=False)
class StatePlan:
    """New optimizer state, computed but not yet in place.

    Args:
        optimizer: whose state it is; None for tensors that are on parameters.
        states: the new `optimizer.state[parameter]` of each parameter whose state changes.
        attributes: the optimizer's own attributes that change.
        tensors: (new data, new gradient) of tensors outside of the state, which stay the objects that they are.
    """

    optimizer: Optimizer | None
    states: Mapping[Tensor, dict[str, Any]]
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: Mapping[Tensor, tuple[Tensor, Tensor | None]] = field(
        default_factory=dict[Tensor, "tuple[Tensor, Tensor | None]"]
    )


def compile_states(optimizers: Sequence[Optimizer], changes: Sequence[Change]) -> list[StatePlan]:
    """The plans of all optimizers, of those inside of them, and of tensors that are on parameters (Adahessian's `p.hess`).

    Where an inner optimizer steps on copies of parameters (float32 masters) that the outer one holds, its state goes along.

    Args:
        optimizers: those that hold the parameters.
        changes: of each tensor, which still has its old shape.

    Returns:
        Plans for `apply_state`, in this order.

    Raises:
        OptimizerStateError: as `compile_state`.
    """
    every = with_inner(optimizers)
    plans = [compile_state(optimizer, changes) for optimizer in every]
    moved = {tensor: data for plan in plans for tensor, (data, _) in plan.tensors.items()}
    owners = {held.tensor: held for each in every for held in held_tensors(each) if held.tensor in moved}
    stepped = {tensor for optimizer in every for group in optimizer.param_groups for tensor in group["params"]}
    by_tensor = {change.tensor: change for change in changes}
    copies: list[Change] = []
    for tensor in owners.keys() & stepped:
        change = by_tensor[owners[tensor].parameters[0]]
        copies.append(CopyChange(tensor, owners[tensor].place, change.axes, moved[tensor], change.bases))
    if copies:
        plans = [compile_state(optimizer, [*changes, *copies]) for optimizer in every]
    return [*plans, StatePlan(None, {}, tensors=_on_parameters(changes))]


@singledispatch
def compile_state(optimizer: Optimizer, changes: Sequence[Change]) -> StatePlan:
    """The optimizer's state for the parameters after their change. Nothing is modified.

    Kept units keep their entries exactly, those of a split unit are copied. Entries of new units: 0 in momenta, the mean of the
    kept units in second moments, the learning rate in Rprop's step sizes, the new weights in ASGD's averages. Step counts
    stay. Where the units of an axis get another basis first, averages of gradients are mixed as gradients are, and averages of
    their squares by the squared matrix. Keys that `RULES` does not have are carried as second moments if no entry is negative,
    else as momenta. An optimizer that stores its state in another way gets its own function by
    `compile_state.register(TheClass)`.

    The state of a consumer that was refitted after a cut is sliced too, and not mapped as its weights were: for
    W' = W_kept + W_removed·M with x_removed = M·x_kept, the gradient is δ·x_keptᵀ, the slice of the old gradient. The gradient
    of the producers becomes g_kept + Mᵀ·g_removed: gradients grow from layer to layer towards the input, and the sliced second
    moments are too small for them. So after a cut with a refit, and only then, Adam and AdamW keep their estimates and reduce
    their step count to 1/(1 − β₁), the memory of the first moment (10 at β₁ = 0.9): new gradients soon outweigh the old ones.
    The effect on training is measured in experiments/compare/state.md. A growth that has moved present weights
    (`grow(…, update=True)`) does the same, see `weighing_new_gradients`.

    Args:
        optimizer: any `torch.optim.Optimizer`; parameters without state yet, or not its own, are passed over.
        changes: of each tensor, which still has its old shape.

    Returns:
        A plan for `apply_state`, to be applied before the optimizer steps again.

    Raises:
        OptimizerStateError: if a state tensor fits neither its parameter nor a single number.

    >>> from types import SimpleNamespace
    >>> from evolvenet.graph.index_map import IndexMap
    >>> weight = torch.nn.Parameter(torch.ones(2, 1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> grow = {0: IndexMap.of([1, -1, 0], size=2)}
    >>> plan = compile_state(optimizer, [SimpleNamespace(tensor=weight, name="w", axes=grow, value=torch.ones(3, 1), bases={})])
    >>> plan.states[weight]["momentum_buffer"].flatten()
    tensor([1., 0., 1.])
    """
    return _compiled(optimizer, changes)


def _compiled(optimizer: Optimizer, changes: Sequence[Change]) -> StatePlan:
    changed = {change.tensor: change for change in changes}
    name = type(optimizer).__name__
    rules = weights_rules((key, entry, own) for _, own, state in _states(optimizer) for key, entry in state.items())
    states = {
        parameter: {
            key: carried(name, key, entry, changed[parameter], group, rules.get(key)) for key, entry in state.items()
        }
        for group, parameter, state in _states(optimizer)
        if parameter in changed
    }
    return StatePlan(optimizer, states, tensors=_held(optimizer, changed))


def _held(optimizer: Optimizer, changed: Mapping[Tensor, Change]) -> dict[Tensor, tuple[Tensor, Tensor | None]]:
    """New data and gradients of the tensors in an optimizer's attributes and groups."""
    found = held_tensors(optimizer)
    rules = weights_rules(
        (held.key, part, own) for held in found for part, own in zip(held.parts(), held.parameters, strict=True)
    )
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    name, made = type(optimizer).__name__, dict[Tensor, tuple[Tensor, Tensor | None]]()
    for held in found:
        if not any(parameter in changed for parameter in held.parameters):
            continue
        parts = [
            carried(name, held.key, part, changed[own], groups.get(id(own), {}), rules.get(held.key))
            if own in changed
            else part
            for part, own in zip(held.parts(), held.parameters, strict=True)
        ]
        if held.tensor.shape == held.parameters[0].shape:
            change, grad = changed[held.parameters[0]], None
            if held.tensor.is_leaf:
                grad = carried_gradient(CopyChange(held.tensor, held.place, change.axes, parts[0], change.bases))
            made[held.tensor] = parts[0], grad
        else:
            made[held.tensor] = torch.cat([part.reshape(-1) for part in parts]), None
    return made


def _on_parameters(changes: Sequence[Change]) -> dict[Tensor, tuple[Tensor, Tensor | None]]:
    """New data of the tensors that parameters have as attributes."""
    found = [(key, entry, change) for change in changes for key, entry in tensors_on(change.tensor).items()]
    rules = weights_rules((key, entry, change.tensor) for key, entry, change in found)
    return {
        entry: (carried("Parameter", key, entry.detach(), change, {}, rules.get(key)), None)
        for key, entry, change in found
    }


@compile_state.register(Adam)
@compile_state.register(AdamW)
def _(optimizer: Adam, changes: Sequence[Change]) -> StatePlan:
    plan = _compiled(optimizer, changes)
    return weighing_new_gradients(plan) if plan.states and _is_refitted_cut(changes) else plan


def weighing_new_gradients(plan: StatePlan) -> StatePlan:
    """The plan with Adam's and AdamW's step counts reduced, their estimates kept; see `compile_state`. Others as they are.

    For surgeries after which gradients are not what they were: refitted cuts, and growths whose present weights have moved.
    """
    if not isinstance(plan.optimizer, (Adam, AdamW)):
        return plan
    groups = {parameter: group for group in plan.optimizer.param_groups for parameter in group["params"]}
    return replace(
        plan,
        states={parameter: _with_fewer_steps(state, groups[parameter]) for parameter, state in plan.states.items()},
    )


def _is_refitted_cut(changes: Sequence[Change]) -> bool:
    """Whether units are removed and a remaining weight gets another value than its map gives.

    Weights alone: running means and variances get rank 0's values on all ranks, which had others of their own.
    """
    cut = any(index_map.removes_units for change in changes for index_map in change.axes.values())
    changes = [change for change in changes if isinstance(change.tensor, nn.Parameter)]
    return cut and not all_true(
        [
            (with_new_units(mapped(change).clone(), change.axes, change.value.detach()) == change.value).all()
            for change in changes
        ]
    )


def _with_fewer_steps(state: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Adam's state with the same estimates of both moments, as after fewer steps."""
    if not isinstance(state.get("step"), Tensor):
        return state
    first, second = (float(beta) for beta in group["betas"])
    now, memory = float(state["step"]), max(1, round(1 / (1 - first)))
    if now <= memory:
        return state
    # Adam divides its moving averages by 1 − β^step, so the estimates stay.
    shares = {key: (1 - beta**memory) / (1 - beta**now) for key, beta in (("exp_avg", first), ("exp_avg_sq", second))}
    shares["max_exp_avg_sq"] = shares["exp_avg_sq"]
    made = {key: entry * shares[key] if key in shares else entry for key, entry in state.items()}
    return {**made, "step": torch.full_like(state["step"], memory)}


@compile_state.register
def _(optimizer: LBFGS, changes: Sequence[Change]) -> StatePlan:
    """LBFGS stores all parameters as one flat vector: its curvature history starts anew, its count of evaluations stays."""
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if not any(change.tensor in own for change in changes):
        return StatePlan(optimizer, {})
    # Only the first iteration, n_iter 0, uses no history.
    states = {
        parameter: {"func_evals": state.get("func_evals", 0), "n_iter": 0} for _, parameter, state in _states(optimizer)
    }
    return StatePlan(optimizer, states, {LBFGS_SIZE_CACHE: None})


def apply_state(plan: StatePlan) -> StatePlan:
    """Put a plan in place.

    Args:
        plan: from `compile_state`.

    Returns:
        The plan that undoes it: `apply_state` of it gives the optimizer its former state back.
    """
    optimizer = plan.optimizer
    undo = StatePlan(
        optimizer,
        {parameter: optimizer.state[parameter] for parameter in plan.states} if optimizer is not None else {},
        {name: getattr(optimizer, name) for name in plan.attributes},
        {tensor: (tensor.data, tensor.grad if tensor.is_leaf else None) for tensor in plan.tensors},
    )
    try:
        with stage("optimizer state"):
            _assign(plan)
    except BaseException:
        _assign(undo)
        raise
    return undo


def check_optimizers(optimizers: Sequence[Optimizer], parameters: Mapping[str, Tensor]) -> None:
    """Check that what the optimizers hold by now can follow a change of widths.

    Args:
        optimizers: of a model.
        parameters: {name: parameter} of the model.

    Raises:
        OptimizerStateError: for an optimizer, or one inside of it, with a tensor that could not; and for one whose parameters
            are copies of the model's (float32 masters) that no other optimizer holds.
    """
    every, known = with_inner(optimizers), set(parameters.values())
    for optimizer in every:
        if follows_rules(optimizer):
            known |= {held.tensor for held in held_tensors(optimizer)}
            validate_state(optimizer)
    for optimizer in every:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        models = list(parameters.values())
        alike = [tensor.shape for tensor in own] == [tensor.shape for tensor in models]
        if alike and not known & set(own) and is_weights("", zip(own, models, strict=True)):
            raise OptimizerStateError(
                f"{type(optimizer).__name__}: expected the model's parameters, got copies of them, which would keep their "
                "shapes. Give the optimizer model.parameters(), and keep copies in optimizer.state[parameter]."
            )


def follows_rules(optimizer: Optimizer) -> bool:
    """Whether what an optimizer keeps is carried by the rules of its keys; not so for one with a function of its own."""
    return compile_state.dispatch(type(optimizer)) in _GENERIC


_GENERIC = tuple(compile_state.dispatch(each) for each in (Optimizer, Adam, LBFGS))


@singledispatch
def validate_state(optimizer: Optimizer) -> None:
    """Check that every state tensor fits its parameter: fused optimizers do not check it and write past the end.

    Raises:
        OptimizerStateError: naming the first entry that does not fit.

    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> optimizer = torch.optim.Adagrad([weight])
    >>> validate_state(optimizer)
    >>> weight.data = torch.ones(3, 2)
    >>> validate_state(optimizer)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    evolvenet.errors.OptimizerStateError: Adagrad: expected 'sum' to fit parameter 0 of group 0, shape (3, 2), got (2, 2)...
    """
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            for key, entry in optimizer.state.get(parameter, {}).items():
                name = f"parameter {place} of group {index}"
                fitting(type(optimizer).__name__, key, entry, parameter.shape, name)


@validate_state.register
def _(optimizer: LBFGS) -> None:
    total = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    for _, _, state in _states(optimizer):
        flat = [state.get("d"), state.get("prev_flat_grad"), *state.get("old_dirs", ()), *state.get("old_stps", ())]
        lengths = {len(vector) for vector in flat if vector is not None} - {total}
        if lengths:
            raise OptimizerStateError(
                f"LBFGS: expected flat vectors of {total} entries, got {sorted(lengths)}. Carry the state with compile_state."
            )


def _states(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
    """(group, parameter, its state) of each parameter that has state; a look-up in `state` would create it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                yield group, parameter, optimizer.state[parameter]


def _assign(plan: StatePlan) -> None:
    if plan.optimizer is not None:
        plan.optimizer.state.update(plan.states)
    for tensor, (data, grad) in plan.tensors.items():
        exchange(tensor, data, grad)
    for name, value in plan.attributes.items():
        setattr(plan.optimizer, name, value)
