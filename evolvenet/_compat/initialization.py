"""Random weights of models of the transformers library: how it makes them, and how it knows which it need not make."""

from __future__ import annotations

from typing import Any

from torch import nn


def initialize(owner: Any, module: nn.Module) -> None:
    """Give one module of a model the random weights that the library gives it.

    Args:
        owner: the `PreTrainedModel` that holds it.
        module: the module.

    Raises:
        Exception: of the library, where its code does not take the module's sizes.
    """
    owner._init_weights(module)


def mark_initialized(module: nn.Module) -> None:
    """Have the library leave a module's tensors as they are."""
    module._is_hf_initialized = True  # type: ignore[assignment]
