"""The eps of a model's norms, which growth of a stream rescales, and the fields of its configuration that say them."""

# nn.Module.named_modules has no full type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def with_eps_of(model: PreTrainedModel, config: Any) -> Any:
    """A copy of a configuration with the eps of the model's norms, where all that had the value of a field agree in another.

    Args:
        model: its class counts, and its eps.
        config: of that class.
    """
    made = copy.deepcopy(config)
    own, built = _eps(model), _eps_of_built(model, config)
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "eps" in name:
            new = {own[key] for key, old in built.items() if old == value and key in own}
            if len(new) == 1:
                setattr(made, name, new.pop())
    return made


def has_eps_of(model: PreTrainedModel, config: Any) -> bool:
    """Whether a configuration builds norms of the eps that the model's norms have."""
    return _eps(model) == _eps_of_built(model, config)


def _eps_of_built(model: PreTrainedModel, config: Any) -> dict[tuple[str, str], float]:
    kind: Any = type(model)
    with torch.device("meta"):
        return _eps(kind(copy.deepcopy(config)))


def _eps(model: nn.Module) -> dict[tuple[str, str], float]:
    """{(path, name): value} of the numbers called eps in modules."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and "eps" in name
    }
