"""Shrinkage: covariances that can be trusted although there are few samples."""

from __future__ import annotations

import torch
from torch import Tensor


def shrunk_covariance(covariance: Tensor, count: int) -> Tensor:
    """A sample covariance with its correlations reduced by the share of their squares that is expected to be sampling error.

    The share is λ = Σ Var(r) / Σ r² over the correlations r of all pairs, at most 1, with Var(r) = (1 − r²)² / (N − 1), the
    variance of the correlation of N normal samples; variances stay as they are. With fewer samples than features
    a sample covariance is singular: some features look as if others predicted them exactly. Shrunk, it is not, and with many
    samples λ is about 0.
    From Schäfer and Strimmer, "A shrinkage approach to large-scale covariance matrix estimation and implications for functional
    genomics", Statistical Applications in Genetics and Molecular Biology 4(1), 2005, target D, after Ledoit and Wolf, "A
    well-conditioned estimator for large-dimensional covariance matrices", Journal of Multivariate Analysis 88(2), 2004.

    Args:
        covariance: `[n, n]`, of samples.
        count: N, their number; with a handful the correlations look certain (of two samples they are ±1).

    Returns:
        `[n, n]`; positive definite but for features without variance.

    >>> samples = torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 3.0], [0.0, 0.0, -3.0]]).double()
    >>> shrunk_covariance(samples.T @ samples / 3, count=3).diagonal()
    tensor([0.6667, 2.6667, 6.0000], dtype=torch.float64)
    """
    deviations = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(deviations > 0, 1 / deviations, 0.0)
    squares = (inverse[:, None] * covariance * inverse).square().clamp_max(1)
    squares.fill_diagonal_(1)
    # A pair with a constant feature has no correlation.
    varied = (deviations > 0).to(squares.dtype)
    pairs = torch.outer(varied, varied).fill_diagonal_(0)
    signal = float((pairs * squares).sum())
    noise = float((pairs * (1 - squares).square()).sum()) / max(count - 1, 1)
    kept = 1 - min(1.0, noise / signal) if signal > 0 else 1.0
    shrunk = kept * covariance
    shrunk.diagonal().copy_(covariance.diagonal())
    return shrunk
