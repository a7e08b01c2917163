"""How many singular values stand out of noise: the EVBMF rank and the Gavish-Donoho threshold.

A random matrix has a full spectrum too. Both rules estimate the noise from the spectrum and count the singular
values above the threshold that follows from it.
"""

# scipy has no stubs.
# pyright: reportMissingTypeStubs=false, reportAttributeAccessIssue=false, reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math

import torch
from torch import Tensor

from evolvenet.errors import SpectrumError
from evolvenet.linalg.spectrum import Values, checked_values

SEARCHED = 400
"""Noise variances that are tried before the best one is refined."""


def evbmf_rank(values: Values, rows: int, columns: int) -> int:
    """Rank of a matrix of signal plus noise of unknown strength, by empirical variational Bayes; no setting to choose.

    The global solution is analytic but for the noise variance, which is found by a bounded search in one dimension. From
    Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
    factorization", Journal of Machine Learning Research 14, 2013, in the form and with the bounds of Nakajima,
    Tomioka, Sugiyama and Babacan, "Condition for perfect dimensionality recovery by variational Bayesian PCA", Journal of
    Machine Learning Research 16, 2015.

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
    made = made / made[0]
    short, long = sorted((rows, columns))
    alpha = short / long
    least = signal_bound(alpha)
    variance = _noise_variance(made.square() / long, alpha, least)
    return int((made.square() > long * variance * least).sum())


def signal_bound(alpha: float) -> float:
    """The γ²/(M·σ²) above which variational Bayes keeps a direction: singular value γ, longer side M, noise variance σ².

    (1 + τ)(1 + α/τ) with Φ(τ) + Φ(τ/α) = 0 and Φ(z) = log(z + 1)/z − ½, from Nakajima et al. (2015), see `evbmf_rank`.
    The approximation τ ≈ 2.5129·√α is exact for squares alone.

    Args:
        alpha: shorter over longer side, above 0 and up to 1.

    Raises:
        SpectrumError: for another `alpha`.

    >>> round(signal_bound(1.0), 4)
    4.9108
    """
    # scipy's solvers take long to import, and are needed only here.
    from scipy.optimize import root_scalar

    _check_ratio(alpha)

    def balance(tau: float) -> float:
        return math.log1p(tau) / tau + math.log1p(tau / alpha) * alpha / tau - 1

    # For a square the root is 2.5129, for anything else it lies between α times that and that.
    tau = root_scalar(balance, bracket=(2.5 * alpha, 2.6), xtol=1e-13).root
    return (1 + tau) * (1 + alpha / tau)


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise SpectrumError(
            f"Expected a ratio of sides above 0 and up to 1, got {ratio}. Divide the shorter side by the longer one."
        )


def _noise_variance(energies: Tensor, alpha: float, least: float) -> float:
    """The σ² of the least free energy, for energies γ²/M `[L]`, descending; its bounds are those of the 2015 paper."""

    def free_energies(variances: Tensor) -> Tensor:
        ratios = (energies / variances[:, None]).clamp_min(torch.finfo(torch.float64).tiny)
        apart = ratios - (1 + alpha)
        tau = 0.5 * (apart + (apart.square() - 4 * alpha).clamp_min(0).sqrt())
        gained = (tau + 1).log() + alpha * (tau / alpha + 1).log() - tau
        return (ratios - ratios.log() + torch.where(ratios > least, gained, 0)).sum(1)

    count = len(energies)
    most = max(min(math.ceil(count / (1 + alpha)) - 1, count - 1), 0)
    upper = float(energies.mean())
    lower = max(float(energies[most]) / least, float(energies[most:].mean()))
    # Without noise the last values are 0, and any small variance gives the same rank.
    lower = max(min(lower, upper), upper * 1e-12)
    # There may be several valleys, one for each number of directions, and the upper end may be the deepest.
    grid = torch.logspace(math.log10(lower), math.log10(upper), SEARCHED, dtype=torch.float64, device="cpu").clamp(
        lower, upper
    )
    deepest = int(free_energies(grid).argmin())
    first, last = (float(grid[min(max(deepest + step, 0), SEARCHED - 1)]) for step in (-1, 1))
    if deepest == SEARCHED - 1 or first >= last:
        return float(grid[deepest])

    def at(place: float) -> float:
        return float(
            free_energies(torch.tensor([first + place * (last - first)], dtype=torch.float64, device="cpu"))[0]
        )

    from scipy.optimize import minimize_scalar

    found = minimize_scalar(at, bounds=(0, 1), method="bounded")
    return first + float(found.x) * (last - first)


def gavish_donoho_threshold(values: Values, rows: int, columns: int) -> float:
    """Threshold on singular values with the least mean squared error for noise of unknown strength: ω(β) times the median.

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
    factor = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return factor / math.sqrt(marchenko_pastur_median(beta)) * float(made.quantile(0.5))


def marchenko_pastur_median(beta: float) -> float:
    """Median eigenvalue of the covariance of pure noise of variance 1, `beta` variables for each sample.

    Args:
        beta: rows over columns, above 0 and up to 1.

    Raises:
        SpectrumError: for another `beta`.

    >>> round(marchenko_pastur_median(1.0), 4)
    0.6528
    """
    from scipy.integrate import quad
    from scipy.optimize import root_scalar

    _check_ratio(beta)
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
            "The noise is estimated from the small ones: do not leave them out."
        )
    return made.sort(descending=True).values
