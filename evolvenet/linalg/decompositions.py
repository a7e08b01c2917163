"""Low-rank decompositions of matrices and tensors: truncated SVD, Tucker-2, CP, tensor train; roots of second moments.

Decompositions of tensors are tensorly's.
"""

# The functions of torch.linalg and tensorly have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-6
"""Share of the largest eigenvalue of a second moment below which eigenvalues are raised to it."""

ITERATIONS = 50
"""Most sweeps of alternating least squares."""


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank as a product of two factors, B·A (Eckart and Young 1936).

    The singular values are divided equally between the factors, so that both have gradients of the same size.

    Args:
        matrix: `[m, n]`, float32 or float64.
        rank: 1 … min(m, n).

    Returns:
        (B `[m, rank]`, A `[rank, n]`).

    >>> b, a = truncated_svd(torch.diag(torch.tensor([4.0, 1.0, 0.5])), 2)
    >>> (b @ a).diagonal()
    tensor([4., 1., 0.])
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    half = values[:rank].sqrt()
    return left[:, :rank] * half, half[:, None] * right[:rank]


def roots(moment: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment and its inverse, by eigenvalues.

    Eigenvalues below a share of the largest are raised to that: inputs that are always 0 would have no inverse.

    Args:
        moment: `[n, n]` symmetric, positive semidefinite.
        floor: the share.

    Returns:
        (root, inverse root), `[n, n]` each; identities if the moment is 0.

    >>> root, inverse = roots(torch.diag(torch.tensor([4.0, 9.0])))
    >>> root.diagonal(), (root @ inverse).diagonal()
    (tensor([2., 3.]), tensor([1., 1.]))
    """
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    largest = float(values[-1]) if len(values) else 0.0
    if largest <= 0:
        identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        return identity, identity
    scale = values.clamp_min(floor * largest).sqrt()
    return (vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT


def principal_outputs(matrix: Tensor, moment: Tensor) -> Tensor:
    """Orthonormal directions of a layer's outputs, the one of the most energy first: eigenvectors of W·S·Wᵀ.

    Projecting the outputs on the first r of them is the best layer of rank r for inputs of this second moment: the one of
    the least E‖Ŵx − Wx‖² (Zhang, Zou, He and Sun, "Accelerating very deep convolutional networks", TPAMI 2016).

    Args:
        matrix: W, `[m, n]`.
        moment: S, `[n, n]`.

    Returns:
        `[m, m]`, a direction in each column.

    >>> principal_outputs(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0]))).abs()
    tensor([[0., 1.],
            [1., 0.]])
    """
    gram = matrix @ moment @ matrix.mT
    return torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors.flip(-1)


def tucker2(tensor: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker decomposition of the first two axes, by higher-order orthogonal iteration (tensorly's `partial_tucker`).

    Args:
        tensor: `[m, n, …]`, float64.
        ranks: of the first and of the second axis.

    Returns:
        (core `[r0, r1, …]`, U `[m, r0]`, V `[n, r1]`), the latter two with orthonormal columns.

    >>> core, left, right = tucker2(torch.ones(4, 3, 2, dtype=torch.float64), (1, 1))
    >>> core.shape, round(float((core * core).sum()), 6)
    (torch.Size([1, 1, 2]), 24.0)
    """
    with _tensorly() as tensorly:
        (core, (left, right)), _ = tensorly.partial_tucker(
            tensor, rank=list(ranks), modes=[0, 1], n_iter_max=ITERATIONS, init="svd", svd=_leading_left
        )
    return core, left, right


def _leading_left(matrix: Tensor, n_eigenvecs: int, **unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors by the Gram matrix of the rows, many times faster than an SVD of a wide unfolding.

    They are orthonormal to the last digit, also where singular values are too small for a Gram matrix to resolve.
    """
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    left = vectors.flip(-1)[:, :n_eigenvecs]
    # tensorly takes the signs from the third, and nothing else.
    return left, values.flip(-1)[:n_eigenvecs].clamp_min(0).sqrt(), left.mT @ matrix


@contextmanager
def _tensorly() -> Generator[Any, None, None]:
    """Tensorly's decompositions, computed by torch. It is imported on first use, which takes half a second."""
    backend: Any = import_module("tensorly")
    # What it makes is on the CPU as what it is given, also where another device is the default one.
    with backend.backend_context("pytorch", local_threadsafe=True), torch.device("cpu"), warnings.catch_warnings():
        # A rank above an axis is what was requested: CP fills the start up with random columns.
        warnings.filterwarnings("ignore", "Trying to compute SVD", UserWarning)
        yield import_module("tensorly.decomposition")


def cp(tensor: Tensor, rank: int) -> list[Tensor]:
    """CP decomposition, a sum of outer products, by alternating least squares (tensorly's `parafac`).

    A rank at which every tensor of this shape is such a sum, the product of all axes but the longest, is solved exactly.

    Args:
        tensor: of two axes or more, float64.
        rank: number of terms.

    Returns:
        A factor `[size, rank]` for each axis; the terms have the same norm in each.

    >>> factors = cp(torch.ones(3, 2, 2, dtype=torch.float64), 1)
    >>> [tuple(factor.shape) for factor in factors]
    [(3, 1), (2, 1), (2, 1)]
    >>> round(float(torch.einsum("ar,br,cr->", *factors)), 6)
    12.0
    """
    longest = max(range(tensor.dim()), key=lambda axis: tensor.shape[axis])
    if rank >= (exact := tensor.numel() // tensor.shape[longest]):
        return _padded(_exact_cp(tensor, longest), rank - exact)
    with _tensorly() as tensorly:
        weights, factors = tensorly.parafac(tensor, rank, n_iter_max=ITERATIONS, init="svd", random_state=0)
    norms = [factor.norm(dim=0).clamp_min(torch.finfo(tensor.dtype).tiny) for factor in factors]
    total = reduce(torch.mul, norms, weights.abs()).pow(1 / tensor.dim())
    made = [factor / norm * total for factor, norm in zip(factors, norms, strict=True)]
    return [made[0] * weights.sign(), *made[1:]]


def _exact_cp(tensor: Tensor, longest: int) -> list[Tensor]:
    """A term for each combination of indices of all axes but the longest."""
    others = [size for axis, size in enumerate(tensor.shape) if axis != longest]
    index = torch.cartesian_prod(*(torch.arange(size, device=tensor.device) for size in others)).reshape(
        -1, len(others)
    )
    units = [
        torch.eye(size, dtype=tensor.dtype, device=tensor.device)[:, column]
        for size, column in zip(others, index.mT, strict=True)
    ]
    return [*units[:longest], tensor.movedim(longest, 0).flatten(1), *units[longest:]]


def _padded(factors: list[Tensor], terms: int) -> list[Tensor]:
    return [torch.cat([factor, factor.new_zeros(len(factor), terms)], dim=1) for factor in factors]


def tensor_train(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Tensor train by successive SVDs (Oseledets 2011; tensorly's `tensor_train`).

    Args:
        tensor: float64.
        ranks: between neighbouring axes, one fewer than axes; capped where the tensor has fewer.

    Returns:
        A core `[rank before, size, rank after]` for each axis; the first and the last rank are 1.

    >>> [tuple(core.shape) for core in tensor_train(torch.ones(3, 2, 4, dtype=torch.float64), (2, 2))]
    [(1, 3, 2), (2, 2, 2), (2, 4, 1)]
    """
    with _tensorly() as tensorly:
        return list(tensorly.tensor_train(tensor, rank=[1, *ranks, 1]).factors)


def train_ranks(sizes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks of a tensor train, none above what its neighbour or the tensor allow.

    >>> train_ranks((3, 2, 4), (8, 8))
    (3, 4)
    """
    found = [1]
    for axis, rank in enumerate(ranks):
        found.append(min(rank, found[-1] * sizes[axis], math.prod(sizes[axis + 1 :])))
    return tuple(found[1:])
