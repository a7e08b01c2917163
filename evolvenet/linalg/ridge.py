"""Ridge least squares that pulls towards weights already there, its ridge chosen on samples it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
"""Pulls towards the weights as they are, relative to the mean energy of an input."""


def refit(
    inputs: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None, odd: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Weights nearer to what is wanted, or None if none of the ridges does better on samples that it has not seen.

    Minimises ‖X·Wᵀ + b − Y‖² + λ‖W − W₀‖²; λ is chosen on the odd rows after a fit on the even ones, then the fit is made
    on all. Products are made in the type of the inputs, float32 at least, everything else in float64. With fewer rows
    than columns by the products of the rows with each other (Saunders, Gammerman and Vovk, "Ridge regression learning
    algorithm in dual variables", ICML 1998), a small part of the work for a wide layer. All tensors may have a group
    axis in front; the ridge is the same for all groups.

    Args:
        inputs: X, `[rows, columns]`.
        wanted: Y, `[rows, out]`.
        weight: W₀, `[out, columns]`.
        bias: `[out]`, or None where there is none: then the fit goes through zero.
        odd: `[rows]` booleans, the half to judge on.

    Returns:
        (weight `[out, columns]`, bias `[out]`) float64, or None.

    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> y = x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + 4
    >>> zeros = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    >>> weight, bias = refit(x, y, *zeros, odd=torch.arange(40) % 2 == 1)
    >>> weight.round(decimals=2).tolist(), round(bias.item(), 2)
    ([[1.0, 2.0, 3.0]], 4.0)
    """
    kind = torch.promote_types(inputs.dtype, torch.float32)
    x, start = inputs.to(kind), _exact(weight if bias is None else bias)
    missing = wanted.to(kind) - x @ weight.to(kind).mT
    missing = missing if bias is None else missing - bias.to(kind).unsqueeze(-2)
    even = ~odd
    if not bool(missing.isfinite().all()) or not bool(even.any()) or not bool(odd.any()):
        return None
    # A shift that both halves share costs nothing and keeps the digits of the sums.
    centre = x.mean(-2, keepdim=True) if bias is not None else x.new_zeros(1, x.shape[-1])
    problem = (_Short if len(odd) < 2 * x.shape[-1] else _Tall).of(x - centre, missing, odd, bias is not None)
    best, chosen = problem.rest(odd), None
    for ridge in RIDGES:
        made = problem.solve(even, ridge)
        error = problem.error(made, odd) if made else best
        if error < best:
            best, chosen = error, ridge
    made = problem.solve(even | odd, chosen) if chosen is not None else None
    if made is None:
        return None
    step, offset = problem.step(made)
    if bias is None:
        return start + step, offset
    offset = offset - (step @ _exact(centre).mT).squeeze(-1)
    return _exact(weight) + step, start + offset


@dataclass(frozen=True, eq=False)
class Solution:
    """A fit on some rows: `factors`, and the mean of the inputs (or of their answers) and of what was missing."""

    factors: Tensor
    middle: Tensor
    level: Tensor


class _Problem(Protocol):
    def rest(self, rows: Tensor) -> float: ...
    def solve(self, rows: Tensor, ridge: float) -> Solution | None: ...
    def error(self, made: Solution, rows: Tensor) -> float: ...
    def step(self, made: Solution) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class _Tall:
    """More rows than columns: sums over the rows of each half, so that the halves add up to the whole."""

    odd: Tensor
    centred: bool
    count: tuple[int, int]
    inputs: Tensor
    missing: Tensor
    gram: Tensor
    cross: Tensor
    energy: tuple[float, float]

    @classmethod
    def of(cls, x: Tensor, r: Tensor, odd: Tensor, centred: bool) -> _Tall:
        halves = [(x[..., half, :], r[..., half, :]) for half in (~odd, odd)]
        return cls(
            odd,
            centred,
            (int((~odd).sum()), int(odd.sum())),
            torch.stack([_exact(x.sum(-2)) for x, _ in halves]),
            torch.stack([_exact(r.sum(-2)) for _, r in halves]),
            torch.stack([_exact(x.mT @ x) for x, _ in halves]),
            torch.stack([_exact(x.mT @ r) for x, r in halves]),
            (float(halves[0][1].square().sum()), float(halves[1][1].square().sum())),
        )

    def _parts(self, rows: Tensor) -> list[int]:
        return [part for part, half in enumerate((~self.odd, self.odd)) if bool((rows & half).any())]

    def rest(self, rows: Tensor) -> float:
        return sum(self.energy[part] for part in self._parts(rows))

    def solve(self, rows: Tensor, ridge: float) -> Solution | None:
        parts = self._parts(rows)
        count = sum(self.count[part] for part in parts)
        middle, level = self.inputs[parts].sum(0) / count, self.missing[parts].sum(0) / count
        gram, cross = self.gram[parts].sum(0), self.cross[parts].sum(0)
        if self.centred:
            gram = gram - count * middle.unsqueeze(-1) * middle.unsqueeze(-2)
            cross = cross - count * middle.unsqueeze(-1) * level.unsqueeze(-2)
        factors = _solved(gram, cross, ridge, gram.shape[-1])
        return None if factors is None else Solution(factors.mT, middle, level)

    def step(self, made: Solution) -> tuple[Tensor, Tensor]:
        offset = made.level - (made.factors @ made.middle.unsqueeze(-1)).squeeze(-1)
        return made.factors, offset if self.centred else torch.zeros_like(offset)

    def error(self, made: Solution, rows: Tensor) -> float:
        """‖R − X·stepᵀ − offset‖² over the rows."""
        step, offset = self.step(made)
        total = self.rest(rows)
        for part in self._parts(rows):
            fitted = ((step @ self.gram[part]) * step).sum() + self.count[part] * offset.square().sum()
            both = 2 * (offset * (step @ self.inputs[part].unsqueeze(-1)).squeeze(-1)).sum()
            apart = 2 * (step * self.cross[part].mT).sum() + 2 * (offset * self.missing[part]).sum()
            total += float(fitted + both - apart)
        return total


@dataclass(frozen=True, eq=False)
class _Short:
    """Fewer rows than columns: the step is a sum of rows, and all that is needed are the products of rows."""

    centred: bool
    inputs: Tensor
    missing: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor, r: Tensor, odd: Tensor, centred: bool) -> _Short:
        return cls(centred, x, _exact(r), _exact(x @ x.mT))

    def rest(self, rows: Tensor) -> float:
        return float(self.missing[..., rows, :].square().sum())

    def solve(self, rows: Tensor, ridge: float) -> Solution | None:
        among, wanted = self.products[..., rows, :][..., :, rows], self.missing[..., rows, :]
        level = wanted.mean(-2)
        if self.centred:
            wanted = wanted - level.unsqueeze(-2)
            among = among - among.mean(-2, keepdim=True)
            among = among - among.mean(-1, keepdim=True)
        solved = _solved(among, wanted, ridge, self.inputs.shape[-1])
        if solved is None:
            return None
        factors = torch.zeros_like(self.missing)
        factors[..., rows, :] = solved
        answers = self.products[..., rows, :] @ factors
        return Solution(factors, answers.mean(-2), level)

    def error(self, made: Solution, rows: Tensor) -> float:
        fitted = self.products[..., rows, :] @ made.factors
        if self.centred:
            fitted = fitted - (made.middle - made.level).unsqueeze(-2)
        return float((self.missing[..., rows, :] - fitted).square().sum())

    def step(self, made: Solution) -> tuple[Tensor, Tensor]:
        step = _exact(made.factors.mT.to(self.inputs.dtype) @ self.inputs)
        return step, made.level - made.middle if self.centred else torch.zeros_like(made.level)


def _solved(gram: Tensor, right: Tensor, ridge: float, columns: int) -> Tensor | None:
    """(gram + λ)⁻¹ · right, or None if there is no energy or the ridge is too small for the rounding."""
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / columns
    if not bool((energy > 0).all()):
        if not bool((energy > 0).any()):
            return None
        energy = energy.clamp_min(energy.max() * 1e-6)  # a group that reads nothing has nothing to fit
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(ridge * energy.unsqueeze(-1))
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return None if bool(failed.any()) else torch.cholesky_solve(right, factor)


def _exact(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none (MPS)."""
    return tensor.to("cpu", torch.float64) if tensor.device.type == "mps" else tensor.double()
