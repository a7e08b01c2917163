"""Damaged and edited checkpoints: bytes of a file that are lost or flipped, and entries of a state that are something else."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evolvenet._compat.torch import state_dict_metadata

ODDITIES: Sequence[Any] = (
    None, True, -1, 0, 7, 2**62, -(2**70), 0.5, float("nan"), float("inf"), "text", "", b"bytes",
    [], {}, (), [[[[]]]], {"": {"": {}}}, [None] * 3, {1: 2}, [("a", 1)], torch.zeros(3), torch.zeros(0),
    torch.full((2, 2), float("nan")), torch.zeros(1).expand(2**40), torch.zeros((), dtype=torch.bool),
)  # fmt: skip
"""What stands where something else belongs."""


def damaged(data: bytes, moments: random.Random) -> bytes:
    """A file cut short, with flipped bits, or with a block of zeros."""
    kind, place = moments.randrange(3), moments.randrange(len(data))
    if kind == 0:
        return data[:place]
    changed = bytearray(data)
    if kind == 1:
        for _ in range(moments.choice((1, 4, 64))):
            changed[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    else:
        block = changed[place : place + moments.choice((8, 64, 512))]
        changed[place : place + len(block)] = bytes(len(block))
    return bytes(changed)


def edited(state: Any, moments: random.Random) -> tuple[Any, str]:
    """A copy in which one entry, at any depth, is gone, doubled or something else; and where it is."""
    inside = _inside(state)
    if not inside or (moments.random() < 0.25 and not _is_state(state)):
        return _instead(state, moments), ""
    key = moments.choice(list(inside))
    if isinstance(key, str) and moments.random() < 0.1:
        return _with(state, key, _GONE), f".{key} is gone"
    value, where = edited(inside[key], moments)
    return _with(state, key, value), f".{key}{where}"


_GONE = object()
_METADATA = "its metadata"


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(state_dict_metadata(value))


def _inside(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return {**value, **({_METADATA: state_dict_metadata(value)} if _is_state(value) else {})}
    return dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}


def _with(whole: Any, key: Any, value: Any) -> Any:
    """A copy with another entry."""
    if isinstance(whole, (list, tuple)):
        return type(whole)(value if index == key else entry for index, entry in enumerate(whole))
    copy = whole.copy()
    if key == _METADATA:
        copy._metadata = value if isinstance(value, Mapping) else {"": value}
    elif value is _GONE:
        del copy[key]
    else:
        copy[key] = value
    return copy


def _instead(value: Any, moments: random.Random) -> Any:
    """Something else in the place of a value: an oddity, or for a tensor another shape, type or layout."""
    if not isinstance(value, Tensor) or moments.random() < 0.3:
        return moments.choice(ODDITIES)
    if value.dim() == 0 or moments.random() < 0.3:
        return moments.choice((value.double(), value.to(torch.int8), value.to(torch.complex64), value * float("nan")))
    repeated = value[:1].expand(2**33, *value.shape[1:])
    return moments.choice((value[1:], value[:0], value[None], torch.cat([value, value]), repeated, value.to_sparse()))
