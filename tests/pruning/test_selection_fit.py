"""How well the kept units stand in for the removed ones, against least squares on the samples."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolvenet.measurement.activation_moments import Moments
from evolvenet.pruning.selection import Absorption, absorb, fit


def random_moments(count: int, size: int, rank: int, seed: int, constant: bool = False) -> tuple[Moments, Moments]:
    """Two halves of samples of a given rank, shifted off zero."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, size, generator=made, dtype=torch.float64)
    rows = torch.randn(2 * count, rank, generator=made, dtype=torch.float64) @ mixing + 1
    if constant:
        rows[:, 0] = 3
        rows[:, -1] = 0
    return Moments.of(rows[::2]), Moments.of(rows[1::2])


@given(st.booleans(), st.integers(1, 6), st.integers(0, 1000))
def test_a_fit_equals_least_squares_on_the_samples(bias: bool, kept_count: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 8, generator=made, dtype=torch.float64) + 1
    kept, removed = torch.arange(kept_count), torch.arange(kept_count, 8)
    columns = torch.cat([rows[:, kept], torch.ones(60, 1).double()], dim=1) if bias else rows[:, kept]
    solution = torch.linalg.lstsq(columns, rows[:, removed]).solution
    got = fit(Moments.of(rows), kept, removed, 1e-12, bias=bias)
    assert got is not None
    torch.testing.assert_close(got.matrix, solution[:kept_count].T, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        got.offset, solution[-1] if bias else torch.zeros(8 - kept_count).double(), atol=1e-6, rtol=1e-6
    )


@given(st.integers(0, 1000), st.booleans())
def test_the_error_is_that_of_the_samples(seed: int, bias: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    rows = torch.randn(25, 6, generator=made, dtype=torch.float64) + 1
    columns = torch.randn(2, 4, generator=made, dtype=torch.float64)
    absorption = Absorption(
        torch.randn(2, 4, generator=made, dtype=torch.float64),
        torch.randn(2, generator=made, dtype=torch.float64) * bias,
    )
    kept, removed = torch.tensor([0, 2, 3, 5]), torch.tensor([4, 1])
    left = rows[:, removed] - rows[:, kept] @ absorption.matrix.T - absorption.offset
    expected = (left @ columns).square().sum(1).mean()
    got = absorption.error(Moments.of(rows), kept, removed, columns @ columns.T)
    torch.testing.assert_close(got, float(expected))


@given(
    st.integers(1, 40),
    st.integers(1, 10),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 5]),
    st.integers(0, 10_000),
)
@settings(max_examples=200)
def test_compensation_never_raises_the_error_of_either_half(
    count: int, rank: int, bias: bool, constant: bool, louder: int, seed: int
) -> None:
    even, odd = random_moments(count, 10, rank, seed, constant)
    even = replace(even, mean=louder * even.mean, covariance=louder**2 * even.covariance)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    kept, removed = order[:6].sort().values, order[6:].sort().values
    columns = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    reads = columns @ columns.T
    made = absorb(even, odd, kept, removed, reads, bias=bias)
    if made is not None:
        nothing = Absorption(torch.zeros(4, 6).double(), torch.zeros(4).double())
        assert made.matrix.isfinite().all()
        assert made.offset.isfinite().all()
        for half in (even, odd):
            assert made.error(half, kept, removed, reads) <= nothing.error(half, kept, removed, reads)


def test_noise_is_not_fitted() -> None:
    """As many kept units as samples: a plain least squares would fit the noise and be worse on the other half."""
    rejected = 0
    for seed in range(20):
        even, odd = random_moments(7, 12, 12, seed)
        even, odd = replace(even, mean=even.mean * 0), replace(odd, mean=odd.mean * 0)
        kept, removed, reads = torch.arange(6), torch.arange(6, 12), torch.eye(6, dtype=torch.float64)
        eager = fit(even, kept, removed, 1e-10, bias=False)
        nothing = Absorption(torch.zeros(6, 6).double(), torch.zeros(6).double())
        assert eager is not None
        if eager.error(odd, kept, removed, reads) > nothing.error(odd, kept, removed, reads):
            rejected += 1
            made = absorb(even, odd, kept, removed, reads, bias=False)
            assert made is None or made.matrix.norm() < eager.matrix.norm()
    assert rejected > 3


def test_one_half_alone_cannot_be_judged() -> None:
    even, _ = random_moments(10, 4, 4, 0)
    assert (
        absorb(even, Moments.empty(4), torch.tensor([0, 1]), torch.tensor([2, 3]), torch.eye(2).double(), bias=True)
        is None
    )


def test_moments_too_rough_for_the_ridge_give_no_fit() -> None:
    rough = Moments(10, torch.zeros(3).double(), torch.diag(torch.tensor([1.0, -1e-6, 1.0], dtype=torch.float64)))
    assert fit(rough, torch.tensor([0, 1]), torch.tensor([2]), 1e-10, bias=True) is None
    assert fit(rough, torch.tensor([0, 1]), torch.tensor([2]), 1e-3, bias=True) is not None


def test_dead_units_leave_the_mean_to_the_bias() -> None:
    rows = torch.tensor([[0.0, 3.0], [0.0, 5.0]], dtype=torch.float64)
    made = fit(Moments.of(rows), torch.tensor([0]), torch.tensor([1]), 1e-10, bias=True)
    assert made is not None
    assert made.matrix.item() == 0
    assert made.offset.item() == 4
