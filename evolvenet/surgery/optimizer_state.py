"""Optimizer state through index maps: kept units keep their entries, new units get momenta of 0 and mean second moments.

The rule of each key is in `optimizer_state_rules`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, AdamW, Optimizer

from evolvenet._compat.torch import LBFGS_SIZE_CACHE
from evolvenet.errors import OptimizerStateError, stage
from evolvenet.surgery.optimizer_state_rules import (
    RULES,
    SCALAR,
    SCALARS,
    UNKNOWN,
    Change,
    Rule,
    mapped,
    with_new_units,
)


@dataclass(frozen=True, eq=False)
class StatePlan:
    """New optimizer state, computed but not yet in place.

    Args:
        optimizer: whose state it is.
        states: the new `optimizer.state[parameter]` of each parameter whose state changes.
        attributes: the optimizer's own attributes that change.
    """

    optimizer: Optimizer
    states: Mapping[Tensor, dict[str, Any]]
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])


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
    The effect on training is measured in experiments/compare/state.md.

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
    states = {
        parameter: {key: _carried(optimizer, key, entry, changed[parameter], group) for key, entry in state.items()}
        for group, parameter, state in _states(optimizer)
        if parameter in changed
    }
    return StatePlan(optimizer, states)


@compile_state.register(Adam)
@compile_state.register(AdamW)
def _(optimizer: Adam, changes: Sequence[Change]) -> StatePlan:
    plan = _compiled(optimizer, changes)
    if not plan.states or not _is_refitted_cut(changes):
        return plan
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    return replace(
        plan,
        states={parameter: _with_fewer_steps(state, groups[parameter]) for parameter, state in plan.states.items()},
    )


def _is_refitted_cut(changes: Sequence[Change]) -> bool:
    """Whether units are removed and a remaining weight gets another value than its map gives."""
    cut = any(index_map.removed for change in changes for index_map in change.axes.values())
    return cut and not all(
        torch.equal(with_new_units(mapped(change).clone(), change.axes, change.value.detach()), change.value)
        for change in changes
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
        {parameter: optimizer.state[parameter] for parameter in plan.states},
        {name: getattr(optimizer, name) for name in plan.attributes},
    )
    try:
        with stage("optimizer state"):
            _assign(plan)
    except BaseException:
        _assign(undo)
        raise
    return undo


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
                _fitting(optimizer, key, entry, parameter.shape, f"parameter {place} of group {index}")


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
    for parameter, state in plan.states.items():
        plan.optimizer.state[parameter] = state
    for name, value in plan.attributes.items():
        setattr(plan.optimizer, name, value)


def _rule(key: str, entry: Tensor, shape: Sequence[int]) -> Rule:
    """The rule of an entry; for a single number beside a parameter of another shape, that of a scalar."""
    lone = entry.dim() == 0 or (entry.numel() == 1 and key not in RULES and tuple(entry.shape) != tuple(shape))
    if key in SCALARS or lone:
        return SCALAR
    return RULES.get(key, UNKNOWN)


def _fitting(optimizer: Optimizer, key: str, entry: Any, shape: Sequence[int], name: str) -> tuple[int, ...]:
    """The axes that a state entry shares with its parameter; none for numbers.

    Raises:
        OptimizerStateError: if it holds tensors that do not fit.
    """
    if not isinstance(entry, Tensor):
        if _holds_tensors(entry):
            raise OptimizerStateError(
                f"{type(optimizer).__name__}: expected {key!r} of {name} to be a tensor or a number, got a "
                f"{type(entry).__name__} of tensors. Register a function for it with "
                "evolvenet.surgery.optimizer_state.compile_state.register."
            )
        return ()
    rule = _rule(key, entry, shape)
    axes = () if rule is SCALAR else rule.axes(entry, shape)
    if axes is None:
        raise OptimizerStateError(
            f"{type(optimizer).__name__}: expected {key!r} to fit {name}, shape {tuple(shape)}, got {tuple(entry.shape)}. "
            "If the optimizer has it in this shape by design, register a function for it with "
            "evolvenet.surgery.optimizer_state.compile_state.register."
        )
    return axes


def _holds_tensors(entry: Any) -> bool:
    if isinstance(entry, Mapping):
        entry = list(cast("Mapping[Any, Any]", entry).values())
    if not isinstance(entry, (list, tuple)):
        return False
    return any(isinstance(part, Tensor) or _holds_tensors(part) for part in cast("Sequence[Any]", entry))


@torch.no_grad()
@stage("optimizer state")
def _carried(optimizer: Optimizer, key: str, entry: Any, change: Change, group: Mapping[str, Any]) -> Any:
    """One entry of a parameter's state after the change; the very same object where nothing changes."""
    shared = _fitting(optimizer, key, entry, change.tensor.shape, change.name)
    axes = {dim: index_map for dim, index_map in change.axes.items() if dim % change.tensor.dim() in shared}
    bases = {dim: basis for dim, basis in change.bases.items() if dim % change.tensor.dim() in shared}
    if not axes and not bases:
        return entry
    rule = _rule(key, entry, change.tensor.shape)
    for dim, basis in bases.items():
        entry = rule.mix(entry, dim, basis)
    moved = rule.carry(entry, axes, change, group)
    _fitting(optimizer, key, moved, change.value.shape, f"the new {change.name}")
    if moved.shape == change.value.shape and moved.stride() != change.value.stride():
        # Fused kernels go through parameter and state in memory order, whatever their strides.
        moved = torch.empty_like(change.value, dtype=moved.dtype, device=moved.device).copy_(moved)
    return moved
