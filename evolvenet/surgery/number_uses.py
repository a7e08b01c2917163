"""Which numbers of a model's own code its computation may use: a file that holds tensors alone does not hold these.

Found in the code: starting from `forward` and the steps of training, the methods and functions that are named in it, and
the attributes that these name. What constructors alone use counts for nothing here.
"""

# What a user's classes hold is of any type.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from evolvenet._compat.torch import own_tensors
from evolvenet.surgery.numbers import attribute_of, numbers_in

RESHAPING = frozenset(
    {"view", "reshape", "unflatten", "view_as", "expand", "split", "split_with_sizes", "narrow", "rearrange"}
)
"""Calls to which a number says how an axis is divided."""


def numbers_in_doubt(model: nn.Module, planned: Mapping[Tensor, tuple[int, ...]]) -> list[str]:
    """Numbers that the computation uses and that may have to follow a width which a file without a record changes.

    That is a number that was the size of an axis that differs, or one that divided it and is used in code that reshapes: heads
    and their sizes cannot be told apart by shapes.

    Args:
        model: the model as it is.
        planned: shape in the file of each of its tensors.

    Returns:
        Such as "block.head_size = 16".
    """
    found: list[str] = []
    uses: tuple[set[str], set[str]] | None = None
    for path, module in model.named_modules():
        changed = _changed(module, planned)
        if not changed or _of_torch(type(module)):
            continue
        uses = uses or _uses(model)
        # What a layer of torch repeats of its shapes is updated with them.
        known = {
            name for base in type(module).__mro__ if _of_torch(base) for name in getattr(base, "__constants__", ())
        }
        for name, value in numbers_in(module):
            attribute = attribute_of(name)
            exact = attribute in uses[0] and value in changed
            divides = attribute in uses[1] and any(old % value == 0 for old in changed if value > 1)
            if value > 1 and attribute not in known and (exact or divides):
                found.append(f"{'.'.join(filter(None, (path, name)))} = {value}")
    return found


def _changed(module: nn.Module, planned: Mapping[Tensor, tuple[int, ...]]) -> set[int]:
    """Sizes that differ, of the module's own tensors and of those of torch's layers in it."""
    sizes: set[int] = set()
    for tensor in own_tensors(module).values():
        shape = planned.get(tensor, tuple(tensor.shape))
        sizes |= {old for old, new in zip(tensor.shape, shape, strict=True) if old != new and old > 1}
    for child in module.children():
        if _of_torch(type(child)):
            sizes |= _changed(child, planned)
    return sizes


def _of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _uses(model: nn.Module) -> tuple[set[str], set[str]]:
    """The names that the code of a model's computation has, and those in code that reshapes."""
    methods: dict[str, set[FunctionType]] = {}
    overridden: dict[str, set[FunctionType]] = {}
    for kind in {type(module) for module in model.modules()}:
        seen: set[str] = set()
        for base in kind.__mro__:
            for name, value in vars(base).items() if not _of_torch(base) else ():
                table = overridden if name in seen else methods
                table.setdefault(name, set()).update(_functions(value))
            seen |= set(vars(base))
    waiting = [each for name, found in methods.items() if name == "forward" or name.endswith("_step") for each in found]
    reached: set[FunctionType] = set()
    names: set[str] = set()
    reshaping: set[str] = set()
    while waiting:
        function = waiting.pop()
        if function in reached:
            continue
        reached.add(function)
        own = set(_names(function.__code__))
        names |= own
        if own & RESHAPING:
            reshaping |= own
        for name in own:
            called = {*methods.get(name, ()), *(overridden.get(name, ()) if "super" in own else ())}
            waiting += called if name != "__init__" else ()
            waiting += [each for each in _functions(function.__globals__.get(name)) if not _library(each)]
    return names, reshaping


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind a method, a property or a decorated function."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    for each in (value.fget,) if isinstance(value, property) else (value,):
        if isinstance(each, FunctionType):
            yield each
            yield from _functions(getattr(each, "__wrapped__", None))


def _library(function: FunctionType) -> bool:
    return function.__module__.partition(".")[0] in ("torch", "numpy", "math")


def _names(code: CodeType) -> Iterator[str]:
    """The names of attributes and globals in code, with the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
