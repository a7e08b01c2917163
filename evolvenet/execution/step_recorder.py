"""Records the batches of training steps, with the gradients of the loss at what the networks in them return."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from evolvenet.execution.call_recorder import OutputGradients
from evolvenet.execution.inputs import copied


class StepRecorder:
    """Keeps the last batches, each with the gradients at the outputs of the outermost modules that its step calls.

    The outputs are those that `evolvenet.execution.step.network_outputs` returns for the same step, in the same order.

    Args:
        model: whose modules count.
        most: batches that are kept.

    >>> import torch
    >>> nets = nn.ModuleDict({"one": nn.Linear(2, 3), "two": nn.Linear(3, 1)})
    >>> recorder = StepRecorder(nets, most=1)
    >>> recorder.begin(torch.ones(4, 2))
    >>> nets["two"](nets["one"](torch.ones(4, 2))).sum().backward()
    >>> recorder.end()
    >>> ((batch, gradients),) = recorder.calls()
    >>> [tuple(gradient.shape) for gradient in gradients]
    [(4, 3), (4, 1)]
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self._own = {id(module) for module in model.modules()}
        self._kept: deque[tuple[Any, list[OutputGradients]]] = deque(maxlen=most)
        self._handles: list[RemovableHandle] = []
        self._depth = 0

    def calls(self) -> list[tuple[Any, list[Tensor | None]]]:
        """Of each step the batch and the gradients as far as backward passes have computed them."""
        return [(batch, [g for call in calls for g in call.gradients]) for batch, calls in self._kept]

    def begin(self, batch: Any) -> None:
        """A training step on this batch begins."""
        self.end()
        self._kept.append((copied(batch), []))
        self._depth = 0
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def end(self) -> None:
        """The training step is over; no hook is left."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += id(module) in self._own

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._own:
            self._depth -= 1
            if self._depth == 0 and self._kept:
                self._kept[-1][1].append(OutputGradients.of(output))
