"""Ridge least squares of which the ridge is selected on held-out samples: used by every refit of a layer.

A problem consists of two halves of samples, even and odd. With X the inputs, R the residuals to be explained, it is

    minimise over S, o:   ‖X·Sᵀ + o − R‖² + λ·e·‖S‖²,    e the mean squared input.

λ is taken from `RIDGES`: solved on the even half, compared on the odd one; the solution is then computed on both. The two forms
of the problem are in `evolvenet.linalg.ridge_problems`.
"""

# The functions of torch.linalg have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evolvenet.linalg.full_precision import full_precision
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.ridge_problems import ALL, EVEN, ODD, DualProblem, PrimalProblem, Problem

RIDGES = (math.inf, 1.0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-10)
"""λ, relative to the mean squared input. Of equal errors the first, largest one is selected; with ∞ only the offset is fitted."""

PATIENCE = 1
"""Ridges in a row that are no better than a finite one before them, after which smaller ones do not count: beyond the best
ridge the error rises (so it did in 60 fits of ResNets trained on MNIST and CIFAR-10). On the CPU they are not tried; elsewhere
the host would have to wait for the device to know that. Until a finite ridge has lowered the error the others count, as where
some inputs are much larger than those that matter, only small ones lower it; but not once the error has risen by more than the
least one: what is fitted to noise only becomes more."""


def refit(
    inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, odd: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Fit a layer's weight and bias to target outputs, shrunk towards the present ones.

    Minimises ‖X·Wᵀ + b − Y‖² + λ·e·‖W − W₀‖², the ridge λ selected by `solve_held_out`. Products are computed in the type
    of the inputs, float32 at least, everything else in float64. With fewer rows than 2 · columns the dual form is solved,
    whose matrix is `[rows, rows]`. All tensors may have a leading group axis; the ridge is the same for all groups.

    Args:
        inputs: X, `[rows, columns]`.
        targets: Y, `[rows, out]`.
        weight: W₀, `[out, columns]`.
        bias: `[out]`, or None where there is none: then the fit has no offset.
        odd: `[rows]` booleans, the held-out half.

    Returns:
        (weight `[out, columns]`, bias `[out]`) float64, on the inputs' device or, where that has no float64, on the CPU; or None
        if no ridge lowers the error of the held-out half.

    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> y = x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + 4
    >>> zeros = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    >>> weight, bias = refit(x, y, *zeros, odd=torch.arange(40) % 2 == 1)
    >>> weight.round(decimals=2).tolist(), round(bias.item(), 2)
    ([[1.0, 2.0, 3.0]], 4.0)
    """
    made = refit_or_keep(inputs, targets, weight, bias, odd)
    return (made.weight, made.offset) if made is not None and bool(made.improves) else None


@dataclass(frozen=True, eq=False)
class Fit:
    """A fit, on the device of the samples. The host has not waited for it.

    Args:
        weight: float64.
        offset: `[out]` float64.
        improves: whether it lowers the error; one boolean.
    """

    weight: Tensor
    offset: Tensor
    improves: Tensor


def refit_or_keep(inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, odd: Tensor) -> Fit | None:
    """`refit` without a wait for the device: weight and bias are the present ones where no ridge lowers the error.

    The arguments are those of `refit`, `odd` on the CPU, or it is waited for. None if a half is empty.

    >>> x, odd = torch.eye(4, dtype=torch.float64), torch.arange(4) % 2 == 1
    >>> made = refit_or_keep(x, torch.zeros(4, 1), torch.zeros(1, 4), None, odd)
    >>> made.improves, made.weight
    (tensor(False), tensor([[0., 0., 0., 0.]], dtype=torch.float64))
    """
    kind = torch.promote_types(inputs.dtype, torch.float32)
    with full_precision():
        residual = targets.to(kind) - inputs.to(kind) @ weight.to(inputs.device, kind).mT
        residual = residual if bias is None else residual - bias.to(inputs.device, kind).unsqueeze(-2)
    return refit_residuals(inputs, residual, weight, bias, odd)


def refit_residuals(inputs: Tensor, residuals: Tensor, weight: Tensor, bias: Tensor | None, odd: Tensor) -> Fit | None:
    """`refit_or_keep` where the residuals are known: `[rows, out]`, target outputs minus those of the present weight and bias.

    >>> x, odd = torch.eye(4, dtype=torch.float64), torch.arange(4) % 2 == 1
    >>> refit_residuals(x, torch.zeros(4, 1), torch.ones(1, 4), None, odd).weight
    tensor([[1., 1., 1., 1.]], dtype=torch.float64)
    """
    kind = torch.promote_types(inputs.dtype, torch.float32)
    with full_precision():
        x, residual = inputs.to(kind), residuals.to(kind)
        # A shift that both halves share changes no fit and keeps the digits of the sums.
        centre = None if bias is None else x.mean(-2, keepdim=True)
        form = DualProblem if len(odd) < 2 * x.shape[-1] else PrimalProblem
        about = x if centre is None else x - centre
        found = fit_held_out(form.from_rows(about, residual, odd, centred=bias is not None))
        if found is None:
            return None
        where = found.weight.device
        improves = found.improves & residual.isfinite().all().to(where)
        present, offset, kept = in_float64(weight, where), found.offset, torch.zeros_like(found.offset)
        if bias is not None and centre is not None:
            kept = in_float64(bias, where)
            offset = kept + (offset - (found.weight @ in_float64(centre).mT).squeeze(-1))
        changed = torch.where(improves, present + found.weight, present)
        return Fit(changed, torch.where(improves, offset, kept), improves)


def solve_held_out(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """The solution on all samples, its ridge selected on held-out ones.

    Args:
        problem: the two halves.

    Returns:
        (S `[out, columns]`, o `[out]`) float64 with the ridge whose solution on the even half has the least error on the
        odd half. None if that is not below ‖R‖², if the solution on all samples has an error above ‖R‖² on one of the
        halves, or if a half is empty.

    >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    >>> odd = torch.tensor([False, True, False, True])
    >>> step, offset = solve_held_out(PrimalProblem.from_rows(x, 2 * x + 1, odd, centred=True))
    >>> round(step.item(), 6), round(offset.item(), 6)
    (2.0, 1.0)
    """
    found = fit_held_out(problem)
    return (found.weight, found.offset) if found is not None and bool(found.improves) else None


def fit_held_out(problem: Problem) -> Fit | None:
    """`solve_held_out` without a wait for the device: the solution, and whether it is one.

    Args:
        problem: the two halves.

    Returns:
        S, o, and whether they lower the error; None if a half is empty.
    """
    if not all(problem.count):
        return None
    trials = problem.sketched()
    least = trials.energy(ODD)
    found, selected = torch.zeros_like(least, dtype=torch.bool), torch.full_like(least, math.inf)
    worse, stopped, lowest = torch.zeros_like(least), torch.zeros_like(found), torch.full_like(least, math.inf)
    system, on_cpu = trials.system(EVEN), least.device.type == "cpu"
    for ridge in RIDGES:
        solution = trials.solve(system, ridge)
        error = trials.error(solution, ODD)
        better = ~solution.failed & (error < least) & ~stopped
        least, found, selected = torch.where(better, error, least), found | better, selected.masked_fill(better, ridge)
        worse = torch.where(better | selected.isinf(), 0, worse + 1)
        # What smaller ridges leave unexplained is less, so a rise is of what was fitted to the noise of the even half.
        overfitted = ~solution.failed & (error - lowest > least)
        lowest = torch.where(solution.failed, lowest, torch.minimum(lowest, error))
        stopped = stopped | (worse >= PATIENCE) | overfitted
        if on_cpu and bool(stopped):
            break
    # Their matrices are not needed beside that of all samples.
    del trials, system
    if on_cpu and not bool(found):
        kept = problem.zeros()
        return Fit(kept, kept[..., 0], found)
    system = problem.system(ALL)
    solution = problem.solve(system, float(selected) if on_cpu else selected)
    held_out = problem.error(solution, ODD)
    even = problem.own_error(system, solution) - held_out
    improves = found & ~solution.failed & ~(held_out > problem.energy(ODD)) & ~(even > problem.energy(EVEN))
    return Fit(problem.primal(solution), solution.offset, improves)
