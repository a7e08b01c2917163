"""Runs of a model that end as soon as what is wanted of them is known."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from evolvenet.execution.step import run_model


class Finished(BaseException):
    """Ends a run from within an op. No `Exception`: the model's own code may catch these."""


def run_until_finished(model: nn.Module, inputs: Any) -> None:
    """Run a model until its end, or until a callback raises `Finished`.

    >>> def stop(*_):
    ...     raise Finished
    >>> _ = (model := nn.Linear(2, 3)).register_forward_hook(stop)
    >>> run_until_finished(model, Tensor([[1.0, 2.0]]))
    """
    with suppress(Finished):
        run_model(model, inputs)


def without_logits(model: nn.Module, inputs: Any, needed: Collection[Tensor]) -> Any:
    """The inputs of a language model such that it computes the logits of one word instead of all.

    They are a fifth of the work and most of the memory of a small model with a large vocabulary. Models of the transformers
    library say by an argument `logits_to_keep` that they can do so.

    Args:
        model: any module.
        inputs: of the model; as they are if it has no such argument, or gets labels.
        needed: weights whose inputs or outputs are needed at all places: as they are if the head is one of them.
    """
    head = getattr(model, "get_output_embeddings", None)
    if not isinstance(inputs, dict) or not callable(head) or {"labels", "logits_to_keep"} & set(inputs):
        return inputs
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return inputs
    weight = getattr(head(), "weight", None)
    if weight is None or any(weight is each for each in needed):
        return inputs
    return {**inputs, "logits_to_keep": 1}


def without_cache(model: nn.Module, inputs: Any) -> Any:
    """The inputs of a language model such that it keeps no keys and values of all layers for words to come.

    For some thousand words these take half as much memory as the weights of a small model. Models of the transformers library
    say by an argument `use_cache` that they can do without.

    Args:
        model: any module.
        inputs: of the model; as they are if it has no such argument, or they hold it, or former keys and values.
    """
    if not isinstance(inputs, dict) or {"use_cache", "past_key_values"} & set(inputs):
        return inputs
    known = hasattr(model, "main_input_name") and "use_cache" in inspect.signature(model.forward).parameters
    return {**inputs, "use_cache": False} if known else inputs
