"""Pivoted Cholesky factorization: which columns of a positive semi-definite matrix to keep."""

from __future__ import annotations

import torch
from torch import Tensor

RESIDUE = 1e-12
"""Share of the trace below which the remaining diagonal is rounding."""


def pivots(matrix: Tensor, count: int) -> list[int]:
    """Pivots of a Cholesky factorization: each next one has the largest diagonal entry of the remaining Schur complement.

    For a matrix of second moments of units this entry is the squared error of the best linear prediction of the unit from
    the units taken before it.
    From Harbrecht, Peters and Schneider, "On the low-rank approximation by the pivoted Cholesky decomposition", Applied
    Numerical Mathematics 62(4), 2012, algorithm 1.

    Args:
        matrix: `[n, n]` positive semidefinite.
        count: most units to take.

    Returns:
        Indices of the units taken, in order; fewer than `count` if nothing but rounding was left.

    >>> pivots(torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]]), 3)
    [0, 2]
    """
    left = matrix.diagonal().clone()
    floor = RESIDUE * float(left.sum())
    factor = torch.zeros(len(matrix), len(matrix), dtype=matrix.dtype)
    taken: list[int] = []
    for rank in range(count):
        energy = left.clone()
        energy[taken] = -1
        unit = int(energy.argmax())
        if energy[unit] <= floor:
            break
        taken.append(unit)
        column = matrix[:, unit] - factor[:, :rank] @ factor[unit, :rank]
        factor[:, rank] = column / left[unit].sqrt()
        left = (left - factor[:, rank].square()).clamp_min(0)
        left[unit] = 0
    return taken
