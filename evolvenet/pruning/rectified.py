"""Fits of outputs of which a rectifier passes on the positive part only.

Where a target is negative, any negative output is as good as another. Each round fits the layer anew to targets that are moved
there to the present output, or to the kink where that is positive. The error of the new targets is no less than that of the
rectified outputs, and equal to it before the round, so that with one ridge no round raises the sum of error and penalty
(majorization). The problem is that of Zhang, Zou, He and Sun, "Accelerating very deep convolutional networks for classification
and detection", TPAMI 38(10), 2016, section 2.2, who relax it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evolvenet.linalg.ridge import Fit


@dataclass(frozen=True, eq=False)
class Kink:
    """Where a rectifier begins to pass outputs on.

    Args:
        floor: `[rows or 1, out]`, in the outputs' numbers.
        slope: `[out]` or `[1, out]`, by which outputs are multiplied before it; where that is negative it passes on what is below
            the floor, where it is 0 the outputs count everywhere.
    """

    floor: Tensor
    slope: Tensor


def rectified_fit(
    solve: Callable[[Tensor], Fit | None], found: Fit, columns: Tensor, targets: Tensor, kink: Kink, rounds: int
) -> Fit:
    """A fit followed by rounds of fits to what a rectifier passes on.

    Args:
        solve: targets of the shape of `targets` → the fit to them, from where the first one began.
        found: the fit to the targets themselves.
        columns: X, `[groups, rows, columns]`.
        targets: Y, `[groups, rows, out / groups]`.
        kink: of the rectifier.
        rounds: how many.

    >>> from evolvenet.linalg.ridge import refit_or_keep
    >>> x, odd = torch.tensor([[[-2.0], [-1.0], [1.0], [2.0]] * 4]), torch.arange(16) % 8 > 3
    >>> def solve(y):
    ...     return refit_or_keep(x, y, torch.zeros(1, 1, 1), None, odd)
    >>> y = 3 * x.clamp(min=-0.5)
    >>> kink = Kink(torch.zeros(1, 1), torch.ones(1))
    >>> [round(rectified_fit(solve, solve(y), x, y, kink, rounds).weight.item(), 2) for rounds in (0, 1, 9)]
    [1.95, 2.47, 3.0]
    """
    groups, _, out = targets.shape
    floor = kink.floor.reshape(len(kink.floor), groups, out).movedim(1, 0).to(targets)
    slope = kink.slope.reshape(groups, 1, out).to(targets)
    passed = ((targets - floor) * slope > 0) | (slope == 0) | ~floor.isfinite()
    for _ in range(rounds):
        present = columns @ found.weight.to(columns).mT + found.offset.to(columns).reshape(groups, 1, out)
        moved = torch.where((present - floor) * slope > 0, floor, present)
        fit = solve(torch.where(passed, targets, moved.to(targets)))
        if fit is None:
            break
        weight = torch.where(fit.improves, fit.weight, found.weight)
        found = Fit(weight, torch.where(fit.improves, fit.offset, found.offset), found.improves | fit.improves)
    return found
