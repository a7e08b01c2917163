"""The edge to the transformers library: its `Trainer`, its folders of models. May import everything but the other edges."""

# First: it names the package that is missing.
from evolvenet.transformers.callback import WidthEvolutionCallback  # isort: skip

from evolvenet.transformers.alibi import number_alibi_heads
from evolvenet.transformers.positions import number_position_channels
from evolvenet.transformers.pretrained import from_pretrained, save_pretrained

__all__ = [
    "WidthEvolutionCallback",
    "from_pretrained",
    "number_alibi_heads",
    "number_position_channels",
    "save_pretrained",
]
