"""The edge to the transformers library: `WidthEvolutionCallback`. May import everything but the other edges."""

from evolvenet.transformers.callback import WidthEvolutionCallback

__all__ = ["WidthEvolutionCallback"]
