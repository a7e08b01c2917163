"""Ridge solutions in both forms against least squares on the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolvenet.linalg.ridge import PATIENCE, RIDGES, refit, solve_held_out
from evolvenet.linalg.ridge_problems import ALL, EVEN, ODD, DualProblem, PrimalProblem, Solution, System
from tests.helpers.cases import FLOAT

ALTERNATE = torch.arange(20) % 2 == 1
"""Which of twenty rows are odd."""


def solved(problem: PrimalProblem | DualProblem, halves: tuple[int, ...], ridge: float) -> Solution:
    """The solution on some halves of the samples."""
    return problem.solve(problem.system(halves), ridge)


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


@given(st.integers(2, 12), st.integers(1, 12), st.booleans(), st.integers(0, 999))
def test_a_fit_of_noise_has_no_larger_error_on_either_half(rows: int, columns: int, bias: bool, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=made, dtype=FLOAT) for width in (columns, 2))
    weight, odd = torch.zeros(2, columns, dtype=FLOAT), torch.arange(rows) % 2 == 1
    found = refit(x, y, weight, torch.zeros(2, dtype=FLOAT) if bias else None, odd)
    if found is not None:
        for half in (odd, ~odd):
            assert (y - x @ found[0].T - found[1])[half].square().sum() <= y[half].square().sum() * (1 + 1e-9)


@given(
    st.integers(2, 40),
    st.integers(1, 12),
    st.sampled_from([1e-4, 0.1, 1.0, math.inf]),
    st.booleans(),
    st.integers(0, 999),
)
def test_primal_and_dual_form_give_one_solution(rows: int, columns: int, ridge: float, bias: bool, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(2, rows, width, generator=made, dtype=FLOAT) for width in (columns, 3))
    odd = torch.arange(rows) % 2 == 1
    primal, dual = (form.from_rows(x, r, odd, centred=bias) for form in (PrimalProblem, DualProblem))
    assert primal.count == dual.count
    one, two = solved(primal, EVEN, ridge), solved(dual, EVEN, ridge)
    assert bool(one.failed) == bool(two.failed)
    if one.failed:
        assert rows <= 2
        return
    torch.testing.assert_close(one.coefficients, dual.primal(two))
    torch.testing.assert_close(one.offset, two.offset)
    for halves, chosen in ((ODD, odd), (EVEN, ~odd), (ALL, odd | ~odd)):
        left = r[:, chosen] - x[:, chosen] @ one.coefficients.mT - one.offset.unsqueeze(-2)
        error, energy = float(left.square().sum()), float(r[:, chosen].square().sum())
        assert float(primal.error(one, halves)) == pytest.approx(error, rel=1e-6, abs=1e-9)
        assert float(dual.error(two, halves)) == pytest.approx(error, rel=1e-6, abs=1e-9)
        if halves == EVEN:
            assert float(primal.own_error(primal.system(EVEN), one)) == pytest.approx(error, rel=1e-6, abs=1e-9)
            assert float(dual.own_error(dual.system(EVEN), two)) == pytest.approx(error, rel=1e-6, abs=1e-9)
        assert float(primal.energy(halves)) == pytest.approx(energy)
        assert float(dual.energy(halves)) == pytest.approx(energy)


@pytest.mark.parametrize("form", [PrimalProblem, DualProblem])
@pytest.mark.parametrize("centred", [True, False])
def test_a_system_is_solved_for_one_ridge_after_another(form: type[PrimalProblem | DualProblem], centred: bool) -> None:
    x, r = torch.randn(20, 4, dtype=FLOAT), torch.randn(20, 2, dtype=FLOAT)
    problem = form.from_rows(x, r, ALTERNATE, centred=centred)
    one, both = problem.system(EVEN), problem.system(ALL)
    for ridge in (1.0, math.inf, 1e-4, 0.1):
        for system in (one, both):
            torch.testing.assert_close(
                problem.solve(system, ridge).coefficients, solved(problem, system.halves, ridge).coefficients
            )


def test_the_solution_is_that_of_the_ridge_problem() -> None:
    x, r = torch.randn(30, 5, dtype=FLOAT), torch.randn(30, 2, dtype=FLOAT)
    solution = solved(PrimalProblem.from_rows(x, r, torch.arange(30) % 2 == 1, centred=False), ALL, 0.1)
    penalty = (0.1 * x.square().sum() / 5).sqrt() * torch.eye(5, dtype=FLOAT)
    wide, right = torch.cat([x, penalty]), torch.cat([r, torch.zeros(5, 2, dtype=FLOAT)])
    torch.testing.assert_close(solution.coefficients, torch.linalg.lstsq(wide, right).solution.T)


@given(st.integers(0, 999), st.booleans())
def test_a_metric_weighs_the_errors(seed: int, bias: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(20, width, generator=made, dtype=FLOAT) for width in (4, 3))
    columns = torch.randn(3, 5, generator=made, dtype=FLOAT)
    odd = torch.arange(20) % 2 == 1
    plain = PrimalProblem.from_rows(x, r @ columns, odd, centred=bias)
    problem = PrimalProblem.from_rows(x, r, odd, centred=bias)
    energies = torch.stack([plain.energy(half) for half in (EVEN, ODD)])
    problem = replace(problem, energies=energies, metric=columns @ columns.T)
    one, two = solved(plain, EVEN, 0.1), solved(problem, EVEN, 0.1)
    torch.testing.assert_close(one.coefficients, columns.T @ two.coefficients)
    assert float(problem.error(two, ODD)) == pytest.approx(float(plain.error(one, ODD)))
    assert float(problem.own_error(problem.system(EVEN), two)) == pytest.approx(float(plain.error(one, EVEN)))


def test_a_matrix_too_rough_for_the_ridge_has_no_solution() -> None:
    problem = PrimalProblem.from_rows(
        torch.randn(20, 2).double(), torch.randn(20, 1).double(), ALTERNATE, centred=False
    )
    rough = replace(problem, gram=torch.diag(torch.tensor([1.0, -1e-6], dtype=FLOAT)).expand(2, 2, 2))
    assert solved(rough, EVEN, 1e-10).failed
    assert not solved(rough, EVEN, 1e-3).failed


@pytest.mark.parametrize("form", [PrimalProblem, DualProblem])
def test_an_empty_half_gives_no_solution(form: type[PrimalProblem | DualProblem]) -> None:
    x, r = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    for odd in (torch.zeros(20, dtype=torch.bool), torch.ones(20, dtype=torch.bool)):
        assert solve_held_out(form.from_rows(x, r, odd, centred=True)) is None


@pytest.mark.parametrize("form", [PrimalProblem, DualProblem])
def test_constant_inputs_leave_the_mean_to_the_offset(form: type[PrimalProblem | DualProblem]) -> None:
    r = torch.randn(20, 2).double() + 9
    found = solve_held_out(form.from_rows(torch.zeros(20, 3).double(), r, ALTERNATE, centred=True))
    assert found is not None
    assert not found[0].any()
    torch.testing.assert_close(found[1], r.mean(0))


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


@pytest.mark.parametrize("form", [PrimalProblem, DualProblem])
def test_of_many_outputs_a_few_mixtures_select_the_ridge(form: type[PrimalProblem] | type[DualProblem]) -> None:
    """Their errors are those of all outputs, but for some percent; the solution is that of all outputs."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, generator=made, dtype=FLOAT)
    noise = torch.randn(60, 600, generator=made, dtype=FLOAT)
    y, odd = x @ torch.randn(20, 600, generator=made, dtype=FLOAT) + 4 * noise, torch.arange(60) % 2 == 1
    problem = form.from_rows(x, y, odd, centred=True)
    few = problem.sketched()
    for ridge in (1.0, 1e-2, 1e-6):
        errors = [float(each.error(solved(each, EVEN, ridge), ODD)) for each in (problem, few)]
        assert errors[1] == pytest.approx(errors[0], rel=0.1)
    found = solve_held_out(problem)
    assert found is not None
    assert found[0].shape == (600, 20)


def test_mixtures_weigh_outputs_as_their_metric_does() -> None:
    made = torch.Generator().manual_seed(0)
    x, y = (torch.randn(80, width, generator=made, dtype=FLOAT) for width in (10, 512))
    y = y + x @ torch.randn(10, 512, generator=made, dtype=FLOAT)
    columns = torch.randn(512, 30, generator=made, dtype=FLOAT) * torch.arange(512)[:, None] / 512
    metric, odd = columns @ columns.T, torch.arange(80) % 2 == 1
    plain = PrimalProblem.from_rows(x, y, odd, centred=False)
    energies = torch.stack([(y[half] @ columns).square().sum() for half in (~odd, odd)])
    problem = replace(plain, metric=metric, energies=energies)
    few = problem.sketched()
    assert few.cross.shape[-1] == 128
    # Of the same mixtures at each ridge, what one ridge gains over another is as far off as that gain is large.
    gains = [float(each.energy(ODD) - each.error(solved(each, EVEN, 1e-2), ODD)) for each in (problem, few)]
    assert gains[1] == pytest.approx(gains[0], rel=0.2)


def ridges_tried(form: type[PrimalProblem | DualProblem], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list to which each ridge is added that is solved for from now on."""
    tried: list[float] = []
    solve = form.solve

    def recorded(self: Any, system: System, ridge: float | torch.Tensor) -> Solution:
        tried.append(float(ridge))
        return solve(self, system, ridge)

    monkeypatch.setattr(form, "solve", recorded)
    return tried


@pytest.mark.parametrize("form", [PrimalProblem, DualProblem])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3, 3.0, 30.0])
def test_the_ridge_of_the_least_error_is_found_without_a_trial_of_all(
    form: type[PrimalProblem | DualProblem], noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noisier the samples, the larger it is; to a thousandth of the error."""
    made = torch.Generator().manual_seed(0)
    x, added = (torch.randn(40, width, generator=made, dtype=FLOAT) for width in (15, 3))
    x = x * torch.logspace(0, -3, 15, dtype=FLOAT)
    problem = form.from_rows(x, x[:, :3] + noise * added, ALTERNATE.repeat(2), centred=False)
    errors = {ridge: float(problem.error(solved(problem, EVEN, ridge), ODD)) for ridge in RIDGES}
    tried = ridges_tried(form, monkeypatch)
    solve_held_out(problem)
    *trials, best = tried
    assert len(trials) < len(RIDGES) or best <= RIDGES[-1 - PATIENCE] or best == math.inf
    assert errors[best] == pytest.approx(min(errors.values()), rel=1e-3, abs=1e-9)


def test_a_small_ridge_is_found_where_large_ones_do_not_help() -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=made, dtype=FLOAT)
    x[:, 48:] *= 100
    true = torch.randn(1, 64, generator=made, dtype=FLOAT)
    true[:, 48:] = 0
    y = x @ true.mT + 0.1 * torch.randn(400, 1, generator=made, dtype=FLOAT)
    found = refit(x, y, torch.zeros_like(true), torch.zeros(1, dtype=FLOAT), torch.arange(400) % 2 == 1)
    assert found is not None
    assert (y - x @ found[0].T - found[1]).square().mean() < 0.02


@pytest.mark.parametrize("form", [PrimalProblem, DualProblem])
def test_where_a_fit_follows_noise_alone_smaller_ridges_are_not_tried(
    form: type[PrimalProblem | DualProblem], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = torch.Generator().manual_seed(0)
    x, y = (torch.randn(120, width, generator=made, dtype=FLOAT) for width in (50, 3))
    problem = form.from_rows(x, y, torch.arange(120) % 2 == 1, centred=True)
    errors = [float(problem.error(solved(problem, EVEN, ridge), ODD)) for ridge in RIDGES]
    least = min(float(problem.energy(ODD)), errors[0])
    assert min(errors[1:]) > least
    risen = next(k for k, error in enumerate(errors) if error - min(errors[: k + 1]) > least)
    assert 1 < risen < len(RIDGES) - 1
    tried = ridges_tried(form, monkeypatch)
    found = solve_held_out(problem)
    # With an offset that helps, the infinite ridge is solved on all samples; without one, nothing is.
    assert tried == list(RIDGES[: risen + 1]) + [math.inf] * (errors[0] < float(problem.energy(ODD)))
    assert found is None or not found[0].any()
    assert problem.zeros().shape == (3, 50)
