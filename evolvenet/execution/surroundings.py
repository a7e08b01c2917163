"""The user's model runs alike whatever surrounds the caller: autocast, inference mode, a default device, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from evolvenet._compat.torch import torch_functions_off

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")


@contextmanager
def plain_surroundings(*, autocast: bool = False) -> Iterator[None]:
    """As in a fresh interpreter: no inference mode, no default device, no deterministic algorithms, no autocast.

    Under autocast or with deterministic algorithms PyTorch runs other ops, under inference mode it hides them from a dispatch
    mode, and a default device would hold whatever is computed here. The model's own code may build on a default device: it
    runs under `torch_functions_on`. The default type of new tensors stays for that code as well.

    Args:
        autocast: whether autocast stays as the caller has it.

    >>> with torch.inference_mode(), torch.device("meta"), plain_surroundings():
    ...     torch.is_inference_mode_enabled(), torch.zeros(1).device
    (False, device(type='cpu'))
    """
    with ExitStack() as stack:
        # Leaving inference mode turns gradients on.
        gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch_functions_off())
        if torch.are_deterministic_algorithms_enabled():
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        for device in () if autocast else autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def autocast_without_cache() -> Iterator[None]:
    """Autocast, where the caller has it on, casts a weight whenever it is used; casts from before are forgotten on leaving.

    PyTorch keeps the cast of each weight until the outermost autocast ends. Weights that are changed inside of it would go
    on with their old values, and those that were used without gradients first would get none.

    >>> weight = torch.nn.Parameter(torch.ones(1, 1))
    >>> with torch.autocast("cpu", torch.bfloat16), autocast_without_cache():
    ...     with torch.no_grad():
    ...         _ = torch.ones(1, 1) @ weight
    ...         _ = weight.fill_(2)
    ...     torch.ones(1, 1) @ weight
    tensor([[2.]], dtype=torch.bfloat16, grad_fn=<MmBackward0>)
    """
    with ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False))
            stack.callback(torch.clear_autocast_cache)
        yield


def autocast_devices() -> list[str]:
    """The kinds of devices for which autocast is on.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_devices()
    ['cpu']
    """
    return [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
