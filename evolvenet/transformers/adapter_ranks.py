"""What PEFT notes of the ranks of its LoRA adapters, after they have changed: so that PEFT alone saves, loads and merges them.

The rank of an adapter is a width, from the rows of A to the columns of B. Each layer keeps its scaling, alpha / r, so that a
change of rank leaves the function as it is; r is noted in the layer and in the adapter's configuration as `rank_pattern`,
and as alpha the number that gives the same scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from evolvenet._compat.torch import load_state_dict_pre_hooks
from evolvenet.surgery.checkpoint import fit_shapes
from evolvenet.transformers.adapters import is_adapted
from evolvenet.transformers.rank_patterns import alpha_of, ranks_of, write_ranks


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
    adapted: Any = model
    base = adapted.get_base_model()
    for name, config in adapted.peft_config.items():
        ranks = ranks_of(base, name)
        layers: dict[str, Any] = {path: base.get_submodule(path) for path in ranks}
        changed = {path: rank for path, (rank, _) in ranks.items() if layers[path].r[name] != rank}
        for path, rank in changed.items():
            layer = layers[path]
            layer.r[name] = rank
            layer.lora_alpha[name] = alpha_of(config, rank, layer.scaling[name])
        if changed:
            write_ranks(config, ranks)


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
