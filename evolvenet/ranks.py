"""How many singular values stand out of noise: the EVBMF rank and the Gavish-Donoho threshold.

A fresh random layer has a full spectrum too. Both rules ask what a matrix of pure noise would look like and count the
directions that it does not explain.
"""

from __future__ import annotations

import math

import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar, root_scalar
from torch import Tensor

from evolvenet.errors import SpectrumError
from evolvenet.spectrum import Values, checked_values

EVB_CONSTANT = 2.5129
"""τ̄/√α of Nakajima et al., equation (25): where the analytic solution leaves zero."""


def evbmf_rank(values: Values, rows: int, columns: int) -> int:
    """Rank of a matrix of signal plus noise of unknown strength, by empirical variational Bayes; no setting to choose.

    The global solution is analytic but for the noise variance, which is found by a bounded search in one dimension. From
    Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
    factorization", Journal of Machine Learning Research 14, 2013, theorem 2 and corollary 1.

    Args:
        values: all `min(rows, columns)` singular values of the matrix, in any order.
        rows: of the matrix.
        columns: of the matrix.

    Returns:
        How many singular values exceed the threshold, 0 … min(rows, columns).

    Raises:
        SpectrumError: if the number of values is not the smaller side.

    >>> signal = torch.diag(torch.tensor([20.0, 15.0] + [0.0] * 18))
    >>> noise = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    >>> noise[:, :20] += signal
    >>> evbmf_rank(torch.linalg.svdvals(noise), 20, 40)
    2
    """
    made = _all_values(values, rows, columns)
    if not made.any():
        return 0
    short, long = sorted((rows, columns))
    alpha = short / long
    leaves_zero = (1 + EVB_CONSTANT * math.sqrt(alpha)) * (1 + math.sqrt(alpha) / EVB_CONSTANT)
    variance = _noise_variance(made.square() / long, alpha, leaves_zero)
    return int((made.square() > long * variance * leaves_zero).sum())


def _noise_variance(energies: Tensor, alpha: float, leaves_zero: float) -> float:
    """The σ² of the least free energy, for energies γ²/M `[L]`, descending (equations 33 to 36)."""

    def free_energy(variance: float) -> float:
        ratios = (energies / variance).clamp_min(torch.finfo(torch.float64).tiny)
        total = (ratios - ratios.log()).sum()
        above = ratios[ratios > leaves_zero]
        apart = above - (1 + alpha)
        tau = 0.5 * (apart + (apart.square() - 4 * alpha).sqrt())
        return float(total + ((tau + 1).log() + alpha * (tau / alpha + 1).log() - tau).sum())

    count = len(energies)
    most = max(min(math.ceil(count / (1 + alpha)) - 1, count - 1), 0)
    upper = float(energies.mean())
    lower = max(float(energies[most]) / leaves_zero, float(energies[most:].mean()))
    # Noise-free input has a flat end of zeros: any small variance says the same.
    lower = max(min(lower, upper), upper * 1e-12)
    if lower >= upper:
        return upper
    found = minimize_scalar(free_energy, bounds=(lower, upper), method="bounded", options={"xatol": 1e-9 * upper})
    return float(found.x)


def gavish_donoho_threshold(values: Values, rows: int, columns: int) -> float:
    """The singular value below which noise of unknown strength hides more than it shows: ω(β) times the median.

    From Gavish and Donoho, "The optimal hard threshold for singular values is 4/√3", IEEE Transactions on Information
    Theory 60(8), 2014, equation (11) with (4) and the median of the Marchenko-Pastur law.

    Args:
        values: all `min(rows, columns)` singular values of the matrix, in any order.
        rows: of the matrix.
        columns: of the matrix.

    Returns:
        The threshold, in the units of the values.

    Raises:
        SpectrumError: if the number of values is not the smaller side.

    >>> round(gavish_donoho_threshold([1.0, 1.0, 1.0], 3, 3), 3)
    2.858
    """
    made = _all_values(values, rows, columns)
    short, long = sorted((rows, columns))
    beta = short / long
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known / math.sqrt(marchenko_pastur_median(beta)) * float(made.quantile(0.5))


def marchenko_pastur_median(beta: float) -> float:
    """Median eigenvalue of the covariance of pure noise of variance 1, `beta` variables for each sample.

    Args:
        beta: rows over columns, above 0 and up to 1.

    Raises:
        SpectrumError: for another `beta`.

    >>> round(marchenko_pastur_median(1.0), 4)
    0.6528
    """
    if not 0 < beta <= 1:
        raise SpectrumError(
            f"Marchenko-Pastur: expected beta above 0 and up to 1, got {beta}. Divide short by long side."
        )
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def below(angle: float) -> float:
        # λ = middle − half·cos(angle) takes the root singularities at both ends away.
        half, middle = (high - low) / 2, (high + low) / 2

        def density(at: float) -> float:
            return (half * math.sin(at)) ** 2 / (2 * math.pi * beta * (middle - half * math.cos(at)))

        return quad(density, 0, angle, epsabs=1e-12, epsrel=1e-12)[0]

    angle = root_scalar(lambda at: below(at) - 0.5, bracket=(0, math.pi), xtol=1e-13).root
    return (high + low) / 2 - (high - low) / 2 * math.cos(angle)


def _all_values(values: Values, rows: int, columns: int) -> Tensor:
    """The values `[min(rows, columns)]` float64, descending; refuses another number of them."""
    made = checked_values(values)
    if rows < 1 or columns < 1 or len(made) != min(rows, columns):
        raise SpectrumError(
            f"Expected all {min(rows, columns)} singular values of a {rows} x {columns} matrix, got {len(made)}. "
            "Noise is judged by the small ones: do not leave them out."
        )
    return made.sort(descending=True).values
