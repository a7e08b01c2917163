"""The coordinates between two linear maps in which each one is a singular direction of their product.

Between z = A·x and B·z any invertible R gives the same product: (B·R⁻¹)·(R·A). With S = E[z·zᵀ] and G = BᵀB, leaving out
a part of z costs tr(G·S) of that part, and the best choice of a rank q are the first q eigenvectors of S^½·G·S^½: the
truncated SVD of the outputs (Eckart and Young 1936, in the metric of the inputs).
"""

# The functions of torch.linalg have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evolvenet.linalg.decompositions import roots

EXACT = 1e-14
"""Floor of the eigenvalues of BᵀB, which is computed from weights in float64, see `roots`."""

WEAKEST = 1e-4
"""Share of the strongest coordinate's |row|·|column| below which `balanced` leaves the row longer than the column."""

DEAD = 1e-10
"""Share of the longest row below which a row is 0 up to rounding."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Coordinates R·z, ordered by singular value.

    Args:
        matrix: R, `[n, n]` float64.
        inverse: R⁻¹.
    """

    matrix: Tensor
    inverse: Tensor

    def of_moment(self, moment: Tensor) -> Tensor:
        """The second moment of the new coordinates, R·S·Rᵀ."""
        return self.matrix @ moment @ self.matrix.mT

    def of_gram(self, gram: Tensor) -> Tensor:
        """The products of the columns that the new coordinates are multiplied with, R⁻ᵀ·G·R⁻¹."""
        return self.inverse.mT @ gram @ self.inverse


def singular_basis(moment: Tensor, gram: Tensor) -> Basis:
    """The coordinates in which G is the identity and S diagonal, descending.

    With G = Q·Q and Q·S·Q = Y·Λ·Yᵀ they are Yᵀ·Q·z. S is not inverted: it may come from few samples, or inputs that are
    always 0. Directions that B does not use have eigenvalues of G at the floor.

    Args:
        moment: S, `[n, n]` float64, symmetric, positive semidefinite.
        gram: G, likewise.

    >>> basis = singular_basis(torch.diag(torch.tensor([1.0, 9.0])).double(), torch.eye(2).double())
    >>> basis.of_moment(torch.diag(torch.tensor([1.0, 9.0])).double()).diagonal()
    tensor([9., 1.], dtype=torch.float64)
    """
    root, inverse = roots(gram, EXACT)
    inner = root @ moment @ root
    vectors = torch.linalg.eigh((inner + inner.mT) / 2).eigenvectors.flip(-1)
    return Basis(vectors.mT @ root, inverse @ vectors)


def balanced(basis: Basis, made: Tensor, used: Tensor) -> Basis:
    """The same directions, scaled so that the row that makes each coordinate is as long as the column that uses it.

    Gradients of both factors are then of the same size. A coordinate that is hardly used, or not yet, keeps a row of a
    hundredth (√`WEAKEST`) of the longest.

    Args:
        basis: any.
        made: `[n, n]` products of the rows of A in the old coordinates, A·Aᵀ.
        used: `[n, n]` products of the columns of B, BᵀB.

    >>> one, two = torch.eye(1).double(), torch.full((1, 1), 16.0).double()
    >>> balanced(Basis(one, one), one, two).matrix
    tensor([[2.]], dtype=torch.float64)
    """
    rows, columns = (each.diagonal().clamp_min(0).sqrt() for each in (basis.of_moment(made), basis.of_gram(used)))
    strength = rows * columns
    length = strength.clamp_min(WEAKEST * float(strength.max())).sqrt()
    by_row = torch.where(rows > DEAD * rows.max(), length / rows, columns / length)
    scale = torch.where(by_row.isfinite() & (by_row > 0), by_row, 1.0)
    return Basis(scale[:, None] * basis.matrix, basis.inverse / scale)


def singular_values_between(moment: Tensor, gram: Tensor) -> Tensor:
    """Singular values of B·S^½, `[n]`, descending, for S and G = BᵀB; those below 1e-8 of the largest are rounding.

    >>> singular_values_between(torch.diag(torch.tensor([1.0, 9.0])).double(), torch.eye(2).double())
    tensor([3., 1.], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    root = vectors * values.clamp_min(0).sqrt()
    inner = root.mT @ gram @ root
    return torch.linalg.eigvalsh((inner + inner.mT) / 2).flip(0).clamp_min(0).sqrt()
