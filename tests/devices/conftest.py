"""The devices that every test here runs on. Where no C++ compiler is, the CPU alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.devices import Device, device_named

if torch.cuda.is_available():
    # torch has one accelerator in a process.
    NAMES: list[Any] = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
else:
    NAMES = ["cpu"]
    try:
        # Imported while tests are collected: the device must be there before the first backward pass of the process.
        from tests.helpers import pretend_device
    except (ImportError, OSError, RuntimeError) as error:  # no compiler, no headers
        warnings.warn(f"The pretend device could not be built, so tests run on the CPU alone: {error}", stacklevel=1)
    else:
        assert pretend_device
        NAMES += ["pretend", "pretend_mps"]


@pytest.fixture(params=NAMES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The CPU; the pretend accelerator, with float64 and without, as MPS is; CUDA where there is a GPU."""
    with device_named(request.param) as found:
        yield found
