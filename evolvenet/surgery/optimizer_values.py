"""All tensors that an optimizer keeps, copied, and put back: for a snapshot of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from evolvenet._compat.torch import LBFGS_SIZE_CACHE
from evolvenet.errors import OptimizerStateError
from evolvenet.linalg.precision import in_float64
from evolvenet.surgery.optimizer_state import follows_rules
from evolvenet.surgery.optimizer_tensors import held_tensors, tensors_on, with_inner
from evolvenet.surgery.resize_model import exchange


def optimizer_values(optimizer: Optimizer) -> dict[str, Any]:
    """A copy of an optimizer's state and of the tensors that it keeps elsewhere, as plain data and tensors.

    Its settings (learning rates, betas) are not among these, nor is what optimizers inside of it keep.

    Returns:
        "state", by the parameter's place as in a state dict, and "held", by place.
    """
    if not follows_rules(optimizer):
        return {"state": copy.deepcopy(optimizer.state_dict()["state"]), "held": {}}
    places: Mapping[Any, int] = _places(optimizer)
    # Some optimizers keep entries of their own beside those of parameters.
    state = {places.get(key, key): entry for key, entry in optimizer.state.items()}
    held = {place: tensor.detach().clone() for place, tensor in held_by_place(optimizer).items()}
    return {"state": copy.deepcopy(state), "held": held}


def restore_optimizer(optimizer: Optimizer, values: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_values` copied. Parameter groups are not touched.

    Neither `state_dict` nor `load_state_dict` is called, but for optimizers with a function of their own in `compile_state`:
    those that hold other optimizers override them, and torch casts all state to the dtype of the parameter.

    Args:
        optimizer: whose parameters have the shapes of that moment again.
        values: the copy.
        held: `held_by_place` from before the parameters got these shapes.
    """
    state = copy.deepcopy(dict(values["state"]))
    if not follows_rules(optimizer):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    parameters = {place: parameter for parameter, place in _places(optimizer).items()}
    before = dict(optimizer.state)
    optimizer.state.clear()
    for place, entries in state.items():
        parameter = parameters.get(place)
        if parameter is None:
            optimizer.state[place] = entries
        else:
            live = before.get(parameter, {})
            optimizer.state[parameter] = {
                key: _beside(entry, live.get(key), parameter) for key, entry in entries.items()
            }
    for place, tensor in held.items():
        if place in values["held"]:
            exchange(tensor, values["held"][place].clone().to(tensor.device), None)
    if isinstance(optimizer, LBFGS):
        setattr(optimizer, LBFGS_SIZE_CACHE, None)


def held_by_place(optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors that an optimizer keeps outside of its state, and those that are on its parameters, by place."""
    if not follows_rules(optimizer):
        return {}
    found = {held.place: held.tensor for held in held_tensors(optimizer)}
    for parameter, place in _places(optimizer).items():
        found |= {f"{place}.{name}": tensor for name, tensor in tensors_on(parameter).items()}
    return found


def norms_of(optimizers: Sequence[Optimizer]) -> list[dict[str, float]]:
    """Of each optimizer and of those inside of them, norms of what it keeps: of all its state, and of each tensor elsewhere.

    Empty where torch's own `state_dict` has all of it: no optimizer has others inside, or tensors outside of its state.
    """
    plain = all(len(with_inner([optimizer])) == 1 and not _held(optimizer) for optimizer in optimizers)
    return [] if plain else [_norms(optimizer) for optimizer in with_inner(optimizers)]


def _held(optimizer: Optimizer) -> dict[str, Tensor]:
    try:
        return held_by_place(optimizer)
    except OptimizerStateError:
        return {}


def _norms(optimizer: Optimizer) -> dict[str, float]:
    every = cast("Mapping[Any, Any]", optimizer.state).values()
    states = [cast("Mapping[str, Any]", entries) for entries in every if isinstance(entries, Mapping)]
    state = sum(_norm(entry) for entries in states for entry in entries.values() if isinstance(entry, Tensor))
    return {"state": state, **{place: _norm(tensor) for place, tensor in _held(optimizer).items()}}


def _norm(tensor: Tensor) -> float:
    return float(in_float64(tensor.detach().abs()).square().sum().sqrt())


def not_restored(optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, float]]) -> str | None:
    """What the optimizers of a resumed run have not got back, since their `state_dict` does not hold it; None for nothing.

    Args:
        optimizers: after their states were loaded.
        saved: `norms_of` them when the checkpoint was written.
    """
    now = [(type(optimizer).__name__, _norms(optimizer)) for optimizer in with_inner(optimizers)]
    missing = [
        f"{name}.{place}"
        for (name, after), before in zip(now, saved, strict=False)
        for place, norm in before.items()
        if not math.isclose(norm, after.get(place, math.inf), rel_tol=1e-3)
    ]
    if not missing:
        return None
    return (
        f"The resumed run is not the uninterrupted one: expected {', '.join(missing)} as the checkpoint's run had it, got other "
        "values, since the optimizer's state_dict does not hold it. Let its state_dict and load_state_dict hold all that it and "
        "the optimizers inside of it keep."
    )


def _places(optimizer: Optimizer) -> dict[Tensor, int]:
    every = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: place for place, parameter in enumerate(every)}


def _beside(entry: Any, live: Any, parameter: Tensor) -> Any:
    """An entry on the device of the live one; a snapshot from a checkpoint may be on another one."""
    if not isinstance(entry, Tensor):
        return entry
    if isinstance(live, Tensor):
        return entry.to(live.device)
    return entry if entry.dim() == 0 else entry.to(parameter.device)
