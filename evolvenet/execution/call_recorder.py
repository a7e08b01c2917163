"""What a network is called with in training, and what the loss asks of its answers: heard by hooks that soon go again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evolvenet.execution.inputs import bound, tensors_of

NUMBERS = 2**20
"""Most numbers of an output's gradient that are kept of one call: of a large output, the first samples."""


@dataclass
class _Call:
    """One call: what with, and the gradients of what it answered, which come with the backward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: list[Tensor | None] = field(default_factory=list)

    def answered(self, result: Any) -> None:
        """Wait for the gradient of every tensor in the result."""
        answers = tensors_of(result)
        self.gradients = [None] * len(answers)
        most = max((tensor[:1].numel() for tensor in answers if tensor.dim()), default=1)
        for place, answer in enumerate(answers):
            if answer.requires_grad and answer.dim():
                answer.register_hook(partial(self._keep, place, NUMBERS // max(most, 1)))

    def _keep(self, place: int, samples: int, gradient: Tensor) -> None:
        # A training step may go backward more than once.
        part, before = gradient.detach()[:samples], self.gradients[place]
        self.gradients[place] = part.clone() if before is None else before + part


class CallRecorder:
    """Keeps the inputs of the calls of some modules that are made in training, and the gradients of what they answer.

    Those are the calls in training mode; where `outer` is given, also those of a module in eval mode through which
    gradients may flow (frozen norms, say), but none while `outer` itself is in eval mode, as in validation.

    Args:
        modules: what to listen to, by name.
        most: calls that are kept of each, the last ones.
        outer: the module whose mode tells training from validation.

    >>> layer = nn.Linear(2, 1)
    >>> listener = CallRecorder({"layer": layer})
    >>> _ = layer(torch.zeros(3, 2))
    >>> listener.close()
    >>> _ = layer(torch.zeros(4, 2))
    >>> [inputs.shape for inputs in listener.heard("layer")]
    [torch.Size([3, 2])]
    """

    def __init__(self, modules: Mapping[str, nn.Module], most: int = 8, outer: nn.Module | None = None) -> None:
        self._modules = dict(modules)
        self._calls: dict[str, deque[_Call]] = {name: deque(maxlen=most) for name in modules}
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            ear = _Ear(self._calls[name], outer)
            self._handles.append(module.register_forward_pre_hook(ear, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_Answer(ear)))

    @property
    def names(self) -> list[str]:
        """Those that were called."""
        return [name for name, calls in self._calls.items() if calls]

    def heard(self, name: str) -> list[Any]:
        """The inputs of each call, as one tensor, a tuple of arguments or a dict of keyword arguments."""
        return [bound(self._modules[name], call.args, call.kwargs) for call in self._calls[name]]

    def calls(self, name: str) -> list[tuple[Any, list[Tensor | None]]]:
        """Of each call the inputs, and the loss's gradients at the tensors of its answer as far as they are known by now."""
        return list(zip(self.heard(name), [list(call.gradients) for call in self._calls[name]], strict=True))

    def close(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Ear:
    """A forward pre-hook that keeps calls; one that was copied or unpickled with its module keeps none."""

    def __init__(self, calls: deque[_Call] | None = None, outer: nn.Module | None = None) -> None:
        self.calls, self.outer = calls, outer
        self.waiting: _Call | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.waiting = None
        training = module.training
        if self.outer is not None:
            training = self.outer.training and (training or torch.is_grad_enabled())
        # Nothing but a queue is touched where code is compiled, so that it runs without a break in its graph.
        if training and self.calls is not None and (torch.compiler.is_compiling() or not _redirected(module)):
            self.waiting = _Call(args, kwargs)
            self.calls.append(self.waiting)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Ear, ()


class _Answer:
    """A forward hook that adds to the call that an ear has just heard what came of it."""

    def __init__(self, ear: _Ear | None = None) -> None:
        self.ear = ear

    def __call__(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        # Inside of compiled code there is no tensor to wait for.
        if self.ear is not None and self.ear.waiting is not None and not torch.compiler.is_compiling():
            self.ear.waiting.answered(result)
            self.ear.waiting = None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Answer, ()


def _redirected(module: nn.Module) -> bool:
    """Whether a wrapper calls another method of the module through its forward, as Lightning does with training_step."""
    return getattr(module.__dict__.get("forward"), "__name__", "") == "wrapped_forward"
