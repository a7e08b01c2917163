"""Lightning's callbacks that average weights."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import callbacks


def weight_averaging(name: str = "EMAWeightAveraging", **options: Any) -> Any:
    """One of Lightning's averages of weights; the test is skipped under a release that has none (before 2.6)."""
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    return getattr(callbacks, name)(**options)
