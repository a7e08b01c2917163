"""Forward passes under a dispatch mode that sees every op of a model, with the path of the module that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from evolvenet._compat.torch import TorchDispatchMode, autocast_on_meta, torch_functions_on, tree_map_only
from evolvenet.execution.isolation import op_by_op
from evolvenet.execution.own_gradients import own_gradients
from evolvenet.execution.step import run_model
from evolvenet.tracing.meta_ops import META_CHECKS, META_SHORTCUTS
from evolvenet.tracing.meta_values import MetaValues


class TracingMode(TorchDispatchMode):
    """Runs every op unchanged.

    Attributes:
        names: path of every module by its `id`.
        path: path and type of the modules that are running while the mode is active, the innermost one last.
        meta_values: of small tensors, in a run on meta tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.path: list[str] = []
        self.meta_values: MetaValues | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> TracingMode:
        self._hooks.append(register_module_forward_pre_hook(self._enter_module))
        self._hooks.append(register_module_forward_hook(self._leave_module, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for _ in range(2):
            self._hooks.pop().remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        if self.meta_values is not None:
            return self.meta_values.run(func, args, kwargs or {}, partial(_run_op, func))
        return _run_op(func, *args, **(kwargs or {}))

    def on_gradients(
        self,
        outputs: Sequence[Tensor],
        given: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        found: Sequence[Tensor | None],
    ) -> None:
        """Called after each gradient that the model's own code computes, see `own_gradients`."""

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        name = self.names.get(id(module))
        self.path.append(f"{name} ({type(module).__name__})" if name else type(module).__name__)

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.path.pop()


def _run_op(func: Any, /, *args: Any, **kwargs: Any) -> Any:
    shortcut = META_SHORTCUTS.get(func)
    if shortcut is not None and not kwargs:
        found = shortcut(*args)
        if found is not None:
            return found
    if func in META_CHECKS and args[0].is_meta:
        META_CHECKS[func](*args)
    return func(*args, **kwargs)


def run_under_mode(model: nn.Module, example_inputs: Any, device: str | None, training: bool, mode: TracingMode) -> Any:
    """What a model returns in one forward pass under a mode that sees every op.

    Train mode runs with the batch twice if it raises a ValueError (batch norm on one sample).

    Args:
        model: the model, `isolated`.
        example_inputs: as of `trace`; the model gets copies of its tensors.
        device: where the inputs are moved; None to leave them.
        training: whether the model is in train mode.
        mode: the mode.

    >>> run_under_mode(nn.Linear(2, 3), torch.zeros(1, 2), None, False, TracingMode()).shape
    torch.Size([1, 3])
    """
    model.train(training)
    mode.names = {id(module): name for name, module in model.named_modules()}
    try:
        return _run(model, example_inputs, device, mode)
    except ValueError:
        if not training:
            raise
    return _run(model, _doubled(example_inputs), device, mode)


def _run(model: nn.Module, inputs: Any, device: str | None, mode: TracingMode) -> Any:
    meta = device == "meta"
    # A model may write into its inputs; those on another device are copies anyway.
    if device is None:
        inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
    elif meta:
        mode.meta_values = MetaValues()
        inputs = tree_map_only(Tensor, mode.meta_values.without_data, inputs)
    autocast = autocast_on_meta() if meta else nullcontext()
    with autocast, op_by_op(mode, fused=False), own_gradients(mode.on_gradients), torch_functions_on():
        return run_model(model, inputs, device)


def _doubled(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, inputs)
