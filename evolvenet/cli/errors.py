"""What a command reports in one line."""

from __future__ import annotations

from evolvenet.errors import EvolveNetError


class CommandError(EvolveNetError):
    """What was typed cannot be done: the message says what was expected, what was given, and what to type instead."""
