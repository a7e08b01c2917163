"""`CallRecorder`: the inputs of modules in training, and the gradients of the loss at their outputs, recorded by hooks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evolvenet.execution.inputs import copied, inputs_of_call, tensors_of

MAX_GRADIENT_ENTRIES = 2**20
"""Entries of an output's gradient that are kept of one call: of a larger output, the first samples."""


@dataclass
class OutputGradients:
    """The gradients of a loss at the tensors of one output, added up over the backward passes of a training step."""

    gradients: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, result: Any) -> OutputGradients:
        """Register a hook for the gradient of every tensor in a module's output."""
        found = cls()
        found.record_gradients(result)
        return found

    def record_gradients(self, result: Any) -> None:
        """Register a hook for the gradient of every tensor in the result."""
        outputs = tensors_of(result)
        self.gradients = [None] * len(outputs)
        largest = max((tensor[:1].numel() for tensor in outputs if tensor.dim()), default=1)
        for index, output in enumerate(outputs):
            if output.requires_grad and output.dim():
                output.register_hook(partial(self._add_gradient, index, MAX_GRADIENT_ENTRIES // max(largest, 1)))

    def _add_gradient(self, index: int, samples: int, gradient: Tensor | None) -> None:
        if torch.is_grad_enabled() or gradient is None:
            # A backward pass that is differentiated itself (a gradient penalty) is a part of the loss, not its gradient.
            # DDP hands on None for outputs that the loss does not use, where it looks for unused parameters.
            return
        # A training step may run several backward passes.
        part, before = gradient.detach()[:samples], self.gradients[index]
        self.gradients[index] = part.clone() if before is None else before + part


@dataclass(kw_only=True)
class _Call(OutputGradients):
    """The arguments of one call, and the gradients at its outputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CallRecorder:
    """Records the inputs of calls of some modules in training, and the gradients of the loss at their outputs.

    Recorded are calls in training mode. Given `outer`, also calls of a module in eval mode with gradients enabled (frozen
    norms, for example), but none while `outer` itself is in eval mode, as in validation.

    Args:
        modules: the modules by name.
        most: number of calls that are kept of each module, the last ones.
        outer: the module whose mode distinguishes training from validation.

    >>> layer = nn.Linear(2, 1)
    >>> recorder = CallRecorder({"layer": layer})
    >>> _ = layer(torch.zeros(3, 2))
    >>> recorder.close()
    >>> _ = layer(torch.zeros(4, 2))
    >>> [inputs.shape for inputs in recorder.inputs("layer")]
    [torch.Size([3, 2])]
    """

    def __init__(self, modules: Mapping[str, nn.Module], most: int = 8, outer: nn.Module | None = None) -> None:
        self._modules = dict(modules)
        self._calls: dict[str, deque[_Call]] = {name: deque(maxlen=most) for name in modules}
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            before = _BeforeCall(self._calls[name], outer)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_AfterCall(before)))

    @property
    def names(self) -> list[str]:
        """Names of the modules that were called."""
        return [name for name, calls in self._calls.items() if calls]

    def inputs(self, name: str) -> list[Any]:
        """The inputs of each call of a module, as one tensor, a tuple of arguments or a dict of keyword arguments."""
        return [inputs_of_call(self._modules[name], call.args, call.kwargs) for call in self._calls[name]]

    def calls(self, name: str) -> list[tuple[Any, list[Tensor | None]]]:
        """(inputs, gradients at the output tensors) of each call; None for gradients not computed so far."""
        return list(zip(self.inputs(name), [list(call.gradients) for call in self._calls[name]], strict=True))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _BeforeCall:
    """A forward pre-hook that adds calls to a queue; a copied or unpickled one has no queue and adds none."""

    def __init__(self, calls: deque[_Call] | None = None, outer: nn.Module | None = None) -> None:
        self.calls, self.outer = calls, outer
        self.current: _Call | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = None
        training = module.training
        if self.outer is not None:
            training = self.outer.training and (training or torch.is_grad_enabled())
        # Nothing but a queue is used where code is compiled, so that its graph does not break.
        if training and self.calls is not None and (torch.compiler.is_compiling() or not _runs_another_method(module)):
            # Loaders may write the next batch into the same memory, and modules may change their inputs.
            kept = (args, kwargs) if torch.compiler.is_compiling() else copied((args, kwargs))
            self.current = _Call(args=kept[0], kwargs=kept[1])
            self.calls.append(self.current)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _BeforeCall, ()


class _AfterCall:
    """A forward hook that records gradients at the outputs of the call that a `_BeforeCall` has just added."""

    def __init__(self, before: _BeforeCall | None = None) -> None:
        self.before = before

    def __call__(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        # Inside compiled code no hook can be registered on a tensor.
        if self.before is not None and self.before.current is not None and not torch.compiler.is_compiling():
            self.before.current.record_gradients(result)
            self.before.current = None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _AfterCall, ()


def _runs_another_method(module: nn.Module) -> bool:
    """Whether a wrapper runs another method through the module's forward, as Lightning does with training_step."""
    return getattr(module.__dict__.get("forward"), "__name__", "") == "wrapped_forward"
