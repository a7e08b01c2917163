"""Which modules a run calls, in which order: code that branches at random runs other ones each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.step import run_model

TRIES = 8
"""Runs in train mode that are looked at for another order of calls."""


def runs_until_every_route(model: nn.Module, inputs: Any, tries: int = TRIES) -> int:
    """After how many runs in train mode, each going on with the random numbers, no further order of calls has come up.

    The model runs on copies of its tensors, and the generators are as before afterwards: so that many runs under labels
    take the same routes again.

    Args:
        model: any module.
        inputs: what `run_model` takes.
        tries: runs.

    Returns:
        1 for code that does the same each time; at most `tries`.

    >>> import torch
    >>> runs_until_every_route(nn.Linear(2, 2), torch.zeros(1, 2))
    1
    """
    routes: dict[tuple[int, ...], int] = {}
    with isolated(model, shadows=True), op_by_op():
        model.train()
        for count in range(1, tries + 1):
            with _calls(model) as route:
                run_model(model, inputs)
            routes.setdefault(tuple(route), count)
    return max(routes.values())


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[int]]:
    """The modules of a model as they are called, each as its number in `model.modules()`."""
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
    """Notes which of some modules are called, from now until `close`.

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
        """A module has been called; once is enough."""
        self.called.add(name)
        if name in self._handles:
            self._handles.pop(name).remove()

    def close(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


class _Note:
    """A forward pre-hook; one that was copied or unpickled with its module does nothing."""

    def __init__(self, watch: FirstCalls | None = None, name: str = "") -> None:
        self.watch, self.name = watch, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.watch is not None:
            self.watch.note(self.name)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Note, ()
