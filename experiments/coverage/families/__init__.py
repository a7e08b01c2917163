"""Families of the transformers library, small: `FAMILIES` by name, for `experiments.coverage`."""

from __future__ import annotations

from experiments.coverage.families.family import Family
from experiments.coverage.families.mixed import PAIRS, SOUNDS_AND_MORE
from experiments.coverage.families.text import DECODERS, ENCODERS, MIXTURES, RECURRENCES
from experiments.coverage.families.vision import IMAGES

FAMILIES: dict[str, Family] = {
    **DECODERS,
    **MIXTURES,
    **RECURRENCES,
    **ENCODERS,
    **PAIRS,
    **SOUNDS_AND_MORE,
    **IMAGES,
}
"""Every family of the table."""
