"""LightningModules of many kinds, written as their authors would: nothing in them is about EvolveNet.

Each makes its own data and optimizers. `ZOO` says of each what a short fit with `WidthEvolution` is expected to do.
"""

from __future__ import annotations

from tests.helpers.zoo.control import CONTROL
from tests.helpers.zoo.embeddings import EMBEDDINGS
from tests.helpers.zoo.entry import Entry
from tests.helpers.zoo.further import FURTHER
from tests.helpers.zoo.generative import GENERATIVE
from tests.helpers.zoo.sequences import SEQUENCES
from tests.helpers.zoo.tabular import TABULAR
from tests.helpers.zoo.vision import VISION

ZOO: dict[str, Entry] = {**GENERATIVE, **EMBEDDINGS, **VISION, **SEQUENCES, **CONTROL, **TABULAR, **FURTHER}
