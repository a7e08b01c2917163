"""Numbers in double precision on the devices that have it, elsewhere on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device | str) -> bool:
    """Whether a device computes in float64; MPS does not.

    >>> has_float64("cpu")
    True
    """
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # TypeError is what MPS raises.
        return False
    return True


def in_float64(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A tensor in float64, a complex one in complex128.

    Args:
        tensor: of any type, on any device.
        device: where the result is; None for the tensor's own device if it has float64, else the CPU.

    >>> in_float64(torch.ones(2)).dtype, in_float64(torch.ones(2, dtype=torch.complex64), "cpu").dtype
    (torch.float64, torch.complex128)
    """
    if device is None:
        device = tensor.device if has_float64(tensor.device) else "cpu"
    # Moved first, then cast: MPS casts a tensor that is on its way to the CPU before the move, and raises.
    return tensor.to(device).to(torch.promote_types(tensor.dtype, torch.float64))
