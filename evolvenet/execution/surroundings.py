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


def autocast_devices() -> list[str]:
    """The kinds of devices for which autocast is on.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_devices()
    ['cpu']
    """
    return [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
