"""Statistics are those of full precision, whatever is set for training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from evolvenet.linalg.full_precision import full_precision
from evolvenet.linalg.ridge import refit
from evolvenet.measurement.activation_moments import Moments


@pytest.fixture(params=["high", "medium"])
def coarse(request: pytest.FixtureRequest) -> Iterator[str]:
    """TF32, or bfloat16, for products of float32 matrices, where the machine has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_moments_and_refits_are_those_of_full_precision(coarse: str) -> None:
    torch.manual_seed(0)
    x, weight, odd = torch.randn(512, 128), torch.randn(64, 128), torch.arange(512) % 2 == 1
    found = Moments.of(x).covariance, refit(x, x @ weight.T, torch.zeros(64, 128), torch.zeros(64), odd)
    assert torch.get_float32_matmul_precision() == coarse
    exact = torch.cov(x.double().T, correction=0)
    assert (found[0] - exact).abs().max() < 1e-6
    with full_precision():
        expected = refit(x, x @ weight.T, torch.zeros(64, 128), torch.zeros(64), odd)
    assert found[1] is not None
    assert expected is not None
    assert (found[1][0] - expected[0]).norm() < 0.02 * expected[0].norm(), "the targets alone are coarse"


def test_the_settings_come_back_also_after_an_error(coarse: str) -> None:
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError, match="anything"), full_precision():
        raise RuntimeError("anything")
    assert torch.get_float32_matmul_precision() == coarse
