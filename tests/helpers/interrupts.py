"""Something done at a chosen moment: at the n-th call or return of a function, Python's or another, within a body."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def at_call(number: int, function: Callable[[], Any], act: Callable[[], Any]) -> int:
    """Call a function, and at so many calls and returns within it another one, once.

    Returns:
        How many there were in all.
    """
    calls = 0

    def profile(frame: FrameType, kind: str, argument: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            act()

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls
