"""Python state that a run of a model beside the user's own must leave as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = frozenset({list, dict, OrderedDict, defaultdict, set, deque})
_TABLES = ("_parameters", "_buffers")
_LARGEST = 2**20
"""Entries of a tensor attribute that is looked after: counts and sums are small, and a data set is not written to."""
_NO_STATE = (type, ModuleType, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """On leaving, what the model's code may have written is as before.

    That is: the attributes of its modules, the entries of lists, dicts and sets among them and of those inside of these,
    tensors written in place (parameters and buffers aside), whatever its forward hooks reach (their closures, the
    objects they belong to, globals that they name), and the random generators of torch, numpy and Python. Only what has
    changed is written back.

    >>> layer = nn.ReLU()
    >>> seen = []
    >>> handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    >>> with untouched(layer):
    ...     _ = layer(torch.zeros(1))
    >>> seen
    []
    """
    found = _Found()
    modules = list(model.modules())
    for module in modules:
        found.add(module)
    for module in modules:
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            found.reach(hook)
    try:
        with _same_random_numbers(model):
            yield
    finally:
        found.put_back()


class _Found:
    """Everything that may be written to, with what it holds now."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._kept: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []

    def add(self, thing: Any, depth: int = 2) -> None:
        """A module or other object, a container or a tensor; containers are followed `depth` deep."""
        if id(thing) in self._seen or isinstance(thing, _NO_STATE):
            return
        if isinstance(thing, Tensor):
            # A parameter is shadowed where it may be written to, and an inference tensor cannot be, nor has it versions.
            if not isinstance(thing, nn.Parameter) and not thing.is_inference() and thing.numel() <= _LARGEST:
                self._remember(thing)
                self._tensors.append((thing, thing._version, thing.detach().clone()))
        elif type(thing) in _CONTAINERS:
            self._remember(thing)
            # Their own copy(): copy.copy goes through pickling, a third of a trial for a deep model.
            self._containers.append((thing, thing.copy()))
            if depth:
                self._follow(thing.values() if isinstance(thing, dict) else thing, depth - 1)
        elif isinstance(getattr(thing, "__dict__", None), dict):
            self._remember(thing)
            self._containers.append((thing.__dict__, dict(thing.__dict__)))
            tables = _TABLES if isinstance(thing, nn.Module) else ()
            for name in tables:
                self.add(thing.__dict__[name], 0)
            self._follow((value for name, value in thing.__dict__.items() if name not in tables), depth)

    def _follow(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if isinstance(value, Tensor) or type(value) in _CONTAINERS:
                self.add(value, depth)

    def _remember(self, thing: Any) -> None:
        self._seen.add(id(thing))
        self._kept.append(thing)

    def reach(self, hook: Callable[..., Any]) -> None:
        """What a function holds on to."""
        if isinstance(hook, partial):
            self.reach(hook.func)
            things = [*hook.args, *hook.keywords.values()]
        elif isinstance(hook, MethodType):
            self.reach(hook.__func__)
            things = [hook.__self__]
        elif isinstance(hook, FunctionType):
            cells = [cell for cell in hook.__closure__ or () if _filled(cell)]
            self._cells += [(cell, cell.cell_contents) for cell in cells]
            named = [hook.__globals__.get(name) for name in hook.__code__.co_names]
            things = [*(cell.cell_contents for cell in cells), *named, *(hook.__defaults__ or ())]
        else:
            things = [hook]
        for thing in things:
            self.add(thing)

    def put_back(self) -> None:
        """Write back what has changed."""
        for container, entries in self._containers:
            if _identities(container) == _identities(entries):
                continue
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(entries)
        for cell, value in self._cells:
            if cell.cell_contents is not value:
                cell.cell_contents = value
        for tensor, version, value in self._tensors:
            # A write would spoil a live autograd graph that saved the tensor.
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  an empty cell raises
    except ValueError:
        return False
    return True


def _identities(container: Any) -> list[int]:
    entries = (*container, *container.values()) if isinstance(container, dict) else container
    return [id(entry) for entry in entries]


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
