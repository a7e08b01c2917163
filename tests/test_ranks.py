"""Ranks of noisy matrices against the same formulas written out, integrals summed up, and matrices of known rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolvenet.errors import SpectrumError
from evolvenet.ranks import evbmf_rank, gavish_donoho_threshold, marchenko_pastur_median


def planted(rows: int, columns: int, rank: int, strength: float, seed: int) -> np.ndarray:
    """Noise of variance 1 and `rank` directions of that strength, in multiples of the largest singular value of noise."""
    made = np.random.default_rng(seed)
    left = np.linalg.qr(made.standard_normal((rows, rows)))[0][:, :rank]
    right = np.linalg.qr(made.standard_normal((columns, columns)))[0][:, :rank]
    return strength * (math.sqrt(rows) + math.sqrt(columns)) * left @ right.T + made.standard_normal((rows, columns))


def slow_rank(values: np.ndarray, rows: int, columns: int) -> int:
    """The free energy of Nakajima et al. (2013) summed up value by value, its least one looked for on a fine grid."""
    short, long = min(rows, columns), max(rows, columns)
    alpha = short / long
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)

    def free_energy(variance: float) -> float:
        total = 0.0
        for value in values:
            x = value**2 / (long * variance)
            total += x - math.log(x)
            if x > x_bar:
                tau = 0.5 * (x - (1 + alpha) + math.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha))
                total += math.log(tau + 1) + alpha * math.log(tau / alpha + 1) - tau
        return total

    ordered = np.sort(values)[::-1]
    most = min(math.ceil(short / (1 + alpha)) - 1, short)
    upper = (ordered**2).sum() / (short * long)
    lower = max(ordered[most] ** 2 / (long * x_bar), (ordered[most:] ** 2).mean() / long)
    grid = np.linspace(lower, upper, 3000)
    best = grid[int(np.argmin([free_energy(variance) for variance in grid]))]
    return int((values > math.sqrt(long * best * x_bar)).sum())


@settings(max_examples=20)
@given(rows=st.integers(4, 24), columns=st.integers(4, 24), rank=st.integers(0, 3), seed=st.integers(0, 1000))
def test_evbmf_finds_what_the_slow_search_finds(rows: int, columns: int, rank: int, seed: int) -> None:
    values = np.linalg.svd(planted(rows, columns, rank, 2.0, seed), compute_uv=False)
    assert evbmf_rank(torch.from_numpy(values), rows, columns) == slow_rank(values, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(60, 60), (40, 120), (120, 40)])
@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
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


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 1.0])
def test_the_median_of_noise_halves_the_law(beta: float) -> None:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    grid = np.linspace(low, high, 2_000_001)[1:-1]
    density = np.sqrt((high - grid) * (grid - low)) / (2 * math.pi * beta * grid)
    below = density[grid <= marchenko_pastur_median(beta)].sum() * (grid[1] - grid[0])
    assert below == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_the_factor_is_near_the_published_cubic(beta: float) -> None:
    """Gavish and Donoho give ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43 to within 0.02."""
    found = gavish_donoho_threshold([1.0] * round(10 * beta), round(10 * beta), 10)
    assert found == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)


def test_missing_values_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(SpectrumError, match="all 3 singular values of a 3 x 5"):
        evbmf_rank([1.0, 2.0], 3, 5)
    with pytest.raises(SpectrumError, match="all 3 singular values"):
        gavish_donoho_threshold([1.0], 3, 5)
    with pytest.raises(SpectrumError, match="beta"):
        marchenko_pastur_median(1.5)
    with pytest.raises(SpectrumError, match="finite"):
        evbmf_rank([float("nan"), 1.0], 2, 2)
