"""The number of samples in a batch, and indices of evenly spaced ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
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


def held_out(counts: Sequence[int]) -> Tensor:
    """Which samples of some batches are held out from a fit: every second batch, or the second half of a single one.

    Samples of one batch may have one source, as crops of a photo or windows of a recording do: a fit that is tested on
    every second sample of it is tested on what it was fitted on.

    Args:
        counts: samples of each batch.

    Returns:
        `[samples]` booleans.

    >>> held_out([2, 1, 2]).tolist(), held_out([3, 0]).tolist()
    ([False, False, True, False, False], [False, False, True])
    """
    counts = [count for count in counts if count]
    if len(counts) < 2:
        total = sum(counts)
        return torch.arange(total, device="cpu") >= (total + 1) // 2
    return torch.repeat_interleave(torch.arange(len(counts), device="cpu") % 2 == 1, torch.tensor(counts, device="cpu"))


def in_halves(batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Each batch with `held_out` of its samples; no more than two with samples are kept at a time."""
    rest, first = iter(batches), list[Any]()
    while sum(samples_in(batch) > 0 for batch in first) < 2:
        following = list(islice(rest, 1))
        if not following:
            counts = [samples_in(batch) for batch in first]
            yield from zip(first, held_out(counts).split(counts), strict=True)
            return
        first += following
    number = 0
    for batch in chain(first, rest):
        yield batch, torch.full((samples_in(batch),), number % 2 == 1, device="cpu")
        number += samples_in(batch) > 0


def evenly(count: int, cap: int) -> Tensor:
    """At most `cap` of the indices `0 … count − 1`, one from each of `cap` equal parts, at positions without a period."""
    if count <= cap:
        return torch.arange(count, device="cpu")
    edges = torch.arange(cap + 1, device="cpu") * count // cap
    shift = (torch.arange(cap, dtype=torch.float64, device="cpu") * GOLDEN) % 1
    return edges[:-1] + (shift * edges.diff()).long()
