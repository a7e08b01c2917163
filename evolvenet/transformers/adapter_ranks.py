"""What PEFT notes of the ranks of its LoRA adapters, after they have changed: so that PEFT alone saves, loads and merges them.

The rank of an adapter is a width, from the rows of A to the columns of B. Each layer keeps its scaling, alpha / r, so that a
change of rank leaves the function as it is; r is noted in the layer and in the adapter's configuration as `rank_pattern`,
and as alpha the number that gives the same scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from evolvenet._compat.torch import load_state_dict_pre_hooks
from evolvenet.surgery.checkpoint import fit_shapes
from evolvenet.transformers.adapters import is_adapted


def note_ranks(model: nn.Module) -> None:
    """Note the ranks of all adapters, as their tensors have them, in PEFT's layers and configurations.

    Args:
        model: a `PeftModel`; any other model is left as it is.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    >>> layer = model.base_model.model[0]
    >>> layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    >>> note_ranks(model)
    >>> layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"], model.peft_config["default"].rank_pattern
    (2, 4.0, 2.0, {'0': 2})
    """
    if not is_adapted(model):
        return
    configs: Any = model.peft_config
    adapted: Any = model
    for path, module in adapted.get_base_model().named_modules():
        layer: Any = module
        factors = getattr(layer, "lora_A", None)
        for name in factors if isinstance(factors, nn.ModuleDict) else ():
            config: Any = configs.get(name)
            rank = int(factors[name].weight.shape[0])  # type: ignore[index, union-attr]
            if config is None or layer.r[name] == rank:
                continue
            layer.r[name] = rank
            layer.lora_alpha[name] = layer.scaling[name] * (math.sqrt(rank) if config.use_rslora else rank)
            config.rank_pattern = {**(config.rank_pattern or {}), path: rank}
            config.alpha_pattern = {**(config.alpha_pattern or {}), path: layer.lora_alpha[name]}


def register_ranks_before_load(model: nn.Module) -> None:
    """Let a `PeftModel` take the ranks of the adapters that it loads. PEFT loads them alone, as a state dict without the base."""
    if fit_ranks not in load_state_dict_pre_hooks(model):
        model.register_load_state_dict_pre_hook(fit_ranks)


def fit_ranks(module: nn.Module, state: Mapping[str, Any], prefix: str, *unused: Any) -> None:
    """Give adapters the shapes that they have in a state dict, before it is loaded.

    Raises:
        RecordError: if a tensor has shapes that no change of ranks leads to.
    """
    fit_shapes(module, {name: tensor for name, tensor in state.items() if ".lora_" in name}, prefix)
    note_ranks(module)
