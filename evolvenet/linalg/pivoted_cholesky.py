"""Pivoted Cholesky factorization: which columns of a positive semi-definite matrix to keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESIDUE = 1e-12
"""Share of the energy below which what is left of the units is rounding, and says no more about which to keep."""


def pivots(matrix: Tensor, blocks: Sequence[Sequence[int]], count: int) -> list[int]:
    """Blocks of units by pivoted Cholesky: each next one has the most energy that those before it do not explain.

    Args:
        matrix: `[n, n]` positive semidefinite.
        blocks: the units that come together.
        count: most blocks to take.

    Returns:
        Indices of the blocks taken, in order; fewer than `count` if nothing but rounding was left.

    >>> pivots(torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]]), [[0], [1], [2]], 3)
    [0, 2]
    """
    left = matrix.diagonal().clone()
    floor = RESIDUE * float(left.sum())
    members = torch.zeros(len(blocks), len(matrix), dtype=matrix.dtype)
    for row, block in enumerate(blocks):
        members[row, list(block)] = 1
    factor = torch.zeros(len(matrix), len(matrix), dtype=matrix.dtype)
    taken: list[int] = []
    rank = 0
    while len(taken) < count:
        energy = members @ left
        energy[taken] = -1
        best = int(energy.argmax())
        if energy[best] <= floor:
            break
        taken.append(best)
        for unit in blocks[best]:
            if left[unit] > floor / len(matrix):
                column = matrix[:, unit] - factor[:, :rank] @ factor[unit, :rank]
                factor[:, rank] = column / left[unit].sqrt()
                left = (left - factor[:, rank].square()).clamp_min(0)
                left[unit] = 0
                rank += 1
    return taken
