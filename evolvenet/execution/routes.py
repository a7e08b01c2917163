"""The modules that a run of a model calls, and their order, which differs between runs of code with random branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from evolvenet._compat.torch import NormBase, tree_map_only, version_of
from evolvenet.execution.isolation import isolated, op_by_op, random_streams
from evolvenet.execution.own_gradients import GradientsNeededError, own_gradients
from evolvenet.execution.state_guard import SavedState
from evolvenet.execution.step import run_model

TRIES = 8
"""Runs in train mode whose orders of calls are compared."""


def runs_until_every_route(model: nn.Module, inputs: Any, tries: int = TRIES) -> int:
    """The number of runs in train mode, with consecutive random numbers, after which no new order of calls occurs.

    The model runs on copies of its tensors, and the random generators are restored: as many runs under labels make the same
    orders of calls again.

    Args:
        model: any module.
        inputs: what `run_model` takes.
        tries: number of runs.

    Returns:
        1 if all runs call the same modules in the same order; at most `tries`.

    >>> import torch
    >>> runs_until_every_route(nn.Linear(2, 2), torch.zeros(1, 2))
    1
    """
    routes = _routes(model, inputs, tries)
    return max(routes.index(route) for route in routes) + 1


def modules_called(model: nn.Module, inputs: Any) -> frozenset[str]:
    """Names of the modules that a run in train mode calls.

    >>> import torch
    >>> sorted(modules_called(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2)))
    ['', '0']
    """
    (route,) = _routes(model, inputs, 1)
    names = [name for name, _ in model.named_modules()]
    return frozenset(names[number] for number in route)


def _routes(model: nn.Module, inputs: Any, tries: int) -> list[list[int]]:
    """The modules that each run calls, as their numbers in `model.modules()`."""
    try:
        return _recorded(model, inputs, tries, gradients=False)
    except GradientsNeededError:
        return _recorded(model, inputs, tries, gradients=True)


def _recorded(model: nn.Module, inputs: Any, tries: int, gradients: bool) -> list[list[int]]:
    routes: list[list[int]] = []
    with isolated(model, shadows=True, gradients=gradients), op_by_op(), own_gradients():
        # Those of inference mode cannot be differentiated.
        inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
        model.train()
        unchanged = _state(model)
        for _ in range(tries):
            with _calls(model) as route:
                run_model(model, inputs)
            routes.append(route)
            if len(routes) == 1 and unchanged():
                # No random number was drawn, and nothing counts the runs: the others would be like the first one.
                break
    return routes


def _state(model: nn.Module) -> Callable[[], bool]:
    """A function: whether random generators and what the model's code may write are as now, statistics of norms aside."""
    drawn, state = random_streams(model), SavedState(model, with_buffers=False)
    buffers = [
        (buffer, version_of(buffer))
        for module in model.modules()
        for buffer in module.buffers(recurse=False)
        if not isinstance(module, NormBase) and not buffer.is_inference()
    ]

    def is_as_before() -> bool:
        written = any(version_of(buffer) != version for buffer, version in buffers)
        return not written and random_streams(model) == drawn and state.is_unchanged()

    return is_as_before


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[int]]:
    """The list to which every called module is appended, as its index in `model.modules()`."""
    numbers = {id(module): number for number, module in enumerate(model.modules())}
    route: list[int] = []

    def note(module: nn.Module, args: Any) -> None:
        if id(module) in numbers:
            route.append(numbers[id(module)])

    handle = register_module_forward_pre_hook(note)
    try:
        yield route
    finally:
        handle.remove()


class FirstCalls:
    """Records which of some modules are called before `close`.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> watch = FirstCalls({"aux": layer})
    >>> _ = layer(torch.zeros(1, 2))
    >>> watch.called, len(layer._forward_pre_hooks)
    ({'aux'}, 0)
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.called: set[str] = set()
        self._handles: dict[str, RemovableHandle] = {
            name: module.register_forward_pre_hook(_Note(self, name)) for name, module in modules.items()
        }

    def note(self, name: str) -> None:
        """Record that a module was called and remove its hook."""
        self.called.add(name)
        if name in self._handles:
            self._handles.pop(name).remove()

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


class _Note:
    """A forward pre-hook; a copied or unpickled one does nothing."""

    def __init__(self, watch: FirstCalls | None = None, name: str = "") -> None:
        self.watch, self.name = watch, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.watch is not None:
            self.watch.note(self.name)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Note, ()
