"""Singular spectra of weights and figures derived from them: energy shares, effective and stable rank, units for an energy."""

# The functions of torch.linalg and torch.special have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from evolvenet.errors import SpectrumError
from evolvenet.linalg.precision import in_float64

Values = Tensor | Sequence[float]


def matricize(weight: Tensor, dim: int = 0, name: str = "weight") -> Tensor:
    """A weight as the matrix whose rows are the units of one axis.

    Args:
        weight: two axes or more: dense `[out, in]`, convolution `[out, in, k…]`, transposed convolution
            `[in, out, k…]` with `dim=1`. float16 and bfloat16 come back as float32; complex ones stay complex.
        dim: the axis of the units.
        name: what to call the weight in an error.

    Returns:
        `[units, everything else]`, for a convolution `[out, in·k…]`; a view where possible, detached.

    Raises:
        SpectrumError: for fewer than two axes, no entries, a type without fractions, NaN or infinite entries.

    >>> matricize(torch.zeros(8, 3, 5, 5)).shape
    torch.Size([8, 75])
    >>> matricize(torch.zeros(8, 3, 5, 5), dim=1).shape
    torch.Size([3, 200])
    """
    if weight.dim() < 2:
        raise SpectrumError(
            f"{name}: expected a weight of two axes or more, got shape {tuple(weight.shape)}. "
            "Biases and norm parameters have no spectrum; take the weight of the layer that produces the units."
        )
    if not -weight.dim() <= dim < weight.dim():
        raise SpectrumError(f"{name}: expected an axis of shape {tuple(weight.shape)}, got dim={dim}.")
    return _computable(weight, name).movedim(dim, 0).flatten(1)


def singular_values(matrix: Tensor, name: str = "matrix") -> Tensor:
    """Singular values of a matrix, largest first.

    float32 goes through the eigenvalues of the Gram matrix of the shorter side in float64: cheaper than an SVD, the more
    so the longer the other side. A Gram matrix does not resolve values below √ε of the largest, but in float64 that is
    1.5e-8, less than the 1.2e-7 of a float32 SVD, so nothing is lost. float64 would lose half its digits and
    takes the SVD.

    Args:
        matrix: `[rows, columns]`, of any floating or complex type; float16 and bfloat16 are computed in float32.
        name: what to call the matrix in an error.

    Returns:
        `[min(rows, columns)]`, descending, real and not negative, of the matrix's precision (float32 for the half types).

    Raises:
        SpectrumError: if it is not a matrix, has no entries, or holds NaN or infinite ones.

    >>> singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
    tensor([4., 3.])
    """
    if matrix.dim() != 2:
        raise SpectrumError(f"{name}: expected a matrix, got shape {tuple(matrix.shape)}. Make one with matricize.")
    matrix = _computable(matrix, name)
    if matrix.dtype == torch.float64 or matrix.is_complex():
        return torch.linalg.svdvals(matrix)
    short = in_float64(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
    return torch.linalg.eigvalsh(short @ short.T).flip(0).clamp_min(0).sqrt().to(matrix.device, matrix.dtype)


def joint_spectrum(matrices: Sequence[Tensor], name: str = "matrices") -> Tensor:
    """Singular values of matrices side by side: the directions that several producers of one width span together.

    Args:
        matrices: one or more, each `[units, columns]` with the same number of units.
        name: what to call them in an error.

    Returns:
        `[min(units, all columns together)]`, descending.

    Raises:
        SpectrumError: if there is none, the numbers of rows differ, or as `singular_values`.

    >>> joint_spectrum([torch.eye(2), torch.eye(2)])
    tensor([1.4142, 1.4142])
    """
    shapes = [tuple(matrix.shape) for matrix in matrices]
    if not shapes or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise SpectrumError(
            f"{name}: expected one or more matrices with the same number of rows, one for each unit, got shapes {shapes}. "
            "Make them with matricize, along the axis of the width."
        )
    return singular_values(torch.cat(list(matrices), dim=1), name)


def output_values(matrix: Tensor, moment: Tensor, name: str = "weight") -> Tensor:
    """Singular values of a layer's output: those of W·S^½, S being the second moment of its input.

    Unlike the spectrum of the weight alone it does not count directions in which the input has no energy.

    Args:
        matrix: `[units, columns]`, from matricize.
        moment: `[columns, columns]` symmetric, E[x·xᵀ] of the input (patches for a convolution, in the order of the
            columns) or its covariance.
        name: what to call the matrix in an error.

    Returns:
        `[units]` float64, descending: square roots of the eigenvalues of W·S·Wᵀ. Values below 1e-8 of the largest are
        rounding.

    Raises:
        SpectrumError: if the shapes do not fit, or entries are NaN or infinite.

    >>> output_values(torch.eye(2), torch.diag(torch.tensor([4.0, 9.0])))
    tensor([3., 2.], dtype=torch.float64)
    """
    if matrix.dim() != 2 or tuple(moment.shape) != (matrix.shape[1],) * 2:
        raise SpectrumError(
            f"{name}: expected a matrix [units, columns] and a moment [columns, columns], got {tuple(matrix.shape)} and "
            f"{tuple(moment.shape)}. Take the moment of the layer's input, of its patches for a convolution."
        )
    rows = in_float64(_computable(matrix, name))
    inner = in_float64(_computable(moment, f"{name}'s moment"), rows.device)
    precision = torch.promote_types(rows.dtype, inner.dtype)
    rows, inner = rows.to(precision), inner.to(precision)
    # Scaled first, products neither overflow nor vanish.
    tall, deep = (part.abs().max().clamp_min(torch.finfo(torch.float64).tiny) for part in (rows, inner))
    gram = (rows / tall) @ (inner / deep) @ (rows / tall).mH
    return torch.linalg.eigvalsh((gram + gram.mH) / 2).flip(0).clamp_min(0).sqrt() * tall * deep.sqrt()


def residual_operator(first: Tensor, second: Tensor) -> Tensor:
    """The weight of the linear part of a residual block, x + B∗(A∗x): the identity included.

    Args:
        first: A, `[mid, in, k…]` or dense `[mid, in]`; odd extents, stride 1, "same" padding.
        second: B, `[in, mid, l…]` of as many axes.

    Returns:
        `[in, in, k + l − 1, …]`: both kernels convolved, with 1 added at the centre of the kernel from each channel to itself.

    Raises:
        SpectrumError: if the shapes do not compose, or an extent is even (it has no centre).

    >>> residual_operator(torch.zeros(4, 3), torch.zeros(3, 4)).diagonal()
    tensor([1., 1., 1.])
    >>> residual_operator(torch.zeros(4, 3, 3, 3), torch.zeros(3, 4, 3, 3)).shape
    torch.Size([3, 3, 5, 5])
    """
    fits = first.dim() == second.dim() and 2 <= first.dim() <= 5 and second.shape[:2] == first.shape[:2][::-1]
    if not fits or any(extent % 2 == 0 for extent in (*first.shape[2:], *second.shape[2:])):
        raise SpectrumError(
            "Residual block: expected weights [mid, in, k…] and [in, mid, l…] with odd extents, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}. A block with a projection has no identity to add."
        )
    one, two = _computable(first, "first weight"), _computable(second, "second weight")
    if one.dim() == 2:
        return two @ one + torch.eye(len(two), dtype=two.dtype, device=two.device)
    space = tuple(range(2, one.dim()))
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(space) - 1]
    # Every input channel of A is a sample; flipping B makes PyTorch's correlation the convolution of the two kernels.
    made = convolve(one.transpose(0, 1), two.flip(space), padding=[extent - 1 for extent in two.shape[2:]])
    made = made.transpose(0, 1)
    centre = tuple(extent // 2 for extent in made.shape[2:])
    made[(slice(None), slice(None), *centre)] += torch.eye(len(two), dtype=two.dtype, device=two.device)
    return made


def energy_shares(values: Values) -> Tensor:
    """Share of the energy, the sum of squared singular values, that each direction carries.

    Args:
        values: `[n]` singular values.

    Returns:
        `[n]` float64 shares that add up to 1, or all 0 if there is no energy at all.

    Raises:
        SpectrumError: if the values are not one axis of finite numbers of 0 or more.

    >>> energy_shares([3.0, 1.0, 0.0])
    tensor([0.9000, 0.1000, 0.0000], dtype=torch.float64)
    """
    return _shares(_spectrum(values).square())


def effective_rank(values: Values) -> float:
    """How many directions a spectrum uses: the exponential of the entropy of the normalised singular values.

    Between 1 and n for any spectrum but zero; n means that all directions are equally strong.
    From Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        values: `[n]` singular values.

    Returns:
        The effective rank in directions, 0 if all values are 0.

    Raises:
        SpectrumError: as `energy_shares`.

    >>> round(effective_rank([2.0, 2.0, 2.0, 0.0]), 6)
    3.0
    """
    shares = _shares(_spectrum(values))
    if not shares.any():
        return 0.0
    return float(torch.special.entr(shares).sum().exp())


def stable_rank(values: Values) -> float:
    """Energy over the energy of the strongest direction, ‖W‖²_F / ‖W‖²₂: a rank that hardly depends on small directions.

    From Rudelson and Vershynin, "Sampling from large matrices", Journal of the ACM 54(4), 2007.

    Args:
        values: `[n]` singular values.

    Returns:
        The stable rank, between 1 and n; 0 if all values are 0.

    Raises:
        SpectrumError: as `energy_shares`.

    >>> stable_rank([2.0, 2.0, 1.0])
    2.25
    """
    shares = energy_shares(values)
    return float(1 / shares.max()) if shares.any() else 0.0


def units_for_energy(values: Values, lost: float) -> int:
    """Fewest directions to keep so that the rest carries together at most the share `lost` of the energy.

    Args:
        values: `[n]` singular values.
        lost: the share that may go, 0 … 1.

    Returns:
        A number of directions from 0 (only if `lost` is 1 or there is no energy) to n.

    Raises:
        SpectrumError: if `lost` lies outside 0 … 1, or as `energy_shares`.

    >>> units_for_energy([3.0, 1.0, 0.1], lost=0.01)
    2
    """
    if not 0 <= lost <= 1:
        raise SpectrumError(f"units_for_energy: expected a share `lost` in 0 … 1, got {lost}.")
    ascending = energy_shares(values).sort().values
    # Added up from the smallest on, so that tiny shares are not swallowed by large ones; a full sum may round above 1.
    tails = ascending.cumsum(0).clamp_max(1)
    return int((tails > lost).sum())


def _computable(weight: Tensor, name: str) -> Tensor:
    """The weight detached, as float32 or float64 or complex, after refusing what has no spectrum."""
    if not (weight.is_floating_point() or weight.is_complex()) or not weight.numel():
        raise SpectrumError(
            f"{name}: expected floating-point or complex entries, got {weight.dtype} of shape {tuple(weight.shape)}. "
            "Dequantise the weight first."
        )
    made = weight.detach()
    made = made.float() if made.element_size() < 4 else made
    broken = int((~made.isfinite()).sum())
    if broken:
        raise SpectrumError(
            f"{name}: expected finite entries, got {broken} NaN or infinite ones of {made.numel()}. "
            "Training has diverged: lower the learning rate, clip gradients, or load an earlier checkpoint."
        )
    return made


def checked_values(values: Values) -> Tensor:
    """The values as `[n]` float64 on the CPU.

    Raises:
        SpectrumError: if they are not one axis of one or more finite numbers of 0 or more.
    """
    made = (
        values.detach() if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.float64, device="cpu")
    )
    made = in_float64(made, "cpu")
    if made.dim() != 1 or not made.numel() or not (made.isfinite() & (made >= 0)).all():
        raise SpectrumError(
            "Singular values: expected one axis of one or more finite numbers of 0 or more, "
            f"got shape {tuple(made.shape)}{f' with a smallest of {made.min()}' if made.numel() else ''}. "
            "Take them from singular_values or joint_spectrum."
        )
    return made


def _spectrum(values: Values) -> Tensor:
    """The values, scaled so that squares neither overflow nor vanish."""
    made = checked_values(values)
    largest = made.max()
    return made / largest if largest > 0 else made


def _shares(amounts: Tensor) -> Tensor:
    """Amounts over their sum; all 0 stays all 0."""
    total = amounts.sum()
    return amounts / total if total > 0 else amounts
