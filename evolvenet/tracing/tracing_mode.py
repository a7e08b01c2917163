"""Forward passes under a dispatch mode that sees every op of a model, with the path of the module that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from evolvenet._compat.torch import TorchDispatchMode, torch_functions_on, tree_map_only
from evolvenet.execution.isolation import op_by_op
from evolvenet.execution.own_gradients import own_gradients
from evolvenet.execution.step import run_model


def _batch_norm_shapes(source: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm on a meta tensor, without the dozens of ops that PyTorch runs to find the shapes of its outputs."""
    channels = source.shape[1]
    for tensor in others[:4]:
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise RuntimeError(f"batch norm of {channels} channels with a parameter of shape {tuple(tensor.shape)}")
    return torch.empty_like(source), source.new_empty(channels), source.new_empty(channels)


META_SHORTCUTS = {torch.ops.aten.native_batch_norm.default: _batch_norm_shapes}
"""Ops that are slow on meta tensors, with a faster implementation."""


def _check_slices(target: Tensor, dim: int, index: Tensor, source: Tensor, *others: Any) -> None:
    """The source of `index_add` has the target's shape, but for as many slices as the index has entries."""
    expected = list(target.shape)
    expected[dim] = index.numel()
    if list(source.shape) != expected:
        raise RuntimeError(f"slices of {list(source.shape)} written to {list(target.shape)}: expected {expected}")


def _check_values(target: Tensor, indices: Sequence[Tensor | None], values: Tensor, *others: Any) -> None:
    """The values of `index_put` broadcast to what the indices pick."""
    values.expand(torch.ops.aten.index.Tensor(target, indices).shape)


META_CHECKS = {
    torch.ops.aten.index_add.default: _check_slices,
    torch.ops.aten.index_add_.default: _check_slices,
    torch.ops.aten.index_reduce.default: _check_slices,
    torch.ops.aten.index_reduce_.default: _check_slices,
    torch.ops.aten.index_put.default: _check_values,
    torch.ops.aten.index_put_.default: _check_values,
}
"""Ops that take any shapes on meta tensors, with what they check on others."""


class TracingMode(TorchDispatchMode):
    """Runs every op unchanged.

    Attributes:
        names: path of every module by its `id`.
        path: path and type of the modules that are running while the mode is active, the innermost one last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.path: list[str] = []
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
        shortcut = META_SHORTCUTS.get(func)
        if shortcut is not None and args[0].is_meta:
            return shortcut(*args)
        if func in META_CHECKS and args[0].is_meta:
            META_CHECKS[func](*args)
        return func(*args, **(kwargs or {}))

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
    # A model may write into its inputs; those on another device are copies anyway.
    inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs) if device is None else example_inputs
    model.train(training)
    mode.names = {id(module): name for name, module in model.named_modules()}
    try:
        with op_by_op(mode, fused=False), own_gradients(mode.on_gradients), torch_functions_on():
            return run_model(model, inputs, device)
    except ValueError:
        if not training:
            raise
    with op_by_op(mode, fused=False), own_gradients(mode.on_gradients), torch_functions_on():
        return run_model(model, _doubled(inputs), device)


def _doubled(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, inputs)
