"""TF32, which a user has allowed for training, reaches no measurement, and is allowed again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evolvenet.execution.isolation import isolated
from evolvenet.linalg.full_precision import full_precision
from tests.helpers.interpreters import run_script

SETTINGS = {
    "as it is": "pass",
    "precision": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "older name": "torch.backends.cuda.matmul.allow_tf32 = True",
    "convolutions off": "torch.backends.cudnn.allow_tf32 = False",
}
NEWER = {
    "newer name": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "all backends": "torch.backends.fp32_precision = 'tf32'",
    "all exact": "torch.backends.fp32_precision = 'ieee'",
    "a convolution's": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "cuDNN's": "torch.backends.cudnn.fp32_precision = 'tf32'",
}
if hasattr(torch.backends, "fp32_precision"):
    SETTINGS |= NEWER
SCRIPT = """
import torch
from evolvenet.linalg.full_precision import full_precision
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
READ = ("torch.get_float32_matmul_precision()", "matmul.allow_tf32", "cudnn.allow_tf32", "matmul.fp32_precision",
        "cudnn.conv.fp32_precision", "cudnn.rnn.fp32_precision", "torch.backends.fp32_precision")
def state():
    found = []
    for each in READ:
        try:
            found.append(eval(each))
        except (RuntimeError, AttributeError) as error:
            found.append(type(error).__name__)
    return found
def reset():
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True
    for backend in (torch.backends, matmul, cudnn, cudnn.conv, cudnn.rnn) if hasattr(torch.backends, "fp32_precision") else ():
        backend.fp32_precision = "none"
    if hasattr(torch.backends, "fp32_precision"):
        cudnn.allow_tf32 = True
for setting in {settings}:
    reset()
    exec(setting)
    before = state()
    with full_precision():
        inside = state()
    print(before == state(), True in inside, "tf32" in inside[3:6], inside[0] in ("highest", "RuntimeError"))
"""


def test_no_setting_allows_it_inside_and_every_setting_is_as_before_afterwards() -> None:
    found = run_script(SCRIPT.format(settings=list(SETTINGS.values())))
    assert dict(zip(SETTINGS, found, strict=True)) == dict.fromkeys(SETTINGS, "True False False True")


@pytest.fixture
def allowed() -> Iterator[None]:
    before: Any = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("allowed")
def test_a_model_that_is_measured_runs_without_it() -> None:
    with isolated(torch.nn.Linear(1, 1)):
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.usefixtures("allowed")
def test_products_on_the_gpu_have_all_their_digits() -> None:
    x = torch.randn(256, 256, device="cuda")
    exact = x.double() @ x.double()
    with full_precision():
        apart = float(((x @ x).double() - exact).norm() / exact.norm())
    assert apart < 1e-6
