"""Weights that torch's older functions compute in a hook before each forward pass: `weight_norm`, `spectral_norm`, `prune`.

The module then holds the tensors that the weight is computed from (`weight_g` and `weight_v`, `weight_orig`), and the weight
itself as a plain attribute that is only as new as the last forward pass.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from evolvenet._compat.torch import forward_hooks, masked_name


@singledispatch
def _source(hook: Any) -> tuple[str, str] | None:
    """(name of the computed weight, name of the tensor that has its shape); None for any other hook."""
    return None


@_source.register
def _(hook: WeightNorm) -> tuple[str, str]:
    return hook.name, f"{hook.name}_v"


@_source.register
def _(hook: SpectralNorm) -> tuple[str, str]:
    return hook.name, f"{hook.name}_orig"


@_source.register
def _(hook: BasePruningMethod) -> tuple[str, str]:
    return masked_name(hook), f"{masked_name(hook)}_orig"


@singledispatch
def _computed(hook: Any, module: nn.Module) -> Tensor:
    """The weight that the hook computes."""
    raise AssertionError(f"no source without a weight: {type(hook).__name__}")


@_computed.register
def _(hook: WeightNorm, module: nn.Module) -> Tensor:
    return hook.compute_weight(module)


@_computed.register
def _(hook: SpectralNorm, module: nn.Module) -> Tensor:
    return hook.compute_weight(module, do_power_iteration=False)


@_computed.register
def _(hook: BasePruningMethod, module: nn.Module) -> Tensor:
    return cast(Any, hook).apply_mask(module)


def hook_sources(module: nn.Module) -> dict[str, str]:
    """{tensor that a hook computes: the module's own tensor with its shape}; empty for most modules.

    >>> hook_sources(nn.utils.spectral_norm(nn.Linear(4, 3))), hook_sources(nn.Linear(4, 3))
    ({'weight': 'weight_orig'}, {})
    """
    found = [_source(hook) for hook in forward_hooks(module)]
    return dict(pair for pair in found if pair is not None)


def hook_unit_value(module: nn.Module, name: str, dim: int) -> float:
    """Value of new units' entries along an axis of a module's tensor; 0 for those that no hook gives another one.

    A direction of length 0 would be normalized to 0/0, so it is filled with ones, and its length, in `weight_g`, is 0. Masks
    are 1: what is masked cannot be trained.
    """
    return float(any(_is_one(hook, name, dim) for hook in forward_hooks(module)))


@singledispatch
def _is_one(hook: Any, name: str, dim: int) -> bool:
    return False


@_is_one.register
def _(hook: WeightNorm, name: str, dim: int) -> bool:
    return name == f"{hook.name}_v" and dim == hook.dim


@_is_one.register
def _(hook: BasePruningMethod, name: str, dim: int) -> bool:
    return name == f"{masked_name(hook)}_mask"


@torch.no_grad()
def recompute(module: nn.Module) -> None:
    """Compute a module's hooked weights from its tensors as they are now."""
    for hook in forward_hooks(module):
        if (pair := _source(hook)) is not None:
            setattr(module, pair[0], _computed(hook, module))
