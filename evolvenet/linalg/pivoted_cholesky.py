"""Pivoted Cholesky factorization: which columns of a positive semi-definite matrix to keep, and what each of them adds."""

# scipy has no stubs.
# pyright: reportUnknownVariableType=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

from torch import Tensor

RESIDUE = 1e-12
"""Share of the trace below which the remaining diagonal is rounding."""


def pivoted_cholesky(matrix: Tensor) -> tuple[list[int], list[float]]:
    """The pivots of a Cholesky factorization: each next one has the largest diagonal entry of the remaining Schur complement.

    For a matrix of second moments of units this entry is the squared error of the best linear prediction of the unit from
    the units taken before it. Its values bracket the eigenvalues as those of a pivoted QR factorization bracket the singular
    values, and the first m of them are those of the m units that they belong to: they do not change when the other units go.
    Eigenvalues do.
    From Harbrecht, Peters and Schneider, "On the low-rank approximation by the pivoted Cholesky decomposition", Applied
    Numerical Mathematics 62(4), 2012, algorithm 1; computed by LAPACK's dpstrf (Lucas, "LAPACK-style codes for pivoted Cholesky
    and QR updating", LNCS 4699, 2007).

    Args:
        matrix: `[n, n]` positive semidefinite, float64, on the CPU.

    Returns:
        The units in the order in which they are taken, and the entry of each, descending; fewer than n if nothing but rounding
        was left.

    >>> import torch
    >>> pivoted_cholesky(torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]]).double())
    ([0, 2], [4.0, 1.0])
    """
    floor = RESIDUE * float(matrix.trace())
    if not len(matrix) or floor <= 0:
        return [], []
    # Takes a while to import.
    from scipy.linalg import lapack

    # Transposed it is the same matrix, in the order of entries that LAPACK takes.
    factor, order, rank, status = lapack.dpstrf(matrix.numpy().T, lower=1, tol=floor)
    assert status >= 0, f"dpstrf: argument {-status} is invalid"
    entries = factor.diagonal()[:rank] ** 2
    return [int(unit) - 1 for unit in order[:rank]], [float(entry) for entry in entries]


def pivots(matrix: Tensor, count: int) -> list[int]:
    """The first units of `pivoted_cholesky`.

    Args:
        matrix: `[n, n]` positive semidefinite, float64, on the CPU.
        count: most units to take.

    Returns:
        Indices of the units taken, in order; fewer than `count` if nothing but rounding was left.

    >>> import torch
    >>> pivots(torch.diag(torch.tensor([1.0, 3.0, 2.0])).double(), 2)
    [1, 2]
    """
    return pivoted_cholesky(matrix)[0][:count]
