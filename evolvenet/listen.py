"""What a network is called with while it trains: heard by hooks that are there only as long as they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from evolvenet.inputs import bound


class Listener:
    """Keeps the inputs of the calls of some modules that are made in training.

    Those are the calls in training mode; where `outer` is given, also those of a module in eval mode through which
    gradients may flow (frozen norms, say), but none while `outer` itself is in eval mode, as in validation.

    Args:
        modules: what to listen to, by name.
        most: calls that are kept of each, the last ones.
        outer: the module whose mode tells training from validation.

    >>> layer = nn.Linear(2, 1)
    >>> listener = Listener({"layer": layer})
    >>> _ = layer(torch.zeros(3, 2))
    >>> listener.close()
    >>> _ = layer(torch.zeros(4, 2))
    >>> [inputs.shape for inputs in listener.heard("layer")]
    [torch.Size([3, 2])]
    """

    def __init__(self, modules: Mapping[str, nn.Module], most: int = 8, outer: nn.Module | None = None) -> None:
        self._modules = dict(modules)
        self._calls: dict[str, deque[tuple[Any, Any]]] = {name: deque(maxlen=most) for name in modules}
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(_Ear(self._calls[name], outer), with_kwargs=True)
            for name, module in modules.items()
        ]

    @property
    def names(self) -> list[str]:
        """Those that were called."""
        return [name for name, calls in self._calls.items() if calls]

    def heard(self, name: str) -> list[Any]:
        """The inputs of each call, as one tensor, a tuple of arguments or a dict of keyword arguments."""
        return [bound(self._modules[name], args, kwargs) for args, kwargs in self._calls[name]]

    def close(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Ear:
    """A forward pre-hook that keeps calls; one that was copied or unpickled with its module keeps none."""

    def __init__(self, calls: deque[tuple[Any, Any]] | None = None, outer: nn.Module | None = None) -> None:
        self.calls, self.outer = calls, outer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        training = module.training
        if self.outer is not None:
            training = self.outer.training and (training or torch.is_grad_enabled())
        # Nothing but a queue is touched where code is compiled, so that it runs without a break in its graph.
        if training and self.calls is not None and (torch.compiler.is_compiling() or not _redirected(module)):
            self.calls.append((args, kwargs))

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Ear, ()


def _redirected(module: nn.Module) -> bool:
    """Whether a wrapper calls another method of the module through its forward, as Lightning does with training_step."""
    return getattr(module.__dict__.get("forward"), "__name__", "") == "wrapped_forward"
