"""The prediction of the removed units from the kept ones, against least squares on the samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evolvenet.measurement.activation_moments import Moments, collect
from evolvenet.pruning.selection import plan_prune, predict_removed
from evolvenet.surgery.resize_model import compile_surgery
from evolvenet.tracing.trace import trace


def random_halves(count: int, size: int, rank: int, seed: int, constant: bool = False) -> tuple[Tensor, Tensor]:
    """Two halves of `count` samples `[count, size]` of a given rank, shifted off zero."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, size, generator=made, dtype=torch.float64)
    rows = torch.randn(2 * count, rank, generator=made, dtype=torch.float64) @ mixing + 1
    if constant:
        rows[:, 0] = 3
        rows[:, -1] = 0
    return rows[::2], rows[1::2]


@given(st.booleans(), st.integers(1, 6), st.integers(0, 1000))
def test_a_prediction_equals_least_squares_on_the_samples(bias: bool, kept_count: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 8, generator=made, dtype=torch.float64) + 1
    kept, removed = torch.arange(kept_count), torch.arange(kept_count, 8)
    rows[:, removed] = (
        rows[:, kept] @ torch.randn(kept_count, 8 - kept_count, generator=made, dtype=torch.float64) + bias
    )
    columns = torch.cat([rows[:, kept], torch.ones(60, 1).double()], dim=1) if bias else rows[:, kept]
    solution = torch.linalg.lstsq(columns, rows[:, removed]).solution
    found = predict_removed(
        Moments.of(rows[::2]), Moments.of(rows[1::2]), kept, removed, torch.eye(8 - kept_count).double(), bias=bias
    )
    assert found is not None
    offset = solution[-1] if bias else torch.zeros(8 - kept_count).double()
    torch.testing.assert_close(found[0], solution[:kept_count].T, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1], offset, atol=1e-6, rtol=1e-6)


@given(
    st.integers(1, 40),
    st.integers(1, 10),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 5]),
    st.integers(0, 10_000),
)
def test_a_prediction_never_raises_the_error_of_either_half(
    count: int, rank: int, bias: bool, constant: bool, louder: int, seed: int
) -> None:
    even, odd = random_halves(count, 10, rank, seed, constant)
    even = louder * even
    made = torch.Generator().manual_seed(seed)
    order = torch.randperm(10, generator=made)
    kept, removed = order[:6].sort().values, order[6:].sort().values
    columns = torch.randn(4, 7, dtype=torch.float64, generator=made)
    found = predict_removed(Moments.of(even), Moments.of(odd), kept, removed, columns @ columns.T, bias=bias)
    if found is not None:
        for half in (even, odd):
            bare = (half[:, removed] @ columns).square().sum()
            left = (half[:, removed] - half[:, kept] @ found[0].T - found[1]) @ columns
            assert left.square().sum() <= bare * (1 + 1e-9)


def test_noise_is_not_fitted() -> None:
    """As many kept units as samples: least squares without a ridge fits the noise and is worse on the other half."""
    worse = 0
    kept, removed, metric = torch.arange(6), torch.arange(6, 12), torch.eye(6, dtype=torch.float64)
    for seed in range(20):
        even, odd = (half - half.mean(0) for half in random_halves(7, 12, 12, seed))
        plain = torch.linalg.lstsq(even[:, kept], even[:, removed]).solution.T
        if (odd[:, removed] - odd[:, kept] @ plain.T).square().sum() > odd[:, removed].square().sum():
            worse += 1
            found = predict_removed(Moments.of(even), Moments.of(odd), kept, removed, metric, bias=False)
            assert found is None or found[0].norm() < plain.norm()
    assert worse > 3


def test_without_a_held_out_half_nothing_is_predicted() -> None:
    even, _ = random_halves(10, 4, 4, 0)
    kept, removed, metric = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.eye(2).double()
    assert predict_removed(Moments.of(even), Moments.empty(4), kept, removed, metric, bias=True) is None


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_dead_units_leave_the_mean_to_the_bias(mean: float) -> None:
    rows = torch.tensor([[mean, 3.0], [mean, 5.0], [mean, 4.0], [mean, 4.0]], dtype=torch.float64)
    kept, removed = torch.tensor([0]), torch.tensor([1])
    found = predict_removed(
        Moments.of(rows[::2]), Moments.of(rows[1::2]), kept, removed, torch.eye(1).double(), bias=True
    )
    assert found is not None
    assert found[0].item() == 0
    assert found[1].item() == 4


def test_consumers_that_are_fitted_to_their_outputs_are_cut_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(64, 3)
    graph = trace(model, x[:2])
    statistics = collect(model, graph, [x])
    sizes = {"0": 4, "2": 3}
    whole = plan_prune(model, graph, sizes, statistics)
    part = plan_prune(model, graph, sizes, statistics, without={"2.weight"})
    bare = compile_surgery(model, graph, whole.maps)
    values = [{change.name: change.value for change in each.changes} for each in (whole, part, bare)]
    assert torch.equal(values[1]["2.weight"], values[2]["2.weight"])
    assert torch.equal(values[1]["4.weight"], values[0]["4.weight"])
    assert not torch.equal(values[0]["2.weight"], values[2]["2.weight"])
