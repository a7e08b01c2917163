"""Ridge fits against least squares on the rows, by columns and by rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolvenet.linalg import ridge as module
from evolvenet.linalg.ridge import refit
from tests.helpers.cases import FLOAT


@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_a_fit_is_least_squares_on_all_rows(columns: int, out: int, bias: bool, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(80, columns, generator=made, dtype=FLOAT) + 1
    y = x @ torch.randn(columns, out, generator=made, dtype=FLOAT) + 3 * bias
    wide = torch.cat([x, torch.ones(80, 1).double()], 1) if bias else x
    solution = torch.linalg.lstsq(wide, y).solution
    start = torch.randn(out, columns, generator=made, dtype=FLOAT)
    odd = torch.arange(80) % 2 == 1
    found = refit(x, y, start, torch.zeros(out, dtype=FLOAT) if bias else None, odd)
    assert found is not None
    torch.testing.assert_close(found[0], solution[:columns].T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1], solution[-1] if bias else torch.zeros(out).double(), atol=5e-3, rtol=1e-3)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 999))
def test_noise_is_not_fitted(rows: int, columns: int, seed: int) -> None:
    """What an offered fit does to the half that chose it is never worse than leaving the weights."""
    made = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=made, dtype=FLOAT) for width in (columns, 2))
    weight, odd = torch.zeros(2, columns, dtype=FLOAT), torch.arange(rows) % 2 == 1
    found = refit(x, y, weight, None, odd)
    if found is not None:
        whole = (y - x @ found[0].T).square().sum()
        assert whole <= y.square().sum() * (1 + 1e-9)


@given(st.integers(2, 40), st.integers(1, 12), st.sampled_from([1e-4, 0.1, 1.0]), st.booleans(), st.integers(0, 999))
def test_both_ways_to_solve_agree(rows: int, columns: int, ridge: float, bias: bool, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(2, rows, width, generator=made, dtype=FLOAT) for width in (columns, 3))
    odd = torch.arange(rows) % 2 == 1
    tall, short = (kind.of(x, r, odd, bias) for kind in (module._Tall, module._Short))
    one, two = tall.solve(~odd, ridge), short.solve(~odd, ridge)
    if one is None or two is None:
        assert rows <= 2
        return
    for left, right in zip(tall.step(one), short.step(two), strict=True):
        torch.testing.assert_close(left, right)
    step, offset = tall.step(one)
    error = float((r[:, odd] - x[:, odd] @ step.mT - offset.unsqueeze(-2)).square().sum())
    assert tall.error(one, odd) == pytest.approx(error, rel=1e-6, abs=1e-9)
    assert short.error(two, odd) == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_the_solution_is_that_of_the_ridge_problem() -> None:
    x, r = torch.randn(30, 5, dtype=FLOAT), torch.randn(30, 2, dtype=FLOAT)
    everything = torch.ones(30, dtype=torch.bool)
    made = module._Tall.of(x, r, torch.arange(30) % 2 == 1, False)
    found = made.solve(everything, 0.1)
    assert found is not None
    penalty = (0.1 * x.square().sum() / 5).sqrt() * torch.eye(5, dtype=FLOAT)
    wide, right = torch.cat([x, penalty]), torch.cat([r, torch.zeros(5, 2, dtype=FLOAT)])
    torch.testing.assert_close(made.step(found)[0], torch.linalg.lstsq(wide, right).solution.T)


def test_groups_are_fitted_each_for_itself() -> None:
    x, odd = torch.randn(3, 50, 4, dtype=FLOAT), torch.arange(50) % 2 == 1
    true = torch.randn(3, 2, 4, dtype=FLOAT)
    found = refit(x, x @ true.mT + 1, torch.zeros_like(true), torch.zeros(3, 2, dtype=FLOAT), odd)
    assert found is not None
    torch.testing.assert_close(found[0], true, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1], torch.ones(3, 2, dtype=FLOAT), atol=1e-3, rtol=1e-3)


def test_a_group_without_input_keeps_its_weights() -> None:
    x, odd = torch.randn(2, 50, 4, dtype=FLOAT), torch.arange(50) % 2 == 1
    x[0] = 0
    weight = torch.randn(2, 1, 4, dtype=FLOAT)
    found = refit(x, x @ (2 * weight).mT, weight, None, odd)
    assert found is not None
    torch.testing.assert_close(found[0][0], weight[0])
    torch.testing.assert_close(found[0][1], 2 * weight[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rows", [200, 20])
def test_float32_and_half_inputs_are_fitted_in_float32(rows: int) -> None:
    x, odd = torch.randn(rows, 30), torch.arange(rows) % 2 == 1
    true = torch.randn(2, 30)
    exact = refit(x.double(), x.double() @ true.T.double(), torch.zeros(2, 30).double(), None, odd)
    single = refit(x, x @ true.T, torch.zeros(2, 30), None, odd)
    half = refit(x.bfloat16(), (x @ true.T).bfloat16(), torch.zeros(2, 30).bfloat16(), None, odd)
    assert exact is not None
    assert single is not None
    assert half is not None
    torch.testing.assert_close(single[0], exact[0], atol=1e-3, rtol=1e-3)
    assert (half[0] - exact[0]).norm() < 0.1 * exact[0].norm()
