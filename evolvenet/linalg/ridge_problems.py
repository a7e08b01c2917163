"""The two forms of a ridge problem on two halves of samples, and their solutions."""

# The functions of torch.linalg have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
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
        coefficients: S, `[out, columns]`; in the dual form A of S = Aᵀ·X, `[rows of its halves, out]`.
        offset: o, `[out]`; zeros where the problem has none.
        failed: whether the ridge is too small for the rounding of the matrix, one boolean; the others mean nothing then.
        shift: λ·e, one for each group; 0 where the coefficients are.
        halves: of the samples, that it is fitted on.
    """

    coefficients: Tensor
    offset: Tensor
    failed: Tensor
    shift: Tensor
    halves: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class System:
    """The equations (G + λ·e)·A = R of a problem on some of the samples, to be solved for several λ; e = trace(G) / columns.

    Args:
        halves: of the samples.
        matrix: G, about the mean where the problem has an offset. It is the system's own: each solution overwrites its diagonal.
        right: R, likewise.
        columns: of the inputs.
        mean: by which the offset is less: of the inputs, `[columns]`; in the dual form of their products, `[rows]`.
        level: mean of the residuals, `[out]`.
    """

    halves: tuple[int, ...]
    matrix: Tensor
    right: Tensor
    columns: int
    mean: Tensor
    level: Tensor

    @cached_property
    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1).clone()

    def solve(self, ridge: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, whether λ is too small for the rounding of the matrix, and λ·e; zeros for an infinite λ, or without any energy."""
        if isinstance(ridge, float) and math.isinf(ridge):
            none = torch.zeros((), dtype=torch.bool, device=self.right.device)
            return torch.zeros_like(self.right), none, self.right.new_zeros(self.right.shape[:-2])
        energy = self._diagonal.sum(-1) / self.columns
        zero = ~(energy > 0).any()
        if isinstance(ridge, Tensor):
            zero = zero | ridge.isinf()
        # The inputs of one group may be all zero: any shift keeps its matrix invertible.
        energy = torch.where(energy > 0, energy, energy.max())
        shift = (ridge * energy).masked_fill(zero, 0.0)
        # Without any energy the shift could be anything but 0.
        self.matrix.diagonal(dim1=-2, dim2=-1).copy_(self._diagonal + shift.masked_fill(zero, 1.0).unsqueeze(-1))
        factor, failed = torch.linalg.cholesky_ex(self.matrix)
        return torch.cholesky_solve(self.right, factor).masked_fill_(zero, 0.0), (failed != 0).any() & ~zero, shift


class Problem(Protocol):
    """Ridge least squares on two halves of samples, in its primal or its dual form. Nothing in it waits for the device."""

    @property
    def count(self) -> tuple[int, ...]:
        """Samples of each half."""
        ...

    def energy(self, halves: tuple[int, ...]) -> Tensor:
        """‖R‖² over the halves: the error of the solution 0; one float64."""
        ...

    def system(self, halves: tuple[int, ...]) -> System:
        """The equations on the halves."""
        ...

    def solve(self, system: System, ridge: float | Tensor) -> Solution:
        """The solution on the halves of the system; the ridge may be one number on the device."""
        ...

    def error(self, solution: Solution, halves: tuple[int, ...]) -> Tensor:
        """‖X·Sᵀ + o − R‖² over the halves; one float64."""
        ...

    def own_error(self, system: System, solution: Solution) -> Tensor:
        """`error` over the halves of the solution's own system, without a product: there R − G·A is λ·e·A."""
        ...

    def primal(self, solution: Solution) -> Tensor:
        """S, `[out, columns]` float64."""
        ...

    def zeros(self) -> Tensor:
        """S = 0, `[out, columns]` float64."""
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
            count=_counts(odd),
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

    def system(self, halves: tuple[int, ...]) -> System:
        """The normal equations about the mean, (XᵀX + λ·e)·Sᵀ = XᵀR."""
        count = sum(self.count[half] for half in halves)
        mean, level = _over(self.inputs, halves) / count, _over(self.residuals, halves) / count
        gram, cross = _over(self.gram, halves), _over(self.cross, halves)
        if self.centred:
            gram = gram - count * mean.unsqueeze(-1) * mean.unsqueeze(-2)
            cross = cross - count * mean.unsqueeze(-1) * level.unsqueeze(-2)
        # That of one half is the problem's.
        return System(
            halves, gram if self.centred or halves == ALL else gram.clone(), cross, gram.shape[-1], mean, level
        )

    def solve(self, system: System, ridge: float | Tensor) -> Solution:
        """See `Problem`."""
        solved, failed, shift = system.solve(ridge)
        offset = system.level - (solved.mT @ system.mean.unsqueeze(-1)).squeeze(-1)
        return Solution(solved.mT, offset if self.centred else torch.zeros_like(offset), failed, shift, system.halves)

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

    def own_error(self, system: System, solution: Solution) -> Tensor:
        """See `Problem`; ‖R‖² − ⟨S, RᵀX⟩ − λ·e·‖S‖², about the means where there is an offset."""
        step, level = solution.coefficients, system.level
        by_step, by_level = (each if self.metric is None else self.metric @ each for each in (step, level))
        explained = (by_step * system.right.mT).sum() + (solution.shift[..., None, None] * by_step * step).sum()
        if self.centred:
            explained = explained + sum(self.count[half] for half in system.halves) * (by_level * level).sum()
        return self.energy(system.halves) - explained

    def primal(self, solution: Solution) -> Tensor:
        """See `Problem`."""
        return solution.coefficients

    def zeros(self) -> Tensor:
        """See `Problem`."""
        return torch.zeros_like(self.cross[0].mT)

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
        count: rows of each half; those of the even one are the first.
        centred: whether there is an offset.
        inputs: X, `[rows, columns]`.
        residuals: R, `[rows, out]`.
        products: XXᵀ, `[rows, rows]`.
    """

    count: tuple[int, ...]
    centred: bool
    inputs: Tensor
    residuals: Tensor
    products: Tensor

    @classmethod
    def from_rows(cls, x: Tensor, r: Tensor, odd: Tensor, *, centred: bool) -> DualProblem:
        """As `PrimalProblem.from_rows`."""
        count = _counts(odd)
        if bool(odd[: count[0]].any()):
            order = to_device(odd.cpu().argsort(stable=True), x.device)
            x, r = x[..., order, :], r[..., order, :]
        return cls(count, centred, x, in_float64(r), in_float64(gram(x.mT)))

    def _rows(self, halves: tuple[int, ...]) -> slice:
        return slice(self.count[0] if halves == ODD else 0, self.count[0] if halves == EVEN else sum(self.count))

    def energy(self, halves: tuple[int, ...]) -> Tensor:
        """See `Problem`."""
        return self.residuals[..., self._rows(halves), :].square().sum()

    def system(self, halves: tuple[int, ...]) -> System:
        """XXᵀ and R about the mean; λ is relative to the mean squared input, as in the primal form."""
        rows = self._rows(halves)
        among, residuals = self.products[..., rows, rows], self.residuals[..., rows, :]
        level, mean = residuals.mean(-2), among.mean(-2)
        if self.centred:
            residuals = residuals - level.unsqueeze(-2)
            among = among - mean.unsqueeze(-2)
            among -= among.mean(-1, keepdim=True)
        else:
            among = among.clone()
        return System(halves, among, residuals, self.inputs.shape[-1], mean, level)

    def solve(self, system: System, ridge: float | Tensor) -> Solution:
        """See `Problem`."""
        solved, failed, shift = system.solve(ridge)
        offset = system.level - (solved.mT @ system.mean.unsqueeze(-1)).squeeze(-1)
        return Solution(solved, offset if self.centred else torch.zeros_like(offset), failed, shift, system.halves)

    def error(self, solution: Solution, halves: tuple[int, ...]) -> Tensor:
        """See `Problem`."""
        rows = self._rows(halves)
        fitted = self.products[..., rows, self._rows(solution.halves)] @ solution.coefficients
        return (self.residuals[..., rows, :] - fitted.add_(solution.offset.unsqueeze(-2))).square_().sum()

    def own_error(self, system: System, solution: Solution) -> Tensor:
        """See `Problem`."""
        shift = solution.shift[..., None, None]
        return torch.where(shift > 0, shift * solution.coefficients, system.right).square_().sum()

    def primal(self, solution: Solution) -> Tensor:
        """See `Problem`."""
        return in_float64(solution.coefficients.mT.to(self.inputs) @ self.inputs[..., self._rows(solution.halves), :])

    def zeros(self) -> Tensor:
        """See `Problem`."""
        out, columns = self.residuals.shape[-1], self.inputs.shape[-1]
        return self.residuals.new_zeros(*self.residuals.shape[:-2], out, columns)

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


def _places(odd: Tensor, device: torch.device) -> tuple[slice | Tensor, ...]:
    """The even and the odd rows, without a wait where `odd` is on the CPU; slices where they are, so that nothing is copied."""
    found: list[slice | Tensor] = []
    odd = odd.cpu()
    for half in (~odd, odd):
        places = half.nonzero().flatten()
        start, count = int(places[0]) if len(places) else 0, len(places)
        alone = bool(half[start : start + count].all())
        found.append(slice(start, start + count) if alone else to_device(places, device))
    return tuple(found)


def _counts(odd: Tensor) -> tuple[int, int]:
    """The number of even rows and that of odd ones."""
    held_out = int(odd.sum())
    return len(odd) - held_out, held_out


def _over(sums: Tensor, halves: tuple[int, ...]) -> Tensor:
    """Sums over one half of the samples, or over both."""
    return sums[0] + sums[1] if halves == ALL else sums[halves[0]]
