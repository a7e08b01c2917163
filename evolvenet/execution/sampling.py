"""The number of samples in a batch, and indices of evenly spaced ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evolvenet._compat.torch import tree_leaves

GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio modulo 1 have no common period with any grid."""


def samples_in(batch: Any) -> int:
    """Length of the first axis of the first tensor in a batch; 1 if there is none.

    >>> samples_in({"x": torch.zeros(5, 3)})
    5
    """
    lengths = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return lengths[0] if lengths else 1


def evenly(count: int, cap: int) -> Tensor:
    """At most `cap` of the indices `0 … count − 1`, one from each of `cap` equal parts, at positions without a period."""
    if count <= cap:
        return torch.arange(count)
    edges = torch.arange(cap + 1) * count // cap
    shift = (torch.arange(cap, dtype=torch.float64) * GOLDEN) % 1
    return edges[:-1] + (shift * edges.diff()).long()
