"""Copies of weights that are bare tensors in a dict or a list: hand-written moving averages, anchors of a penalty.

They are no parameters or buffers, so a change of widths does not reach them. What they are copies of keeps its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import plain_attributes

_NOT_SEARCHED = (nn.Module, Tensor, Optimizer, type, str, bytes)


def bare_copies(holders: Mapping[str, object], network: nn.Module) -> dict[str, str]:
    """{name of a parameter: where a tensor of its shape is kept under its name, or in its place in a list}.

    Searched are the attributes of each holder, and those of the objects among them.

    Args:
        holders: {name: object}, modules or callbacks.
        network: whose parameters count.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> net.shadow = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    >>> bare_copies({"net": net}, net)["0.weight"]
    'net.shadow'
    """
    own = dict(network.named_parameters())
    known = {id(parameter) for parameter in own.values()}
    lists = [list(module.parameters()) for module in network.modules()]
    lists += [[p for p in parameters if p.requires_grad] for parameters in lists]
    names = {id(parameter): name for name, parameter in own.items()}
    found: dict[str, str] = {}
    for where, container in _containers(holders):
        if len(container) > 4 * len(own):
            continue  # a data set
        if isinstance(container, dict):
            copied = _copied_by_name(container, own, known)
        else:
            copied = _copied_in_order(container, lists, known)
        if any(parameter.dim() > 1 for parameter in copied):
            found |= {names[id(parameter)]: where for parameter in copied}
    return found


def _containers(holders: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    for name, holder in holders.items():
        for attribute, value in _attributes(holder):
            where = f"{name}.{attribute}" if name else attribute
            if isinstance(value, (dict, list, tuple)):
                yield where, value
            elif not isinstance(value, _NOT_SEARCHED):
                for inner, part in _attributes(value):
                    if isinstance(part, (dict, list, tuple)):
                        yield f"{where}.{inner}", part


def _attributes(thing: object) -> list[tuple[str, Any]]:
    held = plain_attributes(thing) if isinstance(thing, nn.Module) else getattr(thing, "__dict__", None)
    return list(held.items()) if isinstance(held, dict) else []


def _copied_by_name(container: dict[Any, Any], own: Mapping[str, nn.Parameter], known: set[int]) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for key, value in container.items():
        if not isinstance(value, Tensor) or id(value) in known:
            continue
        if isinstance(key, Tensor):
            found += [each for each in own.values() if each is key]
        elif isinstance(key, str):
            named = (
                p for name, p in own.items() if name == key or name.endswith(f".{key}") or key.endswith(f".{name}")
            )
            found += [parameter for parameter in named if parameter.shape == value.shape]
    return found


def _copied_in_order(
    container: list[Any] | tuple[Any, ...], lists: list[list[nn.Parameter]], known: set[int]
) -> list[nn.Parameter]:
    if len(container) < 2 or not all(isinstance(each, Tensor) and id(each) not in known for each in container):
        return []
    shapes = [each.shape for each in container]
    return [p for parameters in lists if [each.shape for each in parameters] == shapes for p in parameters]
