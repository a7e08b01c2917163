"""Inputs that fit a model of the transformers library, made from its configuration alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 12
"""Length of a text."""
SAMPLES_OF_SOUND = 4000
"""Length of a sound: a quarter of a second at 16 kHz."""


def dummy_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """One sample that a model of the transformers library takes; None for other models, and for inputs of unknown kind.

    The main input is made, the decoder's text of a model with encoder and decoder, and image and text of one that compares
    them. Values are the same in every call. Images and the like are noise: they are good for shapes and for comparing two
    models, not for measuring one.

    Args:
        model: any; that it has `config` and `main_input_name` tells what it is.

    >>> dummy_inputs(nn.Linear(2, 2)) is None
    True
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if not isinstance(main, str) or config is None:
        return None
    taken = inspect.signature(model.forward).parameters
    names = [main]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        names.append("decoder_input_ids")
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        names += [name for name in ("input_ids", "pixel_values") if name in taken and name not in names]
    random = torch.Generator().manual_seed(0)
    try:
        made = {name: _MAKERS[name](config, random) for name in names if name in taken}
    except (KeyError, AttributeError, TypeError):
        return None
    own = next(model.parameters(), torch.zeros((), device="cpu"))
    return {name: t.to(own.device, own.dtype if t.is_floating_point() else None) for name, t in made.items()} or None


def _words(config: Any, random: torch.Generator) -> Tensor:
    text = getattr(config, "text_config", config)
    words = torch.randint(min(3, text.vocab_size - 1), text.vocab_size, (1, WORDS), generator=random, device="cpu")
    # A configuration of few words may keep the library's number of the end, which is none of them.
    if isinstance(end := getattr(text, "eos_token_id", None), int) and 0 <= end < text.vocab_size:
        words[:, -1] = end  # a text model may find the end of a text by it
    return words


def _image(config: Any, random: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 64)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return torch.randn(1, getattr(vision, "num_channels", 3), height, width, generator=random, device="cpu")


def _spectrogram(config: Any, random: torch.Generator) -> Tensor:
    return torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=random, device="cpu")


def _sound(config: Any, random: torch.Generator) -> Tensor:
    return torch.randn(1, SAMPLES_OF_SOUND, generator=random, device="cpu")


_MAKERS: Mapping[str, Callable[[Any, torch.Generator], Tensor]] = {
    "input_ids": _words,
    "decoder_input_ids": _words,
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _sound,
}
