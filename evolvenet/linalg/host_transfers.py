"""Copies between the host and a device: those to the device never make the host wait, those from it wait once for many tensors.

A wait is a synchronization: the host stops until a device has finished all that it was given, and the device then idles until
the host has given it more.
"""

# `Tensor.split` and `Tensor.tolist` have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

CHUNK = 2**26
"""Most bytes of one copy to the host: on the device, the tensors are put one after the other for it."""


def to_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """A small tensor of the host on a device, without a wait.

    The copy runs in the order of the device's work, from memory that is staged at once, so the tensor may go at any time.
    """
    return tensor if device is None else tensor.to(device, non_blocking=True)


def index_tensor(values: Iterable[int], device: torch.device | str | None = None) -> Tensor:
    """Indices as an int64 tensor on a device, without a wait.

    >>> index_tensor([2, 0])
    tensor([2, 0])
    """
    return to_device(torch.tensor(list(values), dtype=torch.int64, device="cpu"), device)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the CPU, with one wait for as many as `CHUNK` bytes hold; those that are there already stay the same objects.

    >>> given = torch.ones(2)
    >>> to_host([given])[0] is given
    True
    """
    found: list[Tensor] = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[list[int]]] = {}
    bytes_of: dict[tuple[torch.device, torch.dtype], int] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            continue
        key, size = (tensor.device, tensor.dtype), tensor.numel() * tensor.element_size()
        parts = groups.setdefault(key, [[]])
        if parts[-1] and bytes_of[key] + size > CHUNK:
            parts.append([])
            bytes_of[key] = 0
        parts[-1].append(place)
        bytes_of[key] = bytes_of.get(key, 0) + size
    for part in (part for parts in groups.values() for part in parts):
        whole = torch.cat([tensors[place].detach().reshape(-1) for place in part]) if part[1:] else tensors[part[0]]
        pieces = whole.detach().to("cpu").reshape(-1).split([tensors[place].numel() for place in part])
        for place, piece in zip(part, pieces, strict=True):
            # A copy each: a view would keep the whole chunk in memory.
            found[place] = (piece.clone() if part[1:] else piece).reshape(tensors[place].shape)
    return found


def all_true(flags: Sequence[Tensor]) -> bool:
    """Whether all of some flags are true, read with one wait for each device and type.

    >>> all_true([torch.tensor(True), torch.tensor(False)]), all_true([])
    (False, True)
    """
    return all(values_of(flags))


def values_of(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers in tensors of one entry each, read with one wait for each device and type.

    >>> values_of([torch.tensor(1.5), torch.tensor(2.0)])
    [1.5, 2.0]
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, scalar in enumerate(scalars):
        groups.setdefault((scalar.device, scalar.dtype), []).append(place)
    found: list[float] = [0.0] * len(scalars)
    for part in groups.values():
        for place, value in zip(part, torch.stack([scalars[k].reshape(()) for k in part]).tolist(), strict=True):
            found[place] = value
    return found
