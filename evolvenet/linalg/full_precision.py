"""Products of float32 matrices in full precision, whatever is set for training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch

EXACT = "ieee"
"""float32 as it is; torch's other values are "tf32", "bf16" and "none", which takes what is set for all backends."""


@contextmanager
def full_precision() -> Generator[None]:
    """Matrix products of float32 are computed in float32 inside of it, not in TF32 or bfloat16; then all is set as before.

    TF32 keeps 10 bits of each factor: enough for a training step, too few for second moments, of which the small
    eigenvalues count.

    >>> with full_precision():
    ...     (torch.eye(2) @ torch.eye(2)).trace()
    tensor(2.)
    """
    backends = [cast(Any, backend).matmul for backend in (torch.backends.cuda, torch.backends.mkldnn) if _has(backend)]
    if not backends:
        # torch 2.8 knows one setting for all backends.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # The setting for all backends raises where these have been used, so it is not read.
    settings: list[str] = [backend.fp32_precision for backend in backends]
    try:
        _set(backends, [EXACT] * len(backends))
        yield
    finally:
        _set(backends, settings)


def _has(backend: Any) -> bool:
    return hasattr(getattr(backend, "matmul", None), "fp32_precision")


def _set(backends: list[Any], values: list[str]) -> None:
    for backend, value in zip(backends, values, strict=True):
        if backend.fp32_precision != value:
            backend.fp32_precision = value
