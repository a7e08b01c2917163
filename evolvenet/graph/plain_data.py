"""What is read from a checkpoint is checked against the types of the dataclasses that it becomes, before anything changes."""

# Annotations are values here, of which pyright knows no type.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from evolvenet.errors import EvolveNetError, RecordError, is_out_of_memory

_PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,), int: (int,), float: (int, float), str: (str,), NoneType: (NoneType,)
}  # fmt: skip
"""Types of which no subclass counts; whole numbers stand for numbers with a fraction."""


@contextmanager
def reading(what: str) -> Generator[None]:
    """Errors of the body that are none of EvolveNet's become a RecordError; memory that runs out stays what it is.

    >>> with reading("The state of the Evolver"):
    ...     {}["graph"]
    Traceback (most recent call last):
    ...
    evolvenet.errors.RecordError: The state of the Evolver cannot be read: expected what EvolveNet has written, ...
    """
    try:
        yield
    except EvolveNetError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RecordError(
            f"{what} cannot be read: expected what EvolveNet has written, got {type(error).__name__}: {error}. The file may be "
            "damaged, or edited: use another checkpoint."
        ) from error


def check_types(value: Any, kind: Any, where: str) -> None:
    """Raise unless a value is of a type, with all that it holds.

    Args:
        value: as it was read.
        kind: a type, a dataclass, or an annotation of these: unions, mappings, sequences, sets, tuples. Others are not checked.
        where: what is read, for the message.

    Raises:
        TypeError: naming the place.

    >>> check_types({"fc": [1, 2]}, dict[str, list[int]], "sizes")
    >>> check_types({"fc": [1, None]}, dict[str, list[int]], "sizes")
    Traceback (most recent call last):
    ...
    TypeError: sizes.fc[1]: expected int, got None
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        _check_union(value, get_args(kind), where)
    elif kind in _PLAIN:
        _require(type(value) in _PLAIN[kind], kind.__name__, value, where)
    elif isinstance(kind, type) and is_dataclass(kind):
        _require(isinstance(value, kind), str(kind), value, where)
        for name, annotation in _hints(kind).items():
            check_types(getattr(value, name), annotation, f"{where}.{name}")
    elif isinstance(origin, type) and issubclass(origin, (Mapping, Sequence, Set)):
        _require(isinstance(value, origin), f"a {origin.__name__}", value, where)
        _check_entries(value, origin, get_args(kind), where)
    elif origin is Callable:
        _require(callable(value), "a function", value, where)
    elif kind is not Any and origin is None:
        _require(isinstance(value, kind), kind.__name__, value, where)


def _check_entries(value: Any, origin: type, inner: Sequence[Any], where: str) -> None:
    if issubclass(origin, Mapping):
        for name, entry in value.items():
            check_types(name, inner[0], f"a key of {where}")
            check_types(entry, inner[1], f"{where}.{name}")
        return
    several = origin is not tuple or inner[-1] is Ellipsis
    _require(several or len(value) == len(inner), f"{len(inner)} entries", value, where)
    for index, entry in enumerate(value):
        check_types(entry, inner[0 if several else index], f"{where}[{index}]")


def _check_union(value: Any, kinds: Sequence[Any], where: str) -> None:
    if value is None and NoneType in kinds:
        return
    others = [kind for kind in kinds if kind is not NoneType]
    for kind in others[:-1]:
        try:
            return check_types(value, kind, where)
        except TypeError:
            continue
    check_types(value, others[-1], where)


def _require(holds: bool, expected: str, value: object, where: str) -> None:
    if not holds:
        raise TypeError(f"{where}: expected {expected}, got {str(value)[:60]}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}
