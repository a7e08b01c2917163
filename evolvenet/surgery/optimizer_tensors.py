"""Tensors that an optimizer keeps outside of its `state`: in inner optimizers, in attributes of its own, on parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.errors import OptimizerStateError

Kind = TypeVar("Kind")


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """A tensor outside of `optimizer.state` that has one entry for each entry of parameters.

    Args:
        place: where it is, for messages.
        key: name of its attribute, or the last key of a dict that leads to it.
        tensor: the tensor; a change gives it new data, it stays the same object.
        parameters: the parameter whose shape it has; or several, one flat tensor of whose entries, in order, it is.
    """

    place: str
    key: str
    tensor: Tensor
    parameters: tuple[Tensor, ...]

    def parts(self) -> list[Tensor]:
        """The part of each parameter, of its shape: views of the tensor."""
        if len(self.parameters) == 1:
            return [self.tensor.detach().view(self.parameters[0].shape)]
        ends = accumulate(parameter.numel() for parameter in self.parameters)
        flat = self.tensor.detach()
        return [flat[end - own.numel() : end].view(own.shape) for end, own in zip(ends, self.parameters, strict=True)]


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers and those inside of them, such as SAM's `base_optimizer` and Lookahead's `optimizer`, outer ones first.

    Found in attributes, and in lists and dicts in them.

    >>> import torch
    >>> weight = nn.Parameter(torch.ones(2))
    >>> outer, inner = (torch.optim.SGD([weight], lr=0.1) for _ in range(2))
    >>> outer.base_optimizer = inner
    >>> with_inner([outer]) == [outer, inner]
    True
    """
    found: dict[int, Optimizer] = {}
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            own = [value for name, value in vars(optimizer).items() if name not in OWN_PLACES]
            waiting += [each for value in own for each in instances_in(value, Optimizer)]
    return list(found.values())


OWN_PLACES = ("state", "param_groups", "defaults")
"""Attributes of torch's own, which are treated apart."""
DEEPEST = 4
"""Containers in containers that are searched."""


def instances_in(value: Any, kind: type[Kind], depth: int = 0) -> Iterator[Kind]:
    """What is of a type in a value: itself, or in containers."""
    if isinstance(value, kind):
        yield value
    elif depth < DEEPEST:
        for part in _parts_of(value):
            yield from instances_in(part, kind, depth + 1)


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(cast("Mapping[Any, Any]", value).values())
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else []


def held_tensors(optimizer: Optimizer) -> list[HeldTensor]:
    """The tensors in an optimizer's attributes and parameter groups that have one entry for each entry of parameters.

    A tensor belongs to a parameter if it is under it, its id or its name (of `param_names` in its group) in a dict, or at its
    place in a list as long as the parameters of all groups, or of the group at the list's own place (Lookahead's
    `slow_weights`), and has its shape. One of a single axis may be that of all parameters, one after the other. What is in
    inner optimizers is not among these.

    Args:
        optimizer: any.

    Raises:
        OptimizerStateError: for a tensor of which it is not known to which parameter it belongs, although its size is one of
            theirs.
    """
    return _Search(optimizer).held()


def keys_of(optimizer: Optimizer) -> dict[Any, Tensor]:
    """{name or id of a parameter: the parameter}; names are known where the groups have `param_names`."""
    found: dict[Any, Tensor] = {}
    for group in optimizer.param_groups:
        found |= {id(parameter): parameter for parameter in group["params"]}
        found |= dict(zip(group.get("param_names", ()), group["params"], strict=False))
    return found


class _Search:
    """Looks through one optimizer's attributes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups: list[list[Tensor]] = [list(group["params"]) for group in optimizer.param_groups]
        self.all = [parameter for group in self.groups for parameter in group]
        self.wholes = {(sum(parameter.numel() for parameter in group),) for group in self.groups}
        self.keys = keys_of(optimizer)
        inner = with_inner([optimizer])
        self.skipped = {id(part) for each in inner for part in (each.state, each.param_groups)}
        self.skipped |= {id(group) for each in inner for group in each.param_groups}
        self.skipped |= {id(parameter) for parameter in self.all}
        self.found: dict[int, HeldTensor] = {}

    def held(self) -> list[HeldTensor]:
        for name, value in vars(self.optimizer).items():
            if name not in OWN_PLACES:
                self._look(value, name, name, self.all)
        for index, (group, own) in enumerate(zip(self.optimizer.param_groups, self.groups, strict=True)):
            for key, value in group.items():
                if key not in ("params", "param_names"):
                    self._look(value, f"param_groups[{index}][{key!r}]", key, own)
        return list(self.found.values())

    def _look(self, value: Any, place: str, key: str, parameters: Sequence[Tensor], depth: int = 0) -> None:
        """Search a value.

        Args:
            value: an attribute, or what is in one.
            place: where it is.
            key: the last name that leads to it.
            parameters: those that a list here may be as long as; a single one that the tensors here belong to.
            depth: containers around it.
        """
        if id(value) in self.skipped or isinstance(value, Optimizer) or depth > DEEPEST:
            return
        if isinstance(value, Tensor):
            self._add(value, place, key, parameters)
        elif isinstance(value, Mapping):
            for name, part in cast("Mapping[Any, Any]", value).items():
                self._look_under(name, part, f"{place}[{self._text(name)}]", key, parameters, depth + 1)
        elif isinstance(value, (list, tuple)):
            parts = list(cast("Sequence[Any]", value))
            for index, (part, own) in enumerate(zip(parts, self._owners(parts, parameters), strict=True)):
                self._look(part, f"{place}[{index}]", key, own, depth + 1)

    def _text(self, name: Any) -> str:
        """A dict's key, the same in a resumed run: a parameter, or its id, by its place among all."""
        for place, parameter in enumerate(self.all):
            if name is parameter or (isinstance(name, int) and name == id(parameter)):
                return f"parameter {place}"
        return type(name).__name__ if isinstance(name, (Tensor, nn.Module)) else repr(name)

    def _look_under(self, name: Any, part: Any, place: str, key: str, parameters: Sequence[Tensor], depth: int) -> None:
        if isinstance(name, nn.Module) and any(tensor.numel() > 1 for tensor in instances_in(part, Tensor)):
            raise self._unknown(place, f"tensors by module, here {type(name).__name__}")
        if isinstance(name, Tensor):
            owner = name if any(name is each for each in self.all) else None
        else:
            owner = self.keys.get(name) if isinstance(name, (str, int)) else None
        named = key if owner is not None or not isinstance(name, str) else name
        self._look(part, place, named, parameters if owner is None else (owner,), depth)

    def _owners(self, parts: Sequence[Any], parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The parameters that each of a list's entries may belong to."""
        if len(parts) == len(parameters) > 1 and all(map(fits, parts, parameters)):
            return [(parameter,) for parameter in parameters]
        if len(parts) == len(self.groups) and len(parameters) == len(self.all):
            return list(self.groups)
        return [parameters for _ in parts]

    def _add(self, tensor: Tensor, place: str, key: str, parameters: Sequence[Tensor]) -> None:
        if tensor.numel() < 2 or id(tensor) in self.found:
            return
        whole = sum(parameter.numel() for parameter in parameters)
        if (len(parameters) == 1 and tensor.shape == parameters[0].shape) or tuple(tensor.shape) == (whole,):
            if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
                raise self._unknown(place, "a view of another tensor")
            self.found[id(tensor)] = HeldTensor(place, key, tensor, tuple(parameters))
        elif any(tensor.shape == parameter.shape for parameter in self.all) or tuple(tensor.shape) in self.wholes:
            raise self._unknown(place, f"a tensor of shape {tuple(tensor.shape)} that may be of several")

    def _unknown(self, place: str, what: str) -> OptimizerStateError:
        return OptimizerStateError(
            f"{type(self.optimizer).__name__}.{place}: expected tensors in optimizer.state[parameter], under the parameter "
            f"in a dict, or in a list as long as the parameters, got {what}. It could not follow a change of widths. Keep it "
            "there, or register a function for the optimizer with "
            "evolvenet.surgery.optimizer_state.compile_state.register."
        )


def fits(part: Any, parameter: Tensor) -> bool:
    """Whether all tensors of a list's entry are numbers or have the shape of the parameter at its place."""
    return all(tensor.numel() < 2 or tensor.shape == parameter.shape for tensor in instances_in(part, Tensor))


def tensors_on(parameter: Tensor) -> dict[str, Tensor]:
    """Tensors of its shape that a parameter has as plain attributes, as in Adahessian's `p.hess`."""
    return {
        name: value
        for name, value in vars(parameter).items()
        if isinstance(value, Tensor) and value is not parameter and value.numel() > 1 and value.shape == parameter.shape
    }
