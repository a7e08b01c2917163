"""The version of what EvolveNet writes into checkpoints and files: older ones are read, newer ones are refused.

The number rises when an older EvolveNet would read wrongly, or not at all, what a newer one writes. What was written before
there was a number counts as version 0. An entry that older versions pass over is no reason to raise it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from evolvenet.errors import RecordError

FORMAT = 2
"""The version that is written, and the newest that is read."""
FORMAT_KEY = "format"
"""The entry of a state that holds its version."""

State = TypeVar("State", bound=Mapping[str, Any])


def checked_format(state: State, what: str) -> State:
    """The same state, if this EvolveNet reads its version.

    Args:
        state: written by this or another version of EvolveNet.
        what: it is, for the message.

    Raises:
        RecordError: for a newer version, or one that is no whole number.

    >>> checked_format({"format": 1, "numbers": []}, "The record of widths")["numbers"], checked_format({}, "An older one")
    ([], {})
    >>> checked_format({"format": 9}, "The state of WidthEvolution")
    Traceback (most recent call last):
    ...
    evolvenet.errors.RecordError: The state of WidthEvolution is of format 9: expected format 2 or older, which is what this...
    """
    found = state.get(FORMAT_KEY, 0)
    if type(found) is int and 0 <= found <= FORMAT:
        return state
    raise RecordError(
        f"{what} is of format {found!r}: expected format {FORMAT} or older, which is what this EvolveNet reads. A newer one has "
        "written it. Install that version, or a later one, to load it."
    )
