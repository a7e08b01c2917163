"""Which layers of a model can be factorized, and why the others cannot."""

# nn.Module.named_modules has no full type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from evolvenet._compat.torch import parameter_table, plain_attributes, runs_forward_of
from evolvenet.lowrank.attention import SplitAttention, refusal
from evolvenet.lowrank.base import LayerShape
from evolvenet.lowrank.layers import FactoredLayer, layer_shape

LAYERS: list[type[nn.Module]] = [
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
]
"""Types that are factorized; a subclass is if it has the same `forward`. A type of your own may be added."""


@dataclass(frozen=True, eq=False)
class Target:
    """A layer, with those that have the same weight.

    Args:
        name: its first path in the model.
        layers: the layers; all have the same type and weight.
        shape: of the weight.
        refusal: why it stays whole; None if it can be factorized.
    """

    name: str
    layers: tuple[nn.Module, ...]
    shape: LayerShape
    refusal: str | None = None

    @property
    def layer(self) -> nn.Module:
        """The first of its layers."""
        return self.layers[0]


def find_targets(model: nn.Module) -> dict[str, Target]:
    """{path: target} of every dense layer and convolution, in the order of the modules; several paths may have one target.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    >>> {name: target.refusal is None for name, target in find_targets(model).items()}
    {'0': True, '1': False}
    """
    found = {path: module for path, module in model.named_modules() if _listed(module)}
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in parameter_table(module).values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    lists = _plain_containers(model)
    by_weight: dict[int, Target] = {}
    targets: dict[str, Target] = {}
    for path, layer in found.items():
        weight = parameter_table(layer).get("weight")
        reason = _own_refusal(model, path, layer, lists)
        if weight is None or is_lazy(weight):
            targets[path] = Target(path, (layer,), LayerShape(0, 0), reason)
            continue
        if id(weight) not in by_weight:
            sharing = owners[id(weight)]
            reason = reason or _sharing_refusal(layer, sharing, found, lists, model)
            by_weight[id(weight)] = Target(path, tuple(sharing) if not reason else (layer,), layer_shape(layer), reason)
        targets[path] = by_weight[id(weight)]
    every = {id(module): path for path, module in found.items()}
    again = model.named_modules(remove_duplicate=False)
    return targets | {path: targets[every[id(module)]] for path, module in again if id(module) in every}


def _listed(module: nn.Module) -> bool:
    return isinstance(module, tuple(LAYERS))


def _own_refusal(model: nn.Module, path: str, layer: nn.Module, lists: Mapping[int, str]) -> str | None:
    """Why a layer by itself stays whole."""
    if layer is model:
        return "it is the model itself, which cannot be replaced in place: wrap it in nn.Sequential"
    base = next(each for each in LAYERS if isinstance(layer, each))
    if not runs_forward_of(layer, base):
        return f"{type(layer).__name__} has a forward of its own, which factors would not run"
    weight = parameter_table(layer).get("weight")
    if weight is None:
        return "its weight is computed by a parametrization: remove that first (torch.nn.utils.parametrize)"
    if is_lazy(weight):
        return "its weight has no shape yet: run the model once"
    if not weight.is_floating_point():
        return f"expected a floating-point weight, got {weight.dtype}: dequantise it first"
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and not isinstance(parent, SplitAttention):
        reason = refusal(parent, {}) or "it was not named" if parent is not model else "it is the model itself"
        return f"its {type(parent).__name__} multiplies with its weight and is not split: {reason}"
    if isinstance(parent, FactoredLayer):
        return "it is a factor already: merge first"
    return lists.get(id(layer))


def _sharing_refusal(
    layer: nn.Module,
    sharing: list[nn.Module],
    found: Mapping[str, nn.Module],
    lists: Mapping[int, str],
    model: nn.Module,
) -> str | None:
    """Why a layer whose weight others use too stays whole."""
    paths = {id(module): path for path, module in found.items()}
    for other in sharing:
        if type(other) is not type(layer) or getattr(other, "groups", 1) != getattr(layer, "groups", 1):
            return f"its weight is shared with a {type(other).__name__}, which has no such factors"
        reason = _own_refusal(model, paths[id(other)], other, lists) if other is not layer else None
        if reason is not None:
            return f"its weight is shared with {paths[id(other)]!r}: {reason}"
    return None


def _plain_containers(model: nn.Module) -> dict[int, str]:
    """{id of a module: reason} of the layers that a module also holds as an attribute beside its children.

    An exchange of children does not reach these places, and the model would go on with the old layer there.
    """
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in plain_attributes(module).items():
            if isinstance(module, FactoredLayer):
                continue
            for held in _modules_in(value):
                if _listed(held):
                    where = f"{path}.{name}" if path else name
                    found[id(held)] = f"it is also held outside of the module tables, in {where!r}: use nn.ModuleList"
    return found


def _modules_in(value: Any, depth: int = 2) -> Iterable[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(entry, depth - 1)
