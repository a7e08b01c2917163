"""One entry of an optimizer's state: the axes that it shares with its parameter, and its value after a change of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from evolvenet.errors import OptimizerStateError, stage
from evolvenet.graph.index_map import IndexMap
from evolvenet.surgery.basis_change import BasisChange
from evolvenet.surgery.optimizer_state_rules import RULES, SCALAR, SCALARS, UNKNOWN, WEIGHTS, Change, Rule, is_weights


@dataclass(frozen=True, eq=False)
class CopyChange:
    """The change of a tensor of a parameter's shape, with the parameter; see `Change`."""

    tensor: Tensor
    name: str
    axes: Mapping[int, IndexMap]
    value: Tensor
    bases: Mapping[int, BasisChange]


def weights_rules(entries: Iterable[tuple[str, Any, Tensor]]) -> dict[str, Rule]:
    """{key: rule} of the keys whose entries are other versions of the weights, see `is_weights`.

    Args:
        entries: (key, entry, parameter) of all parameters.
    """
    pairs: dict[str, list[tuple[Any, Tensor]]] = {}
    for key, entry, parameter in entries:
        pairs.setdefault(key, []).append((entry, parameter))
    return {key: WEIGHTS for key, found in pairs.items() if is_weights(key, found)}


def _rule(key: str, entry: Tensor, shape: Sequence[int]) -> Rule:
    """The rule of an entry; for a single number beside a parameter of another shape, that of a scalar."""
    lone = entry.dim() == 0 or (entry.numel() == 1 and key not in RULES and tuple(entry.shape) != tuple(shape))
    if key in SCALARS or lone:
        return SCALAR
    return RULES.get(key, UNKNOWN)


def fitting(optimizer: str, key: str, entry: Any, shape: Sequence[int], name: str) -> tuple[int, ...]:
    """The axes that a state entry shares with its parameter; none for numbers.

    Raises:
        OptimizerStateError: if it holds tensors that do not fit.
    """
    if not isinstance(entry, Tensor):
        if _holds_tensors(entry):
            raise OptimizerStateError(
                f"{optimizer}: expected {key!r} of {name} to be a tensor or a number, got a "
                f"{type(entry).__name__} of tensors. Register a function for it with "
                "evolvenet.surgery.optimizer_state.compile_state.register."
            )
        return ()
    rule = _rule(key, entry, shape)
    axes = () if rule is SCALAR else rule.axes(entry, shape)
    if axes is None:
        raise OptimizerStateError(
            f"{optimizer}: expected {key!r} to fit {name}, shape {tuple(shape)}, got {tuple(entry.shape)}. "
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
def carried(
    optimizer: str, key: str, entry: Any, change: Change, group: Mapping[str, Any], given: Rule | None = None
) -> Any:
    """One entry of a parameter's state after the change; the very same object where nothing changes.

    Args:
        optimizer: name of its type, for errors.
        key: of the entry.
        entry: a tensor or a number.
        change: of the parameter.
        group: the parameter's.
        given: the rule; by the key if None.
    """
    shared = fitting(optimizer, key, entry, change.tensor.shape, change.name)
    axes = {dim: index_map for dim, index_map in change.axes.items() if dim % change.tensor.dim() in shared}
    bases = {dim: basis for dim, basis in change.bases.items() if dim % change.tensor.dim() in shared}
    if not isinstance(entry, Tensor):
        return entry
    rule = given or _rule(key, entry, change.tensor.shape)
    # A weight whose entries change in place, with all of its units, changes its copies too.
    if not axes and not bases and (rule is not WEIGHTS or entry.shape != change.tensor.shape):
        return entry
    for dim, basis in bases.items():
        entry = rule.mix(entry, dim, basis)
    moved = rule.carry(entry, axes, change, group)
    fitting(optimizer, key, moved, change.value.shape, f"the new {change.name}")
    if moved.shape == change.value.shape and moved.stride() != change.value.stride():
        # Fused kernels go through parameter and state in memory order, whatever their strides.
        moved = torch.empty_like(change.value, dtype=moved.dtype, device=moved.device).copy_(moved)
    return moved
