"""Whole numbers in the attributes of modules: how they are named, read and exchanged.

A number is named by its attribute and the way to it from there: "num_heads", "splits[0]", "sizes['mlp']", "config.hidden_size".
To exchange one, the module's attribute is set to a copy of its value with the other number in it: a config object that several
modules share stays as it is for the others.
"""

# What a user's attributes hold is of any type.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping, MutableMapping
from functools import singledispatch
from typing import Any

from torch import Tensor, nn

Key = str | int
"""A field's name, a mapping's key or a place in a sequence."""

DEPTH = 3
"""How many containers deep a number may lie."""
LARGEST = 256
"""Longer containers hold data, not sizes."""
_STEP = re.compile(r"\.(?P<field>\w+)|\[(?P<place>\d+)\]|\['(?P<key>[^'\[\]]*)'\]")
_NAME = re.compile(r"\w+")
_PLAIN = (int, float, complex, str, bytes, type, enum.Enum)


def numbers_in(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(name, value) of the whole numbers in a module's attributes and in the containers and configs among them.

    Of private attributes (`_modules`, `_hparams`) only those that are numbers, or tuples of them, are looked at.

    >>> block = nn.Module()
    >>> block.c, block.splits, block.sizes = 8, (8, 16), {"mlp": 32}
    >>> dict(numbers_in(block))
    {'c': 8, 'splits[0]': 8, 'splits[1]': 16, "sizes['mlp']": 32}
    """
    for name, value in vars(module).items():
        if not name.startswith("_") or isinstance(value, int | tuple):
            yield from _numbers(name, value, DEPTH)


def number_at(module: nn.Module, name: str) -> Any:
    """The value of a number, None if the module has no such number.

    >>> block = nn.Module()
    >>> block.splits = [8, 16]
    >>> number_at(block, "splits[1]"), number_at(block, "splits[2]")
    (16, None)
    """
    first, keys = _way(name)
    value = getattr(module, first, None)
    for key in keys:
        value = entries(value).get(key)
    return value


def with_number(module: nn.Module, name: str, number: int, value: Any = None) -> tuple[str, Any]:
    """(attribute, its value with another number in it); the module and its present value stay as they are.

    Args:
        module: the module that holds the number.
        name: of the number.
        number: the new one.
        value: of the attribute, if other numbers in it have been exchanged already; by default the present one.

    >>> block = nn.Module()
    >>> block.splits = (8, 16)
    >>> with_number(block, "splits[1]", 12), block.splits
    (('splits', (8, 12)), (8, 16))
    """
    first, keys = _way(name)
    return first, _exchanged(getattr(module, first) if value is None else value, keys, number)


def attribute_of(name: str) -> str:
    """The attribute in which a number lies.

    >>> attribute_of("config.hidden_size"), attribute_of("splits[0]"), attribute_of("num_heads")
    ('config', 'splits', 'num_heads')
    """
    return _way(name)[0]


@singledispatch
def entries(value: Any) -> dict[Key, Any]:
    """What a container holds, by key; of a config object (dataclass, namespace, `PretrainedConfig`) its fields.

    An object that holds anything but plain data, such as a module or a trainer, is no config and has no entries.
    """
    return _fields(value) if _is_config(value, DEPTH) else {}


@entries.register(tuple)
@entries.register(list)
def _(value: tuple[Any, ...] | list[Any]) -> dict[Key, Any]:
    return dict(enumerate(value))


@entries.register
def _(value: MutableMapping) -> dict[Key, Any]:  # type: ignore[type-arg]
    return {key: entry for key, entry in value.items() if isinstance(key, str) and not set("'[]") & set(key)}


@singledispatch
def with_entry(value: Any, key: Key, entry: Any) -> Any:
    """A copy of a container or config object with another entry."""
    made = copy.copy(value)
    # A frozen dataclass refuses the ordinary way.
    object.__setattr__(made, str(key), entry)
    return made


@with_entry.register
def _(value: tuple, key: Key, entry: Any) -> Any:  # type: ignore[type-arg]
    changed = [entry if place == key else old for place, old in enumerate(value)]
    # A named tuple takes its entries one by one.
    return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)


@with_entry.register(list)
@with_entry.register(MutableMapping)
def _(value: Any, key: Key, entry: Any) -> Any:
    made = copy.copy(value)
    made[key] = entry
    return made


def _numbers(name: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if type(value) is int:
        yield name, value
    elif depth and not isinstance(value, int | float | str | Tensor | nn.Module):
        found = entries(value)
        for key, entry in found.items() if len(found) <= LARGEST else ():
            yield from _numbers(name + _step(value, key), entry, depth - 1)


def _step(value: Any, key: Key) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    return f"['{key}']" if isinstance(value, Mapping) else f".{key}"


def _way(name: str) -> tuple[str, list[Key]]:
    first = _NAME.match(name)
    assert first is not None, name
    steps = [step.groupdict() for step in _STEP.finditer(name, first.end())]
    return first.group(), [int(s["place"]) if s["place"] is not None else s["field"] or s["key"] for s in steps]


def _exchanged(value: Any, keys: list[Key], number: int) -> Any:
    if not keys:
        return number
    return with_entry(value, keys[0], _exchanged(entries(value)[keys[0]], keys[1:], number))


def _fields(value: Any) -> dict[Key, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return {name: entry for name, entry in vars(value).items() if name.isidentifier()}


def _is_config(value: Any, depth: int) -> bool:
    """Whether an object holds plain data alone."""
    if isinstance(value, type | nn.Module | Tensor) or callable(value) or not depth:
        return False
    if not hasattr(value, "__dict__") and not dataclasses.is_dataclass(value):
        return False
    return all(_is_plain(entry, depth - 1) for entry in _fields(value).values())


def _is_plain(value: Any, depth: int) -> bool:
    if value is None or isinstance(value, _PLAIN) or type(value).__module__ == "torch":
        return not isinstance(value, Tensor)
    if isinstance(value, tuple | list | set | frozenset):
        return all(_is_plain(entry, depth) for entry in value)
    if isinstance(value, Mapping):
        return all(_is_plain(entry, depth) for entry in value.values())
    return _is_config(value, depth)
