"""Ranks of noisy matrices against free energies minimised numerically, integrals as sums, and matrices of known rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evolvenet.errors import SpectrumError
from evolvenet.linalg.noise_rank import evbmf_rank, gavish_donoho_threshold, marchenko_pastur_median, signal_bound


def planted(rows: int, columns: int, rank: int, strength: float, seed: int) -> np.ndarray:
    """Noise of variance 1 and `rank` directions of that strength, in multiples of the largest singular value of noise."""
    made = np.random.default_rng(seed)
    left = np.linalg.qr(made.standard_normal((rows, rows)))[0][:, :rank]
    right = np.linalg.qr(made.standard_normal((columns, columns)))[0][:, :rank]
    return strength * (math.sqrt(rows) + math.sqrt(columns)) * left @ right.T + made.standard_normal((rows, columns))


def component(values: np.ndarray, rows: int, columns: int, variance: np.ndarray) -> np.ndarray:
    """Twice the least free energy of one direction of each strength, numerically; 0 is that of leaving it out.

    The model is V = B·Aᵀ + noise with a Gaussian prior of a variance of its own on each column. Mean, variance and prior
    variance of both factors are each set to what is best given the others, from a start that explains all of the value.
    """
    long, short = max(rows, columns), min(rows, columns)
    a = b = np.sqrt(values)
    spread_a = spread_b = 0.01 * variance / values
    for _ in range(4000):
        prior_a, prior_b = (a**2 + long * spread_a) / long, (b**2 + short * spread_b) / short
        spread_a = 1 / (1 / prior_a + (b**2 + short * spread_b) / variance)
        a = spread_a * values * b / variance
        spread_b = 1 / (1 / prior_b + (a**2 + long * spread_a) / variance)
        b = spread_b * values * a / variance
    energy_a, energy_b = a**2 + long * spread_a, b**2 + short * spread_b
    prior_a, prior_b = energy_a / long, energy_b / short
    fit = (energy_a * energy_b - 2 * a * b * values) / variance
    return long * np.log(prior_a / spread_a) + short * np.log(prior_b / spread_b) + fit


def slow_rank(values: np.ndarray, rows: int, columns: int) -> int:
    """The free energy minimised numerically for every noise variance on a fine grid."""
    values = values[values > 0]
    grid = np.geomspace(1e-3, 1, 500) * (values**2).sum() / (rows * columns)
    each = component(values[:, None], rows, columns, grid)
    whole = rows * columns * np.log(grid) + (values**2).sum() / grid + np.minimum(each, 0).sum(0)
    return int((each[:, whole.argmin()] < 0).sum())


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (5, 14), (16, 9), (3, 40)])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_evbmf_is_the_numerical_minimum_of_the_free_energy(rows: int, columns: int, rank: int, seed: int) -> None:
    values = np.linalg.svd(planted(rows, columns, rank, 2.0, seed), compute_uv=False)
    assert evbmf_rank(torch.from_numpy(values), rows, columns) == slow_rank(values, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(10, 10), (5, 20), (20, 30), (60, 3)])
def test_a_direction_is_kept_where_its_free_energy_falls_below_zero(rows: int, columns: int) -> None:
    variance = 0.7
    bound = math.sqrt(max(rows, columns) * variance * signal_bound(min(rows, columns) / max(rows, columns)))
    below, above = component(bound * np.array([0.999, 1.001]), rows, columns, np.array(variance))
    assert below > 0 > above


@pytest.mark.parametrize(("rows", "columns"), [(60, 60), (40, 120), (120, 40)])
@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_known_ranks_are_found_at_any_scale(rows: int, columns: int, rank: int, scale: float) -> None:
    values = scale * np.linalg.svd(planted(rows, columns, rank, 3.0, seed=1), compute_uv=False)
    assert evbmf_rank(torch.from_numpy(values), rows, columns) == rank
    assert int((values > gavish_donoho_threshold(torch.from_numpy(values), rows, columns)).sum()) == rank


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 0.0], [3.0, 3.0], [1e-30, 1e-30]])
def test_degenerate_spectra_have_an_answer(values: list[float]) -> None:
    assert 0 <= evbmf_rank(values, 2, 9) <= 2
    assert gavish_donoho_threshold(values, 2, 9) >= 0
    assert evbmf_rank([7.0], 1, 1) in (0, 1)


def test_noise_free_low_rank_is_its_rank() -> None:
    assert evbmf_rank([9.0, 5.0, *[0.0] * 18], 20, 30) == 2


def slow_factor(beta: float) -> float:
    """Gavish and Donoho's ω(β): the value at which keeping costs as much as dropping, over the root of noise's median.

    A direction of strength x has singular value y, its vectors at angles to the true ones (Benaych-Georges and Nadakuditi 2012);
    kept, it costs x² + y² − 2·x·y·cos·cos, dropped x².
    """
    x = np.linspace(beta**0.25, 4, 4_000_001)[1:]
    y = np.sqrt((x + 1 / x) * (x + beta / x))
    left, right = ((x**4 - beta) / (x**4 + beta * x**2)) ** 0.5, ((x**4 - beta) / (x**4 + x**2)) ** 0.5
    cut = y[np.abs(y - 2 * x * left * right).argmin()]
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # λ = low + (high − low)·s², so that the density has no pole and the law is summed up by trapezia.
    s = np.linspace(0, 1, 1_000_001)
    energy = low + (high - low) * s**2
    with np.errstate(invalid="ignore"):
        density = np.sqrt((high - energy) * (energy - low)) / (2 * math.pi * beta * energy) * 2 * (high - low) * s
    density[0] = 2 * (high - low) ** 0.5 / math.pi if low == 0 else 0
    law = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(s))])
    assert law[-1] == pytest.approx(1, abs=1e-6)
    return float(cut / math.sqrt(np.interp(0.5, law, energy)))


@pytest.mark.parametrize("columns", [10, 20, 33, 100, 400])
def test_the_threshold_is_where_keeping_costs_as_much_as_dropping(columns: int) -> None:
    found = gavish_donoho_threshold([3.0] * 10, 10, columns)
    assert found == pytest.approx(3 * slow_factor(10 / columns), rel=1e-5)
    assert gavish_donoho_threshold([3.0] * 10, columns, 10) == found


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 1.0])
def test_the_median_of_noise_is_that_of_a_large_noise_matrix(beta: float) -> None:
    noise = np.random.default_rng(0).standard_normal((round(1000 * beta), 1000)) / math.sqrt(1000)
    seen = np.median(np.linalg.svd(noise, compute_uv=False) ** 2)
    assert marchenko_pastur_median(beta) == pytest.approx(seen, rel=0.02)


def test_missing_values_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(SpectrumError, match="all 3 singular values of a 3 x 5"):
        evbmf_rank([1.0, 2.0], 3, 5)
    with pytest.raises(SpectrumError, match="all 3 singular values"):
        gavish_donoho_threshold([1.0], 3, 5)
    for ratio in (1.5, 0.0, -1.0, float("nan")):
        for call in (marchenko_pastur_median, signal_bound):
            with pytest.raises(SpectrumError, match="ratio of sides"):
                call(ratio)
    with pytest.raises(SpectrumError, match="finite"):
        evbmf_rank([float("nan"), 1.0], 2, 2)
