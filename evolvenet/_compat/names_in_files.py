"""Tensors of a file under the names that a model of the transformers library has for them.

Since release 5 the library stores experts one by one and builds them stacked, and it renames modules between file and model.
It does so in `from_pretrained` alone, whose parts are used here. They are reached through `sys.modules`: whoever has such a
model has imported the library, and nobody else needs it.
"""

# The library is not there for the type checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

_LOADING, _MAPPINGS = "transformers.core_model_loading", "transformers.conversion_mapping"


def by_names_of_model(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entries of a state dict, renamed and put together as `from_pretrained` does; None where it has no such rules.

    Args:
        model: any module.
        state: tensors by their names in a file. Shapes play no part.

    Raises:
        Exception: of the library, for tensors that do not fit each other.
    """
    library: Any = sys.modules.get(_LOADING)
    mappings: Any = sys.modules.get(_MAPPINGS)
    if library is None or mappings is None or not hasattr(model, "main_input_name"):
        return None
    rules = mappings.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, library.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, library.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own: dict[str, Any] = dict(model.state_dict())
    base = getattr(model, "base_model_prefix", None)
    due: dict[str, Any] = {}
    for name in sorted(state, key=library.dot_natural_key):
        new, pattern = library.rename_source_key(name, renamings, converters, base, own)
        if new not in own and name in own:
            new, pattern = name, None
        rule = library.WeightRenaming(name, new) if pattern is None else copy.deepcopy(by_pattern[pattern])
        due.setdefault(new, rule).add_tensor(new, name, name if pattern is None else pattern, state[name])
    found: dict[str, Any] = {}
    for new, rule in due.items():
        converted = rule.convert(new, model=model, config=getattr(model, "config", None))
        found.update({key: value[0] if isinstance(value, list) else value for key, value in converted.items()})
    return found
