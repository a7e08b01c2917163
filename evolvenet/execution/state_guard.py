"""The Python state that a run of a model may change, saved so that it can be restored."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import TENSOR_TABLES, forward_hooks, version_of

_CONTAINERS = frozenset({list, dict, OrderedDict, defaultdict, set, deque})
_LARGEST = 2**20
"""Entries of a tensor attribute that is saved: counts and sums are smaller, and larger ones (data sets) are not written to."""
_NO_STATE = (type, ModuleType, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)


class SavedState:
    """What the model's code may have written, as it is now.

    That is: the attributes of the model's modules, the entries of lists, dicts and sets among them and of those nested in
    these, tensors written in place (parameters aside), and whatever the forward hooks reach (their closures, the objects
    they are bound to, globals that they name).

    Args:
        model: any module.
        with_buffers: whether the values of buffers are saved too.
        others: objects whose attributes are saved as those of the model's modules are.

    >>> layer = nn.ReLU()
    >>> seen = []
    >>> handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    >>> state = SavedState(layer, with_buffers=True)
    >>> _ = layer(torch.zeros(1))
    >>> state.restore()
    >>> seen
    []
    """

    def __init__(self, model: nn.Module, with_buffers: bool, others: Iterable[Any] = ()) -> None:
        self._seen: set[int] = set()
        self._kept_alive: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._inference: list[tuple[Tensor, Tensor]] = []
        modules = list(model.modules())
        for buffer in model.buffers() if with_buffers else ():
            self._save_tensor(buffer)
        for module in modules:
            self._save(module)
        for module in modules:
            for hook in forward_hooks(module):
                self._save_hook(hook)
        for other in others:
            self._save(other)

    def is_unchanged(self) -> bool:
        """Whether all of it is as it was."""
        with torch.inference_mode():
            return (
                all(_is_same(container, entries) for container, entries in self._containers)
                and all(cell.cell_contents is value for cell, value in self._cells)
                and all(version_of(tensor) == version for tensor, version, _ in self._tensors)
                and all(tensor.is_meta or torch.equal(tensor, value) for tensor, value in self._inference)
            )

    def restore(self) -> None:
        """Write back what has changed since."""
        for container, entries in self._containers:
            if _is_same(container, entries):
                continue
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(entries)
        for cell, value in self._cells:
            if cell.cell_contents is not value:
                cell.cell_contents = value
        for tensor, version, value in self._tensors:
            # Written only if it changed: a write would invalidate a live autograd graph that saved the tensor.
            if version_of(tensor) != version:
                with torch.no_grad():
                    tensor.copy_(value)
        with torch.inference_mode():
            for tensor, value in self._inference:
                if not tensor.is_meta and not torch.equal(tensor, value):
                    tensor.copy_(value)

    def _save(self, thing: Any, depth: int = 2) -> None:
        """Save a module or other object, a container or a tensor; containers are followed `depth` deep."""
        if id(thing) in self._seen:
            return
        if type(thing) in _CONTAINERS:
            self._mark_seen(thing)
            # Their own copy(): copy.copy goes through pickling, a third of a trial's time for a deep model.
            self._containers.append((thing, thing.copy()))
            if depth:
                self._save_entries(thing.values() if isinstance(thing, dict) else thing, depth - 1)
        elif isinstance(thing, Tensor):
            if not isinstance(thing, nn.Parameter) and thing.numel() <= _LARGEST:
                self._save_tensor(thing)
        elif isinstance(thing, _NO_STATE):
            return
        elif isinstance(getattr(thing, "__dict__", None), dict):
            self._mark_seen(thing)
            self._containers.append((thing.__dict__, dict(thing.__dict__)))
            tables = TENSOR_TABLES if isinstance(thing, nn.Module) else ()
            for name in tables:
                self._save(thing.__dict__[name], 0)
            self._save_entries((value for name, value in thing.__dict__.items() if name not in tables), depth)

    def _save_tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._seen:
            return
        self._mark_seen(tensor)
        if tensor.is_inference():
            # It has no version, and outside of that mode an op that writes to it raises when it has already written.
            self._inference.append((tensor, tensor.detach().clone()))
        else:
            self._tensors.append((tensor, version_of(tensor), tensor.detach().clone()))

    def _save_entries(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if type(value) in _CONTAINERS:
                if value:
                    self._save(value, depth)
                elif id(value) not in self._seen:
                    # Most containers of a module are its hooks', and empty.
                    self._mark_seen(value)
                    self._containers.append((value, ()))
            elif isinstance(value, Tensor):
                self._save(value, depth)

    def _mark_seen(self, thing: Any) -> None:
        self._seen.add(id(thing))
        # An id is only unique as long as its object is alive.
        self._kept_alive.append(thing)

    def _save_hook(self, hook: Callable[..., Any]) -> None:
        """Save what a function refers to."""
        if isinstance(hook, partial):
            self._save_hook(hook.func)
            referred = [*hook.args, *hook.keywords.values()]
        elif isinstance(hook, MethodType):
            self._save_hook(hook.__func__)
            referred = [hook.__self__]
        elif isinstance(hook, FunctionType):
            cells = [cell for cell in hook.__closure__ or () if _is_filled(cell)]
            self._cells += [(cell, cell.cell_contents) for cell in cells]
            named = [hook.__globals__.get(name) for name in hook.__code__.co_names]
            referred = [*(cell.cell_contents for cell in cells), *named, *(hook.__defaults__ or ())]
        else:
            referred = [hook]
        for thing in referred:
            self._save(thing)


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  an empty cell raises
    except ValueError:
        return False
    return True


def _is_same(container: Any, entries: Any) -> bool:
    """Whether a container holds the same objects in the same order."""
    if len(container) != len(entries) or not all(map(is_, container, entries)):
        return False
    return not isinstance(container, dict) or not entries or all(map(is_, container.values(), entries.values()))
