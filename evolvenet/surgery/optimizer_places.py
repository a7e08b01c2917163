"""Entries in an optimizer's lists and dicts, and on parameters, where other parameters take the places of some.

The new entries are those of a parameter on which no step has been made: copies of weights are copies of the new weights, all
other tensors are 0, and the counts beside them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from evolvenet.errors import OptimizerStateError
from evolvenet.surgery.optimizer_entries import weights_rules
from evolvenet.surgery.optimizer_state_rules import WEIGHTS, Rule
from evolvenet.surgery.optimizer_tensors import (
    DEEPEST,
    OWN_PLACES,
    fits,
    held_tensors,
    instances_in,
    keys_of,
    tensors_on,
    with_inner,
)
from evolvenet.surgery.resize_model import exchange

Replaced = Mapping[Tensor, Sequence[Tensor]]
"""{parameter: those in its place}."""

_FIRST_VALUES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "step_size": lambda group: float(group["lr"]),
    "eta": lambda group: float(group["lr"]),
    "mu": lambda group: 1.0,
    "mu_product": lambda group: 1.0,
}
"""Keys of torch's optimizers whose entries do not start at 0."""


def first_entries(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    old: Tensor,
    new: Tensor,
    state: Mapping[str, Any],
    rules: Mapping[str, Rule],
) -> dict[str, Any]:
    """The state of a new parameter with all keys of that of the old one, as it is before the first step.

    An optimizer that makes its state when it is built would not make it for a parameter that comes later; one that makes
    it in its first step finds what it would have made.

    Args:
        optimizer: for messages.
        group: the parameter's.
        old: the parameter whose place is taken.
        new: the one that takes it.
        state: of the old one.
        rules: of those keys whose entries are other versions of the weights, from `weights_rules`.

    Raises:
        OptimizerStateError: for a tensor of which it is not known how it depends on the parameter.
    """
    fresh = _FirstEntry(type(optimizer).__name__, old, new, True, {})
    return {
        key: _filled(entry, new, _FIRST_VALUES[key](group))
        if key in _FIRST_VALUES and isinstance(entry, Tensor)
        else fresh(entry, key, rules.get(key) is WEIGHTS)
        for key, entry in state.items()
    }


def _filled(entry: Tensor, new: Tensor, value: float) -> Tensor:
    return torch.full_like(entry if entry.numel() < 2 else new.detach(), value, dtype=entry.dtype)


def replace_held(
    optimizer: Optimizer, replaced: Replaced, names: Mapping[Tensor, str], undo: ExitStack
) -> dict[Tensor, list[Tensor]]:
    """Give new parameters their entries in the lists and dicts that are an optimizer's attributes or in its groups.

    To be called before the parameters are replaced in its groups. Where the optimizer has the parameters themselves in a list
    or dict, the new ones take their place. What is in inner optimizers is not touched.

    Args:
        optimizer: any.
        replaced: {parameter: those in its place}.
        names: of the new parameters, for dicts by name.
        undo: closing it puts everything back.

    Returns:
        {tensor that was there: the new ones in its place}, of copies of weights an inner optimizer may step on.

    Raises:
        OptimizerStateError: for what cannot be replaced: entries of a tuple, or a tensor by itself.
    """
    return _Places(optimizer, replaced, names, undo).replace()


def copy_attributes(replaced: Replaced) -> None:
    """Give new parameters the plain attributes of the old ones; tensors of their shape (Adahessian's `hess`) are 0."""
    for old, made in replaced.items():
        own = tensors_on(old)
        rules = weights_rules((key, entry, old) for key, entry in own.items())
        for new in made:
            fresh = _FirstEntry("Parameter", old, new, False, {})
            for key, entry in vars(old).items():
                plain = entry is None or isinstance(entry, (bool, int, float, str)) or key in own
                if plain and key not in vars(new):
                    vars(new)[key] = fresh(entry, key, rules.get(key) is WEIGHTS)


class _FirstEntry:
    """An entry of an old parameter → that of a new one before its first step.

    Args:
        optimizer: name of its type, for messages.
        old: the parameter whose place is taken.
        new: the one that takes it.
        counts: whether whole numbers are counts, which start at 0.
        made: receives, of each tensor that takes part, the new ones.
    """

    def __init__(
        self, optimizer: str, old: Tensor, new: Tensor, counts: bool, made: dict[Tensor, list[Tensor]]
    ) -> None:
        self.optimizer, self.old, self.new, self.counts, self.made = optimizer, old, new, counts, made

    def __call__(self, entry: Any, key: str, weights: bool) -> Any:
        if entry is self.old:
            return self.new
        if isinstance(entry, Tensor):
            return self._tensor(entry, key, weights)
        if isinstance(entry, Mapping):
            found = {name: self(part, key, weights) for name, part in cast("Mapping[Any, Any]", entry).items()}
            return _like(cast("dict[Any, Any]", entry), found) if isinstance(entry, dict) else found
        if type(entry) in (list, tuple):
            return type(entry)(self(part, key, weights) for part in entry)
        is_count = self.counts and isinstance(entry, (int, float)) and not isinstance(entry, bool)
        return type(entry)(0) if is_count and float(entry).is_integer() else entry

    def _tensor(self, entry: Tensor, key: str, weights: bool) -> Tensor:
        if entry.numel() < 2 and (entry.dim() != self.old.dim() or self.old.numel() > 1):
            whole = self.counts and bool(entry == entry.round())
            return torch.zeros_like(entry) if whole else entry.detach().clone()
        pairs = list(zip(entry.shape, self.old.shape, strict=False))
        if entry.dim() != self.old.dim() or any(own not in (1, size) for own, size in pairs):
            raise OptimizerStateError(
                f"{self.optimizer}: expected {key!r} of shape {tuple(self.old.shape)}, that of its parameter, got "
                f"{tuple(entry.shape)}. A layer cannot become a chain of factors, or whole again, with it. Register a function "
                "for the optimizer with evolvenet.surgery.optimizer_parameters.fresh_state.register, or leave ranks as they are."
            )
        full = entry.shape == self.old.shape
        shape = (
            self.new.shape if full else [min(own, size) for own, size in zip(entry.shape, self.new.shape, strict=True)]
        )
        # In the layout of the parameter: fused kernels go through both in memory order.
        made = torch.empty_like(self.new if full else self.new.new_empty(shape), dtype=entry.dtype, device=entry.device)
        made = made.detach().copy_(self.new.detach()) if full and weights else made.detach().zero_()
        made.requires_grad_(entry.requires_grad and entry.is_leaf)
        self.made.setdefault(entry, []).append(made)
        return made


def _like(entry: dict[Any, Any], items: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dict of the same type (and, for a defaultdict, with the same factory) with these items."""
    made = entry.copy()
    made.clear()
    made.update(items)
    return made


class _Places:
    """Goes through one optimizer's attributes as `held_tensors` does, and replaces entries."""

    def __init__(self, optimizer: Optimizer, replaced: Replaced, names: Mapping[Tensor, str], undo: ExitStack) -> None:
        self.optimizer, self.replaced, self.names, self.undo = optimizer, replaced, names, undo
        self.groups: list[list[Tensor]] = [list(group["params"]) for group in optimizer.param_groups]
        self.all = [parameter for group in self.groups for parameter in group]
        self.keys = keys_of(optimizer)
        self.shapes = {parameter.shape for parameter in replaced}
        held = held_tensors(optimizer)
        self.owners = {each.tensor: each.parameters for each in held}
        self.rules = weights_rules(
            (each.key, part, own) for each in held for part, own in zip(each.parts(), each.parameters, strict=True)
        )
        inner = with_inner([optimizer])
        self.skipped = {id(part) for each in inner for part in (each.state, each.param_groups)}
        self.skipped |= {id(group) for each in inner for group in each.param_groups}
        self.made: dict[Tensor, list[Tensor]] = {}

    def replace(self) -> dict[Tensor, list[Tensor]]:
        for name, value in list(vars(self.optimizer).items()):
            if name not in OWN_PLACES:
                self._visit(value, name, name, self.all)
        for index, (group, own) in enumerate(zip(self.optimizer.param_groups, self.groups, strict=True)):
            for key, value in list(group.items()):
                if key not in ("params", "param_names"):
                    self._visit(value, f"param_groups[{index}][{key!r}]", key, own)
        return self.made

    def _visit(self, value: Any, place: str, key: str, parameters: Sequence[Tensor], depth: int = 0) -> None:
        """Replace entries in a value; `parameters` are those that a list here may be as long as."""
        if id(value) in self.skipped or isinstance(value, Optimizer) or depth > DEEPEST:
            return
        if isinstance(value, Tensor):
            self._tensor(value, place, key)
        elif isinstance(value, dict):
            self._dict(cast("dict[Any, Any]", value), place, key, parameters, depth)
        elif isinstance(value, (list, tuple)):
            self._sequence(cast("Sequence[Any]", value), place, key, parameters, depth)
        elif isinstance(value, set):
            self._set(cast("set[Any]", value))

    def _tensor(self, tensor: Tensor, place: str, key: str) -> None:
        own = self.owners.get(tensor, ())
        alike = tensor.numel() > 1 and tensor.shape in self.shapes
        if tensor in self.replaced or alike or (len(own) == 1 and own[0] in self.replaced):
            raise self._refusal(place, "a tensor by itself")
        if any(parameter in self.replaced for parameter in own):
            self._flat(tensor, key, own)

    def _flat(self, tensor: Tensor, key: str, own: Sequence[Tensor]) -> None:
        """A tensor of the entries of all parameters, one after the other, gets those of the new ones."""
        parts: list[Tensor] = []
        before, start = tensor.detach(), 0
        for parameter in own:
            part = before[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
            parts += list(self._fresh(parameter, part, key)) if parameter in self.replaced else [part]
        self.undo.callback(exchange, tensor, before.clone(), None)
        exchange(tensor, torch.cat([part.reshape(-1) for part in parts]), None)

    def _fresh(self, owner: Tensor, entry: Any, key: str) -> Iterator[Any]:
        """The entries of the parameters in a parameter's place."""
        counts = any(tensor.numel() > 1 and tensor is not owner for tensor in instances_in(entry, Tensor))
        for tensor in instances_in(entry, Tensor):
            if tensor is not owner:
                self.made.setdefault(tensor, [])
        for new in self.replaced[owner]:
            fresh = _FirstEntry(type(self.optimizer).__name__, owner, new, counts, self.made)
            yield fresh(entry, key, self.rules.get(key) is WEIGHTS)

    def _dict(self, value: dict[Any, Any], place: str, key: str, parameters: Sequence[Tensor], depth: int) -> None:
        found: dict[Any, Any] = {}
        for name, part in value.items():
            owner = self.keys.get(name) if isinstance(name, (int, str)) else name if isinstance(name, Tensor) else None
            if owner is not None and owner in self.replaced:
                entries = zip(self.replaced[owner], self._fresh(owner, part, key), strict=True)
                found.update({self._key(name, new): entry for new, entry in entries})
                continue
            inside = f"{place}[{name!r}]" if isinstance(name, (str, int)) else f"{place}[{type(name).__name__}]"
            named = name if isinstance(name, str) else key
            self._visit(part, inside, named, parameters if owner is None else (owner,), depth + 1)
            found[name] = part
        if found.keys() != value.keys():
            before = dict(value)
            self.undo.callback(_put_back, value, before)
            _put_back(value, found)

    def _key(self, old: Any, new: Tensor) -> Any:
        """The key of a new parameter, of the kind of the old one: the parameter, its name or its id."""
        return self.names.get(new) if isinstance(old, str) else id(new) if isinstance(old, int) else new

    def _sequence(self, value: Sequence[Any], place: str, key: str, parameters: Sequence[Tensor], depth: int) -> None:
        by_group = len(value) == len(self.groups) and len(parameters) == len(self.all)
        by_group = by_group and all(_is_as_long(part, own) for part, own in zip(value, self.groups, strict=True))
        aligned = not by_group and len(value) == len(parameters) and all(map(fits, value, parameters))
        aligned = aligned and any(tensor.numel() > 1 for tensor in instances_in(value, Tensor))
        found: list[Any] = []
        for index, part in enumerate(value):
            owner = parameters[index] if aligned else part if isinstance(part, Tensor) else None
            if owner is not None and owner in self.replaced:
                found += self._fresh(owner, part, key)
                continue
            own = (parameters[index],) if aligned else self.groups[index] if by_group else parameters
            self._visit(part, f"{place}[{index}]", key, own, depth + 1)
            found.append(part)
        if len(found) == len(value) and all(one is two for one, two in zip(found, value, strict=True)):
            return
        if not isinstance(value, list):
            raise self._refusal(place, f"a {type(value).__name__}")
        before = list(value)
        self.undo.callback(value.__setitem__, slice(None), before)
        value[:] = found

    def _set(self, value: set[Any]) -> None:
        """Parameters, or their ids, in a set."""
        before, found = list(value), list[Any]()
        by_id = {id(parameter): parameter for parameter in self.replaced}
        for each in before:
            if isinstance(each, Tensor) and each in self.replaced:
                found += self.replaced[each]
            elif isinstance(each, int) and each in by_id:
                found += map(id, self.replaced[by_id[each]])
            else:
                found.append(each)
        self.undo.callback(value.update, before)
        self.undo.callback(value.clear)
        value.clear()
        value.update(found)

    def _refusal(self, place: str, what: str) -> OptimizerStateError:
        return OptimizerStateError(
            f"{type(self.optimizer).__name__}.{place}: expected tensors of parameters in a list or a dict, into which those of "
            f"factors can be put, got {what}. A layer cannot become a chain of factors, or whole again, with it. Keep them in "
            "optimizer.state[parameter], or leave ranks as they are."
        )


def _is_as_long(part: Any, parameters: Sequence[Tensor]) -> bool:
    return isinstance(part, (list, tuple)) and len(cast("Sequence[Any]", part)) == len(parameters)


def _put_back(value: dict[Any, Any], items: Mapping[Any, Any]) -> None:
    value.clear()
    value.update(items)
