"""Pivots against Gaussian elimination by hand, and shrunk covariances against sums over pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evolvenet.linalg.pivoted_cholesky import pivoted_cholesky
from evolvenet.linalg.shrinkage import shrunk_covariance


def covariance(units: int, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn(samples, units, generator=generator).double()
        @ torch.randn(units, units, generator=generator).double()
    )
    about = mixed - mixed.mean(0)
    return about.T @ about / samples


def eliminated(matrix: Tensor) -> tuple[list[int], list[float]]:
    """Eliminate the unit with the largest diagonal entry, over and over."""
    left, units, entries = matrix.clone(), [], []
    for _ in range(len(matrix)):
        unit = int(left.diagonal().argmax())
        units.append(unit)
        entries.append(float(left[unit, unit]))
        left = left - torch.outer(left[:, unit], left[unit]) / left[unit, unit]
        left[unit, unit] = 0
    return units, entries


@given(st.integers(1, 12), st.integers(0, 1000))
def test_pivots_are_those_of_elimination(units: int, seed: int) -> None:
    matrix = covariance(units, 4 * units + 8, seed)
    order, entries = pivoted_cholesky(matrix)
    expected_order, expected = eliminated(matrix)
    assert order == expected_order
    assert entries == pytest.approx(expected, rel=1e-6)
    assert entries == sorted(entries, reverse=True)


@given(st.integers(2, 12), st.integers(0, 1000), st.data())
def test_the_pivots_of_the_units_that_stay_do_not_change(units: int, seed: int, data: st.DataObject) -> None:
    """Which is why a second pruning by the same threshold finds nothing; eigenvalues would change."""
    matrix = covariance(units, 4 * units + 8, seed)
    order, entries = pivoted_cholesky(matrix)
    kept = order[: data.draw(st.integers(1, units - 1))]
    left, again = pivoted_cholesky(matrix[kept][:, kept])
    assert left == list(range(len(kept)))
    assert again == pytest.approx(entries[: len(kept)])


def test_units_that_others_predict_exactly_are_left_out() -> None:
    x = torch.randn(50, 3).double()
    samples = torch.cat([x, x @ torch.randn(3, 4).double()], dim=1)
    assert len(pivoted_cholesky(samples.T @ samples)[0]) == 3
    assert pivoted_cholesky(torch.zeros(4, 4).double()) == ([], [])


def test_shrinkage_is_that_of_a_sum_over_pairs() -> None:
    matrix, count = covariance(5, 12, 0), 12
    deviations = matrix.diagonal().sqrt()
    noise = signal = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                r = float(matrix[i, j] / deviations[i] / deviations[j])
                noise, signal = noise + (1 - r * r) ** 2 / (count - 1), signal + r * r
    expected = matrix * (1 - noise / signal)
    expected.diagonal().copy_(matrix.diagonal())
    torch.testing.assert_close(shrunk_covariance(matrix, count), expected)


@given(st.integers(2, 20), st.integers(16, 40), st.integers(0, 1000))
def test_shrunk_covariances_keep_variances_and_are_positive_definite(units: int, count: int, seed: int) -> None:
    matrix = covariance(units, count, seed)
    shrunk = shrunk_covariance(matrix, count)
    assert torch.equal(shrunk.diagonal(), matrix.diagonal())
    assert float(torch.linalg.eigvalsh(shrunk)[0]) > 0
    many = shrunk_covariance(matrix, 10**9)
    torch.testing.assert_close(many, matrix, rtol=1e-5, atol=1e-6 * float(matrix.abs().max()))


def test_from_few_samples_units_without_a_correlation_keep_their_energy() -> None:
    """64 units, 32 samples: as they are the last units look as if the first ones predicted them."""
    samples = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).double()
    about = samples - samples.mean(0)
    matrix = about.T @ about / 32
    assert len(pivoted_cholesky(matrix)[0]) < 32
    order, entries = pivoted_cholesky(shrunk_covariance(matrix, 32))
    assert len(order) == 64
    assert entries[-1] > 0.1


def test_a_feature_that_never_varies_stays_without_variance() -> None:
    matrix = covariance(4, 20, 0)
    matrix[2], matrix[:, 2] = 0, 0
    shrunk = shrunk_covariance(matrix, 20)
    assert not shrunk[2].any()
    assert shrunk.isfinite().all()
