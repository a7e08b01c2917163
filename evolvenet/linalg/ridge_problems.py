"""The two forms of a ridge problem on two halves of samples, and their solutions."""

# The functions of torch.linalg have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from evolvenet.linalg.gram import gram
from evolvenet.linalg.host_transfers import to_device
from evolvenet.linalg.precision import in_float64

MIXTURES = 128
"""Of the outputs of a layer with four times as many or more, on which its ridge is selected."""

EVEN, ODD, ALL = (0,), (1,), (0, 1)
"""Halves of the samples."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A fit on some of the samples.

    Args:
        coefficients: S, `[out, columns]`; in the dual form A of S = Aᵀ·X, `[rows, out]`.
        offset: o, `[out]`; zeros where the problem has none.
        failed: whether the ridge is too small for the rounding of the matrix, one boolean; the others mean nothing then.
    """

    coefficients: Tensor
    offset: Tensor
    failed: Tensor


class Problem(Protocol):
    """Ridge least squares on two halves of samples, in its primal or its dual form. Nothing in it waits for the device."""

    @property
    def count(self) -> tuple[int, ...]:
        """Samples of each half."""
        ...

    def energy(self, halves: tuple[int, ...]) -> Tensor:
        """‖R‖² over the halves: the error of the solution 0; one float64."""
        ...

    def solve(self, halves: tuple[int, ...], ridge: float | Tensor) -> Solution:
        """The solution on the halves; the ridge may be one number on the device."""
        ...

    def error(self, solution: Solution, halves: tuple[int, ...]) -> Tensor:
        """‖X·Sᵀ + o − R‖² over the halves; one float64."""
        ...

    def primal(self, solution: Solution) -> Tensor:
        """S, `[out, columns]` float64."""
        ...

    def sketched(self) -> Problem:
        """The problem itself, or with few random mixtures of many outputs, whose errors are nearly as large."""
        ...


@dataclass(frozen=True, eq=False)
class PrimalProblem:
    """Sums over the samples of each half; those of both are added. For more rows than columns.

    Args:
        count: samples of each half.
        centred: whether there is an offset.
        inputs: Σx, `[2, columns]`; here and below any group axes follow the first one.
        residuals: Σr, `[2, out]`.
        gram: XᵀX, `[2, columns, columns]`.
        cross: XᵀR, `[2, columns, out]`.
        energies: ‖R‖² of each half, `[2]`.
        metric: `[out, out]`, errors are eᵀ·metric·e in place of ‖e‖²; None for the identity. The solutions are the same.
    """

    count: tuple[int, ...]
    centred: bool
    inputs: Tensor
    residuals: Tensor
    gram: Tensor
    cross: Tensor
    energies: Tensor
    metric: Tensor | None = None

    @classmethod
    def from_rows(cls, x: Tensor, r: Tensor, odd: Tensor, *, centred: bool) -> PrimalProblem:
        """The sums of inputs `[rows, columns]` and residuals `[rows, out]`; `odd` `[rows]` are booleans."""
        places = _places(odd, x.device)
        wide = in_float64(x[..., :0, :0])

        def sums(*shape: int) -> Tensor:
            return wide.new_empty(2, *x.shape[:-2], *shape)

        columns, out = x.shape[-1], r.shape[-1]
        found = cls(
            count=(len(places[0]), len(places[1])),
            centred=centred,
            inputs=sums(columns),
            residuals=sums(out),
            gram=sums(columns, columns),
            cross=sums(columns, out),
            energies=wide.new_empty(2),
        )
        # One half after the other, into their places: all at once they would be in memory twice.
        for half, place in enumerate(places):
            inputs, residuals = x[..., place, :], r[..., place, :]
            found.inputs[half] = in_float64(inputs.sum(-2))
            found.residuals[half] = in_float64(residuals.sum(-2))
            found.gram[half] = in_float64(gram(inputs))
            found.cross[half] = in_float64(inputs.mT @ residuals)
            found.energies[half] = in_float64(residuals.square().sum())
        return found

    def energy(self, halves: tuple[int, ...]) -> Tensor:
        """See `Problem`."""
        return _over(self.energies, halves)

    def solve(self, halves: tuple[int, ...], ridge: float | Tensor) -> Solution:
        """By the normal equations about the mean, (XᵀX + λ·e)·Sᵀ = XᵀR."""
        count = sum(self.count[half] for half in halves)
        mean, level = _over(self.inputs, halves) / count, _over(self.residuals, halves) / count
        gram, cross = _over(self.gram, halves), _over(self.cross, halves)
        if self.centred:
            gram = gram - count * mean.unsqueeze(-1) * mean.unsqueeze(-2)
            cross = cross - count * mean.unsqueeze(-1) * level.unsqueeze(-2)
        solved, failed = _solve(gram, cross, ridge, gram.shape[-1])
        offset = level - (solved.mT @ mean.unsqueeze(-1)).squeeze(-1)
        return Solution(solved.mT, offset if self.centred else torch.zeros_like(offset), failed)

    def error(self, solution: Solution, halves: tuple[int, ...]) -> Tensor:
        """See `Problem`; from the sums, so the rounding is that of ‖R‖²."""
        step, offset = solution.coefficients, solution.offset
        by_step = step if self.metric is None else self.metric @ step
        by_offset = offset if self.metric is None else self.metric @ offset
        total = self.energy(halves)
        for half in halves:
            squares = ((by_step @ self.gram[half]) * step).sum() + self.count[half] * (by_offset * offset).sum()
            mixed = 2 * (by_offset * (step @ self.inputs[half].unsqueeze(-1)).squeeze(-1)).sum()
            explained = 2 * (by_step * self.cross[half].mT).sum() + 2 * (by_offset * self.residuals[half]).sum()
            total = total + (squares + mixed - explained)
        return total

    def primal(self, solution: Solution) -> Tensor:
        """See `Problem`."""
        return solution.coefficients

    def sketched(self) -> PrimalProblem:
        """See `Problem`; the energies are those of all outputs, as the others are unbiased estimates."""
        if (mixtures := _mixtures(self.residuals)) is None:
            return self
        if self.metric is not None:
            values, vectors = torch.linalg.eigh(self.metric)
            mixtures = (vectors * values.clamp_min(0).sqrt()) @ mixtures
        return replace(self, residuals=self.residuals @ mixtures, cross=self.cross @ mixtures, metric=None)


@dataclass(frozen=True, eq=False)
class DualProblem:
    """The products of the rows with each other. For fewer rows than columns.

    From Saunders, Gammerman and Vovk, "Ridge regression learning algorithm in dual variables", ICML 1998: S = Aᵀ·X with
    (XXᵀ + λ·e)·A = R.

    Args:
        places: indices of the rows of each half.
        centred: whether there is an offset.
        inputs: X, `[rows, columns]`.
        residuals: R, `[rows, out]`.
        products: XXᵀ, `[rows, rows]`.
    """

    places: tuple[Tensor, ...]
    centred: bool
    inputs: Tensor
    residuals: Tensor
    products: Tensor

    @classmethod
    def from_rows(cls, x: Tensor, r: Tensor, odd: Tensor, *, centred: bool) -> DualProblem:
        """As `PrimalProblem.from_rows`."""
        products = in_float64(x @ x.mT)
        return cls(_places(odd, products.device), centred, x, in_float64(r), products)

    @property
    def count(self) -> tuple[int, ...]:
        """Samples of each half."""
        return tuple(len(place) for place in self.places)

    def _rows(self, halves: tuple[int, ...]) -> Tensor:
        return torch.arange(sum(self.count), device=self.products.device) if halves == ALL else self.places[halves[0]]

    def energy(self, halves: tuple[int, ...]) -> Tensor:
        """See `Problem`."""
        return self.residuals[..., self._rows(halves), :].square().sum()

    def solve(self, halves: tuple[int, ...], ridge: float | Tensor) -> Solution:
        """See `Problem`; λ is relative to the mean squared input, as in the primal form."""
        rows = self._rows(halves)
        from_rows = self.products[..., rows, :]
        among, residuals = from_rows[..., :, rows], self.residuals[..., rows, :]
        level = residuals.mean(-2)
        if self.centred:
            residuals = residuals - level.unsqueeze(-2)
            among = among - among.mean(-2, keepdim=True)
            among = among - among.mean(-1, keepdim=True)
        solved, failed = _solve(among, residuals, ridge, self.inputs.shape[-1])
        coefficients = torch.zeros_like(self.residuals)
        coefficients[..., rows, :] = solved
        fitted = from_rows @ coefficients
        offset = level - fitted.mean(-2) if self.centred else torch.zeros_like(level)
        return Solution(coefficients, offset, failed)

    def error(self, solution: Solution, halves: tuple[int, ...]) -> Tensor:
        """See `Problem`."""
        rows = self._rows(halves)
        fitted = self.products[..., rows, :] @ solution.coefficients + solution.offset.unsqueeze(-2)
        return (self.residuals[..., rows, :] - fitted).square().sum()

    def primal(self, solution: Solution) -> Tensor:
        """See `Problem`."""
        return in_float64(solution.coefficients.mT.to(self.inputs) @ self.inputs)

    def sketched(self) -> DualProblem:
        """See `Problem`."""
        mixtures = _mixtures(self.residuals)
        return self if mixtures is None else replace(self, residuals=self.residuals @ mixtures)


def _mixtures(residuals: Tensor) -> Tensor | None:
    """Random signs `[out, MIXTURES]` with E[Ω·Ωᵀ] = 1, so E‖R·Ω‖² = ‖R‖²; None for few outputs.

    From Achlioptas, "Database-friendly random projections", Journal of Computer and System Sciences 66(4), 2003.
    """
    out = residuals.shape[-1]
    if out < 4 * MIXTURES:
        return None
    generator = torch.Generator(residuals.device).manual_seed(0)
    bits = torch.randint(0, 2, (out, MIXTURES), generator=generator, device=residuals.device)
    return (2 * bits - 1).to(residuals.dtype) / math.sqrt(MIXTURES)


def _solve(gram: Tensor, right: Tensor, ridge: float | Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(gram + λ·e)⁻¹ · right with e = trace / columns, and whether λ is too small for the rounding of the matrix.

    Zeros for an infinite λ, and where there is no energy.
    """
    if isinstance(ridge, float) and math.isinf(ridge):
        return torch.zeros_like(right), torch.zeros((), dtype=torch.bool, device=right.device)
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / columns
    zero = ~(energy > 0).any()
    if isinstance(ridge, Tensor):
        zero = zero | ridge.isinf()
    # The inputs of one group may be all zero: any shift keeps its matrix invertible.
    energy = torch.where(energy > 0, energy, energy.max())
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(ridge * energy.unsqueeze(-1))
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return torch.cholesky_solve(right, factor).masked_fill_(zero, 0.0), (failed != 0).any() & ~zero


def _places(odd: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """The indices of the even and of the odd rows, without a wait where `odd` is on the CPU."""
    odd = odd.cpu()
    return tuple(to_device(half.nonzero().flatten(), device) for half in (~odd, odd))


def _over(sums: Tensor, halves: tuple[int, ...]) -> Tensor:
    """Sums over one half of the samples, or over both."""
    return sums[0] + sums[1] if halves == ALL else sums[halves[0]]
