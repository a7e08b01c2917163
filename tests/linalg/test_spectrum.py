"""Spectra against NumPy's SVD in float64, and the rank measures against their formulas written out."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolvenet.errors import SpectrumError
from evolvenet.linalg.spectrum import (
    effective_rank,
    energy_shares,
    joint_spectrum,
    matricize,
    output_values,
    residual_operator,
    singular_values,
    stable_rank,
    units_for_energy,
)

VALUES = st.lists(st.just(0.0) | st.floats(1e-9, 1e-3) | st.floats(1e-3, 1e6), min_size=1, max_size=12)
SIZES = st.integers(1, 24)


@pytest.mark.parametrize(
    ("layer", "dim", "rows", "columns"),
    [
        (torch.nn.Linear(5, 7), 0, 7, 5),
        (torch.nn.Conv1d(3, 6, 4), 0, 6, 12),
        (torch.nn.Conv2d(4, 6, (3, 2), groups=2), 0, 6, 12),
        (torch.nn.Conv3d(2, 5, 2), 0, 5, 16),
        (torch.nn.ConvTranspose2d(4, 6, 3), 1, 6, 36),
        (torch.nn.ConvTranspose1d(4, 6, 3), -2, 6, 12),
    ],
)
def test_matricize_puts_one_unit_in_each_row(layer: torch.nn.Module, dim: int, rows: int, columns: int) -> None:
    weight = layer.get_parameter("weight")
    made = matricize(weight, dim)
    assert made.shape == (rows, columns)
    assert not made.requires_grad
    for unit in range(rows):
        assert torch.equal(made[unit], weight.detach().select(dim, unit).flatten())


def test_matricize_is_the_same_in_channels_last() -> None:
    weight = torch.randn(6, 4, 3, 3)
    assert torch.equal(matricize(weight.to(memory_format=torch.channels_last)), matricize(weight))


@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 10_000))
def test_singular_values_are_numpys(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    truth = np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix).numpy(), truth, rtol=1e-12, atol=1e-13 * truth[0])
    single = singular_values(matrix.float())
    assert single.dtype == torch.float32
    assert (single[:-1] >= single[1:]).all()
    np.testing.assert_allclose(single.numpy(), truth, rtol=0, atol=4e-7 * truth[0])


def test_float32_resolves_no_less_than_an_svd_in_float32() -> None:
    left, right = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q for _ in range(2))
    matrix = ((left * torch.logspace(0, -12, 40, dtype=torch.float64)) @ right).float()
    truth = torch.from_numpy(np.linalg.svd(matrix.double().numpy(), compute_uv=False))
    ours = (singular_values(matrix).double() - truth).abs().max()
    plain = (torch.linalg.svdvals(matrix).double() - truth).abs().max()
    assert ours <= max(float(plain), 6e-8)


@pytest.mark.parametrize(
    ("shape", "dtype", "way"),
    [
        ((4, 6), torch.float32, "eigvalsh"),
        ((64, 576), torch.float32, "eigvalsh"),
        ((576, 64), torch.float32, "eigvalsh"),
        ((64, 64), torch.float32, "eigvalsh"),
        ((64, 576), torch.float16, "eigvalsh"),
        ((64, 576), torch.bfloat16, "eigvalsh"),
        ((64, 576), torch.float64, "svdvals"),
        ((4, 6), torch.float64, "svdvals"),
    ],
    ids=str,
)
def test_the_gram_matrix_is_taken_where_it_is_as_accurate(
    shape: tuple[int, int], dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By type alone: for float32 no size was found at which the SVD is much cheaper, for float64 half the digits go."""
    sides = []
    for name in ("eigvalsh", "svdvals"):
        original = getattr(torch.linalg, name)

        def noted(matrix: torch.Tensor, name: str = name, original: Callable = original) -> torch.Tensor:
            sides.append((name, tuple(matrix.shape), matrix.dtype))
            return original(matrix)

        monkeypatch.setattr(torch.linalg, name, noted)
    singular_values(torch.randn(shape).to(dtype))
    expected = (min(shape),) * 2 if way == "eigvalsh" else shape
    assert sides == [(way, expected, torch.float64)]


@given(
    rows=SIZES,
    columns=SIZES,
    decades=st.floats(0, 12),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 10_000),
)
def test_the_gram_matrix_costs_no_digit_of_float32(
    rows: int, columns: int, decades: float, scale: float, seed: int
) -> None:
    """Whatever the spectrum: no value is further from the exact one than float32 can represent, 6e-8 of the largest."""
    made = np.random.default_rng(seed)
    least = min(rows, columns)
    left, right = (np.linalg.qr(made.standard_normal((side, side)))[0][:, :least] for side in (rows, columns))
    matrix = torch.from_numpy(scale * (left * np.logspace(0, -decades, least)) @ right.T).float()
    truth = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix).double().numpy(), truth, rtol=6e-8, atol=2e-8 * truth[0])


def test_float64_resolves_what_a_gram_matrix_would_not() -> None:
    left, right = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q for _ in range(2))
    truth = torch.logspace(0, -11, 8, dtype=torch.float64)
    torch.testing.assert_close(singular_values((left * truth) @ right), truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 5, 3, 3).to(dtype)
    made = singular_values(matricize(weight))
    assert made.dtype == torch.float32
    truth = np.linalg.svd(weight.double().numpy().reshape(12, -1), compute_uv=False)
    np.testing.assert_allclose(made.numpy(), truth, rtol=1e-5)
    assert singular_values(matricize(weight).to(dtype)).dtype == torch.float32


def test_extreme_scales_neither_overflow_nor_vanish() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for scale in (1e37, 1e-37):
        assert torch.allclose(singular_values(matrix * scale) / scale, torch.tensor([3.0, 2.0, 1.0]), rtol=1e-5)
    for scale in (1e-300, 1e150):
        exact = torch.eye(3, dtype=torch.float64) * scale
        expected = exact.diagonal()
        torch.testing.assert_close(singular_values(exact), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(output_values(exact, torch.eye(3)), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(output_values(torch.eye(3), exact), expected.sqrt(), rtol=1e-12, atol=0)
    assert not output_values(torch.zeros(3, 2), torch.zeros(2, 2)).any()
    assert energy_shares([3e200, 1e200]).tolist() == pytest.approx([0.9, 0.1])
    assert energy_shares([3e-200, 1e-200]).tolist() == pytest.approx([0.9, 0.1])


def test_weights_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    before = weight.detach().clone()
    singular_values(matricize(weight))
    assert torch.equal(weight, before)
    assert weight.grad is None


def test_joint_spectrum_is_that_of_the_matrices_side_by_side() -> None:
    parts = [torch.randn(6, columns, dtype=torch.float64) for columns in (2, 9, 1)]
    truth = np.linalg.svd(np.concatenate([part.numpy() for part in parts], axis=1), compute_uv=False)
    np.testing.assert_allclose(joint_spectrum(parts).numpy(), truth, rtol=1e-12)
    assert torch.equal(joint_spectrum(parts[:1]), singular_values(parts[0]))


@given(values=VALUES)
def test_measures_match_their_formulas(values: list[float]) -> None:
    energy, total = sum(v * v for v in values), sum(values)
    if not energy:
        assert not energy_shares(values).any()
        assert effective_rank(values) == stable_rank(values) == units_for_energy(values, 0.5) == 0
        return
    assert energy_shares(values).tolist() == pytest.approx([v * v / energy for v in values], abs=1e-12)
    entropy = -sum(v / total * math.log(v / total) for v in values if v / total > 0)
    assert effective_rank(values) == pytest.approx(math.exp(entropy), rel=1e-9)
    assert stable_rank(values) == pytest.approx(energy / max(values) ** 2, rel=1e-9)
    assert 1 - 1e-9 <= effective_rank(torch.tensor(values, dtype=torch.float64)) <= len(values) + 1e-9


@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 999))
def test_measures_of_a_matrix(rows: int, columns: int, seed: int) -> None:
    """Norms and projections of the matrix itself, without its singular values."""
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    values = singular_values(torch.from_numpy(matrix))
    ratio = np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2
    assert stable_rank(values) == pytest.approx(ratio, rel=1e-9)
    left = np.linalg.svd(matrix)[0]
    shares = [np.linalg.norm(left[:, k] @ matrix) ** 2 / np.linalg.norm(matrix) ** 2 for k in range(min(rows, columns))]
    np.testing.assert_allclose(energy_shares(values), shares, rtol=1e-8, atol=1e-12)
    p = np.abs(values.numpy()) / np.abs(values.numpy()).sum()
    assert effective_rank(values) == pytest.approx(np.prod(p**-p), rel=1e-9)


@given(values=st.lists(st.integers(0, 1000), min_size=1, max_size=12), lost=st.floats(0, 1))
def test_units_for_energy_is_the_smallest_number_that_will_do(values: list[int], lost: float) -> None:
    ordered = sorted(values, reverse=True)
    kept = units_for_energy([float(value) for value in ordered], lost)
    energies = [value * value for value in ordered]
    # A share equal to `lost` up to rounding may fall on either side.
    assert sum(energies[kept:]) <= (lost + 1e-12) * sum(energies)
    assert kept == 0 or sum(energies[kept - 1 :]) > (lost - 1e-12) * sum(energies)


def test_units_for_energy_at_the_ends() -> None:
    assert units_for_energy([3.0, 2.0, 0.0, 0.0], 0.0) == 2
    assert units_for_energy([3.0, 2.0, 1e-12], 0.0) == 3
    assert units_for_energy([0.1] * 7, 1.0) == 0
    assert units_for_energy([0.1, 3.0], 0.1) == 1


def test_a_flat_spectrum_has_full_rank_and_a_single_direction_rank_one() -> None:
    assert effective_rank([2.0] * 9) == pytest.approx(9)
    assert effective_rank([2.0, 0.0, 0.0]) == pytest.approx(1)
    assert stable_rank([2.0] * 9) == pytest.approx(9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_refused_by_name(bad: float) -> None:
    weight = torch.randn(4, 3)
    weight[2, 1] = bad
    for call in (matricize, singular_values):
        with pytest.raises(SpectrumError, match=r"conv1.weight: .*finite.*1 NaN or infinite.*of 12.*learning rate"):
            call(weight, name="conv1.weight")
    with pytest.raises(SpectrumError, match="finite"):
        joint_spectrum([torch.randn(4, 2), weight])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: matricize(torch.zeros(4), name="fc.bias"), r"fc\.bias.*two axes.*\(4,\)"),
        (lambda: matricize(torch.zeros(4, 2), dim=2), "dim=2"),
        (lambda: matricize(torch.zeros(4, 2, dtype=torch.int8)), "int8.*Dequantise"),
        (lambda: matricize(torch.zeros(0, 2)), r"\(0, 2\)"),
        (lambda: singular_values(torch.zeros(4, 2, 3)), "expected a matrix"),
        (lambda: joint_spectrum([]), "one or more matrices"),
        (lambda: joint_spectrum([torch.zeros(4, 2), torch.zeros(3, 2)]), r"same number of rows.*\(3, 2\)"),
        (lambda: energy_shares([]), "one or more finite"),
        (lambda: effective_rank([1.0, -1.0]), "smallest of -1"),
        (lambda: stable_rank(torch.ones(2, 2)), r"one axis.*\(2, 2\)"),
        (lambda: units_for_energy([1.0, math.nan], 0.1), "finite"),
        (lambda: units_for_energy([1.0], -0.1), r"0 … 1, got -0\.1"),
        (lambda: units_for_energy([1.0], math.nan), "got nan"),
    ],
)
def test_what_has_no_spectrum_is_refused(call, text: str) -> None:
    with pytest.raises(SpectrumError, match=text):
        call()


@given(rows=SIZES, columns=SIZES, samples=st.integers(1, 40), seed=st.integers(0, 999))
def test_output_values_are_those_of_the_outputs(rows: int, columns: int, samples: int, seed: int) -> None:
    made = np.random.default_rng(seed)
    weight, inputs = made.standard_normal((rows, columns)), made.standard_normal((samples, columns))
    expected = np.zeros(rows)
    found = np.linalg.svd(weight @ inputs.T / math.sqrt(samples), compute_uv=False)
    expected[: len(found)] = found
    moment = torch.from_numpy(inputs.T @ inputs / samples)
    got = output_values(torch.from_numpy(weight), moment)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7 * max(expected))


@pytest.mark.parametrize("extents", [(), (3,), (3, 5), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("seconds", [1, 3])
def test_the_residual_operator_does_what_the_block_does(extents: tuple[int, ...], seconds: int) -> None:
    torch.manual_seed(0)
    second = tuple(seconds for _ in extents)
    first_weight = torch.randn(4, 3, *extents, dtype=torch.float64)
    second_weight = torch.randn(3, 4, *second, dtype=torch.float64)
    x = torch.randn(2, 3, *[11 for _ in extents], dtype=torch.float64)
    whole = residual_operator(first_weight, second_weight)
    if not extents:
        torch.testing.assert_close(x @ whole.T, x + x @ first_weight.T @ second_weight.T)
        return
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(extents) - 1]
    block = x + convolve(
        convolve(x, first_weight, padding=[k // 2 for k in extents]), second_weight, padding=[k // 2 for k in second]
    )
    at_once = convolve(x, whole, padding=[k // 2 for k in whole.shape[2:]])
    inner = (..., *[slice(4, -4) for _ in extents])  # at the borders the block pads twice
    torch.testing.assert_close(at_once[inner], block[inner])


@pytest.mark.parametrize(("first", "second"), [((4, 3), (5, 4)), ((4, 3, 2, 2), (3, 4, 3, 3)), ((4, 3), (3, 4, 1, 1))])
def test_blocks_without_an_identity_are_refused(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(SpectrumError, match="odd extents"):
        residual_operator(torch.zeros(first), torch.zeros(second))


def test_output_values_refuse_what_does_not_fit() -> None:
    with pytest.raises(SpectrumError, match=r"\(2, 3\) and \(2, 2\)"):
        output_values(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(SpectrumError, match="moment"):
        output_values(torch.zeros(2, 2), torch.full((2, 2), float("nan")))
