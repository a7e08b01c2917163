"""Products of float32 numbers with all of their digits, whatever the user has allowed for training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch


@contextmanager
def full_precision() -> Generator[None]:
    """No TF32 and no bfloat16 within float32 products and convolutions; on leaving, the settings are as before.

    TF32 keeps 10 bits of each factor. That is enough for a training step, not for second moments, of which the small
    eigenvalues count, nor for fits and comparisons. torch has two sets of names for these settings, and reading one raises
    where the user has set the other.

    >>> torch.set_float32_matmul_precision("high")
    >>> with full_precision():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'high'
    >>> torch.set_float32_matmul_precision("highest")
    """
    with ExitStack() as stack:
        for switch_off in (_products, _convolutions):
            stack.callback(switch_off())
        yield


def _products() -> Callable[[], None]:
    """Switch reduced precision off in matrix products; returns what puts the setting back."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # The newer names have been set.
        backends = (torch.backends.cuda, torch.backends.mkldnn)
        parts = [getattr(backend, "matmul", None) for backend in backends]
        undo = [_newer(part) for part in parts if hasattr(part, "fp32_precision")]
        return partial(_all, undo)
    if before == "highest":
        return _nothing
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


def _convolutions() -> Callable[[], None]:
    """The same in convolutions and recurrent layers."""
    cudnn, mkldnn = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
    undo: list[Callable[[], None]] = []
    try:
        if cudnn.allow_tf32:
            cudnn.allow_tf32 = False
            undo.append(partial(setattr, cudnn, "allow_tf32", True))
    except RuntimeError:  # The newer names have been set.
        pass
    # They may still go by the setting for all backends.
    parts = [getattr(backend, name, None) for backend in (cudnn, mkldnn) for name in ("conv", "rnn")]
    undo += [_newer(part) for part in parts if getattr(part, "fp32_precision", None) in ("tf32", "bf16")]
    return partial(_all, undo)


def _all(undo: list[Callable[[], None]]) -> None:
    for restore in reversed(undo):
        restore()


def _newer(backend: Any) -> Callable[[], None]:
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"

    def restore() -> None:
        backend.fp32_precision = "none"
        # What went by the setting for all backends goes by it again.
        if backend.fp32_precision != before:
            backend.fp32_precision = before

    return restore


def _nothing() -> None:
    pass
