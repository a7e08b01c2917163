"""A model's stand-in for trials: shadow tensors in the real modules, and everything put back afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from evolvenet.errors import TraceError
from evolvenet.execution.state_guard import untouched
from evolvenet.surgery.module_handlers import refresh


@contextmanager
def sandbox(model: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Exchange every parameter and buffer for a shadow; on leaving, put back all attributes of all modules.

    A deep copy would fail on modules that hold what cannot be copied (a trainer, locks, files) and doubles the memory;
    an undo log does neither: see `untouched` for what it covers.

    Args:
        model: any module.
        device: "meta" for shadows without data, None for copies on the tensors' own devices.

    Raises:
        TraceError: if the model still has lazy parameters, or holds a scripted module.
    """
    modules = list(model.modules())
    _refuse_scripted(modules)
    shadows: dict[int, Tensor] = {}
    with untouched(model):
        for module in modules:
            for table in _tables(module):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = shadows.setdefault(id(tensor), _shadow(tensor, device))
            refresh(module)
        yield


@contextmanager
def op_by_op() -> Iterator[None]:
    """Eager, without gradients, and without attention's fast path: a dispatch mode sees every op of a model."""
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


def forget_compiled() -> None:
    """After some eight shapes a compiled module would run eagerly for good: its compiled code starts anew."""
    # Importing dynamo takes seconds, and what never imported it has compiled nothing.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _refuse_scripted(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"Expected modules in Python, got a scripted {module.original_name}: its code cannot take other widths. "
                "Build the network from the Python modules and script it once its widths are settled."
            )


def _shadow(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    if is_lazy(tensor):
        raise TraceError(
            "Expected parameters with shapes, got a lazy one. Run the model once on a batch before tracing it."
        )
    # Whole numbers are indices, whose values decide what is tied to what.
    without_data = device is not None and tensor.is_floating_point()
    with torch.no_grad():
        value = tensor.detach().to(device) if without_data else tensor.detach().clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
