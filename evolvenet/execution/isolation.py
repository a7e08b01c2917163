"""Running the user's model without side effects.

`isolated` runs code with the model in eval mode and restores everything that the model's code may write; it can put
shadows in the place of all parameters and buffers, so that a trial may write to them or give them other shapes. `op_by_op`
makes every op of the model visible to a dispatch mode. `model_outputs` uses both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from evolvenet._compat.torch import tensor_tables
from evolvenet.errors import TraceError
from evolvenet.execution.chosen_outputs import counted_outputs
from evolvenet.execution.state_guard import SavedState
from evolvenet.graph.width_graph import ChosenOutputs
from evolvenet.linalg.full_precision import full_precision
from evolvenet.signals import deferred_signals
from evolvenet.surgery.module_handlers import refresh


@contextmanager
def isolated(
    model: nn.Module,
    *,
    shadows: bool = False,
    copied: bool = True,
    device: torch.device | str | None = None,
    gradients: bool = False,
) -> Iterator[None]:
    """The model in eval mode; on leaving, the model, what its hooks reach and the random generators are as before.

    What is restored is listed at `SavedState`; it includes training flags and values of buffers. Parameters are restored
    only with `shadows`. A deep copy would double the memory and fail on modules that hold what cannot be copied (a
    trainer, locks, files).

    Args:
        model: any module.
        shadows: whether every parameter and buffer is replaced by a copy inside.
        copied: False makes the shadows of parameters without a copy of their values, for callers that see to it that
            nothing is written to them in place.
        device: of the shadows; "meta" for shadows without data, None for the tensors' own devices. Integer tensors are
            indices and keep their data and device.
        gradients: whether autograd is on inside, even under `no_grad` or `inference_mode`; off by default.

    Raises:
        TraceError: with `shadows`, if the model has lazy parameters or holds a scripted module.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    >>> weight = model[0].weight
    >>> with isolated(model, shadows=True):
    ...     model.training, model[0].weight is weight
    (False, False)
    >>> model.training, model[0].weight is weight
    (True, True)
    """
    modules = list(model.modules())
    if shadows:
        _refuse_scripted(modules)
    with deferred_signals("a run of the model without side effects"), ExitStack() as stack:
        stack.enter_context(full_precision())
        if any(isinstance(module, nn.RNNBase) for module in modules):
            # cuDNN's recurrent layers hide their products, and have no backward pass in eval mode; PyTorch's own do not.
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        if gradients:
            stack.enter_context(torch.inference_mode(False))
        stack.callback(SavedState(model, with_buffers=not shadows).restore)
        stack.enter_context(random_streams_kept(model))
        for module in modules:
            if type(module).forward is nn.SyncBatchNorm.forward:
                # Its processes would wait for each other in training mode; what it computes is a batch norm.
                vars(module)["forward"] = MethodType(nn.BatchNorm2d.forward, module)
        if shadows:
            _install_shadows(modules, device, copied)
        _make_writable(modules)
        model.eval()
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield


@contextmanager
def op_by_op(mode: AbstractContextManager[Any] | None = None, *, fused: bool = True) -> Iterator[None]:
    """No compiled code and no fast path of `nn.MultiheadAttention`: a dispatch mode sees every op of a model.

    Args:
        mode: the dispatch mode that is active inside, if any.
        fused: False also switches off kernels that hide matrix products or softmaxes: oneDNN's and fused attention.
    """
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not fused:
            stack.callback(torch.backends.mkldnn.set_flags, torch.backends.mkldnn.set_flags(False)[0])
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if mode is not None:
            stack.enter_context(mode)
        yield


def model_outputs(
    model: nn.Module,
    inputs: Any,
    gradients: bool = False,
    outputs: ChosenOutputs = None,
    mode: AbstractContextManager[Any] | None = None,
) -> list[Tensor]:
    """Every tensor among a model's outputs that count, from an `isolated`, uncompiled run, with autograd on if `gradients`.

    `mode` is a dispatch mode around the run.

    >>> model_outputs(nn.Linear(2, 3), torch.zeros(4, 2))[0].shape
    torch.Size([4, 3])
    """
    with isolated(model, gradients=gradients), op_by_op(mode):
        return [tensor.detach() for tensor in counted_outputs(model, inputs, outputs)]


@contextmanager
def random_streams_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, the generators of Python, NumPy, the CPU and every device of the model's tensors are in the same states."""
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for backend, where in _generators(model):
            stack.callback(backend.set_rng_state, backend.get_rng_state(*where), *where)
        yield


def random_streams(model: nn.Module) -> tuple[object, ...]:
    """The states of these generators, to be compared.

    >>> before = random_streams(nn.Identity())
    >>> random_streams(nn.Identity()) == before
    True
    >>> _ = torch.rand(1)
    >>> random_streams(nn.Identity()) == before
    False
    """
    devices = [backend.get_rng_state(*where) for backend, where in _generators(model)]
    states = (each.cpu().numpy().tobytes() for each in (torch.get_rng_state(), *devices))
    _, keys, *rest = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), rest, *states


def _generators(model: nn.Module) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The module of each device of the model's tensors that has generators of its own, and the arguments that name the device."""
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for place in sorted(places, key=str):
        backend: Any = getattr(torch, place.type, None)
        if place.type != "cpu" and hasattr(backend, "get_rng_state"):
            # MPS has one device, and takes none.
            yield backend, () if place.type == "mps" else (place,)


def _install_shadows(modules: list[nn.Module], device: torch.device | str | None, copied: bool) -> None:
    shadows: dict[int, Tensor] = {}
    for module in modules:
        for table in tensor_tables(module):
            for name, tensor in table.items():
                if tensor is not None:
                    # One shadow for each tensor, so that tied parameters stay tied.
                    table[name] = shadows.setdefault(id(tensor), _shadow(tensor, device, copied))
        refresh(module)


def _make_writable(modules: list[nn.Module]) -> None:
    """Copies in the place of tensors made under inference mode, parameters aside: outside of it nothing may write to them."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for table in (vars(module), tensor_tables(module)[1]):
            for name, tensor in table.items():
                if isinstance(tensor, Tensor) and tensor.is_inference():
                    table[name] = copies.setdefault(id(tensor), tensor.clone())


def _refuse_scripted(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"Expected modules in Python, got a scripted {module.original_name}: its code cannot take other widths. "
                "Build the network from the Python modules and script it once its widths are settled."
            )


def _shadow(tensor: Tensor, device: torch.device | str | None, copied: bool) -> Tensor:
    if is_lazy(tensor):
        raise TraceError(
            "Expected parameters with shapes, got a lazy one. Run the model once on a batch before tracing it."
        )
    # Integer tensors are indices, whose values decide which units belong together.
    without_data = device is not None and (tensor.is_floating_point() or tensor.is_complex())
    with torch.no_grad():
        value = tensor.detach()
        if without_data:
            value = value.to(device)
        elif copied or not isinstance(tensor, nn.Parameter):
            value = value.clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
