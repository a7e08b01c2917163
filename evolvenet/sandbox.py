"""A model's stand-in for trials: shadow tensors in the real modules, and everything put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from evolvenet.errors import TraceError
from evolvenet.layers import refresh


@contextmanager
def sandbox(model: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Exchange every parameter and buffer for a shadow; on leaving, put back all attributes of all modules.

    A deep copy would fail on modules that hold what cannot be copied (a trainer, locks, files) and doubles the memory;
    an undo log does neither.

    Args:
        model: any module.
        device: "meta" for shadows without data, None for copies on the tensors' own devices.

    Raises:
        TraceError: if the model still has lazy parameters.
    """
    modules = list(model.modules())
    saved = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in modules]
    shadows: dict[int, Tensor] = {}
    try:
        for module in modules:
            for table in _tables(module):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = shadows.setdefault(id(tensor), _shadow(tensor, device))
            refresh(module)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, attributes, parameters, buffers in saved:
            for name in set(module.__dict__) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for table, entries in zip(_tables(module), (parameters, buffers), strict=True):
                table.clear()
                table.update(entries)


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _shadow(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    if is_lazy(tensor):
        raise TraceError(
            "Expected parameters with shapes, got a lazy one. Run the model once on a batch before tracing it."
        )
    with torch.no_grad():
        value = tensor.detach().to(device) if device is not None else tensor.detach().clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
