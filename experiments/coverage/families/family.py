"""What the table of transformer families knows about one of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FFN, HEADS, GROUPS, PLACES, STREAM, EXPERTS = "FFN", "heads", "groups", "head dimension", "stream", "experts"
KINDS: tuple[str, ...] = (FFN, HEADS, GROUPS, PLACES, STREAM, EXPERTS)
"""Kinds of units that an architecture can have, in the order of the table's columns."""

WORDS, WIDTH, HEADS_EACH, GROUPS_EACH, PLACES_EACH, INNER, EXPERT, LENGTH = 97, 64, 4, 2, 16, 128, 48, 12
"""Sizes of all families: vocabulary, stream, heads, groups of heads, places of a head, inner units, those of an expert, text."""

Options = Mapping[str, Any]
TEXT: Options = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS_EACH,
    "intermediate_size": INNER, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""What most configurations of texts take."""


@dataclass(frozen=True)
class Family:
    """One family of the transformers library, small and with random weights.

    Args:
        model: name of its class.
        config: name of its configuration's class, or a function that makes a configuration.
        options: of the configuration.
        kinds: of units that the architecture has.
        output: that it is used by; `evolvenet.trace(outputs=…)`.
        inputs: makes those of some samples, of floating-point tensors of a type.
        generates: whether words are generated with it.
        heads: how many an attention has.
        groups: how many heads of keys and values an attention has, where queries share them.
        numbered: what of it gets numbers, so that it can go: the function of `evolvenet.transformers`, "" for nothing.
    """

    model: str
    config: str | Callable[[], Any]
    options: Options = field(default_factory=dict)
    kinds: tuple[str, ...] = (FFN, HEADS, PLACES, STREAM)
    output: str = "logits"
    inputs: Callable[[int, torch.dtype], dict[str, Tensor]] = lambda samples, dtype: words(samples)
    generates: bool = False
    heads: tuple[int, ...] = (HEADS_EACH,)
    groups: tuple[int, ...] = (GROUPS_EACH,)
    numbered: str = ""

    def make(self) -> nn.Module:
        """The model, with the library's random weights; what needs numbers has them."""
        library = importlib.import_module("transformers")
        config = self.config() if callable(self.config) else getattr(library, self.config)(**self.options)
        model = getattr(library, self.model)(config)
        if self.numbered:
            getattr(importlib.import_module("evolvenet.transformers"), self.numbered)(model)
        return model


def words(samples: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Random words, none of them special."""
    return {"input_ids": torch.randint(6, WORDS, (samples, length))}


def words_both_sides(samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Words of an encoder and of a decoder."""
    del dtype
    return {**words(samples), "decoder_input_ids": torch.randint(6, WORDS, (samples, 7))}


def images(side: int) -> Callable[[int, torch.dtype], dict[str, Tensor]]:
    """Makes noise of three colours."""
    return lambda samples, dtype: {"pixel_values": torch.randn(samples, 3, side, side, dtype=dtype)}
