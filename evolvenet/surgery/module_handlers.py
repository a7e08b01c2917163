"""Updates of a module that depend on its type, when a width changes: one registered function per type.

`attributes` returns the new values of attributes that repeat a module's shapes (`in_features`, `groups`, …);
`new_unit_value` the value with which entries of new units are filled; `refresh` recomputes whatever else a module derives
from its tensors. A type that is not registered is assumed to have no such attributes: the trace verifies every width by
running the resized model, and freezes it where that fails.

To register a module type of your own::

    @evolvenet.surgery.module_handlers.attributes.register
    def _(module: MyLayer, shapes):
        return {"hidden": shapes["weight"][0]}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

# Private in torch, public in `_compat`: pyright goes by the name that torch gives them.
# pyright: reportPrivateUsage=false
from evolvenet._compat.torch import ConvNd, ConvTransposeNd, NormBase, WeightNorm, own_tensors, renew_flat_weights
from evolvenet.errors import ResizeError
from evolvenet.surgery.hooked_weights import hook_sources, hook_unit_value, recompute

Shapes = Mapping[str, tuple[int, ...]]
"""New shape of each of a module's own tensors, by local name ("weight", "bias", …)."""


@singledispatch
def attributes(module: nn.Module, shapes: Shapes) -> dict[str, Any]:
    """The Python attributes of `module` once its tensors have these shapes.

    Args:
        module: the module as it is now, before the change.
        shapes: the shapes that its own tensors will have.

    Returns:
        {attribute: new value}; empty for a type without any.

    Raises:
        ResizeError: if the type cannot have these shapes.

    >>> attributes(nn.Linear(4, 3), {"weight": (2, 4), "bias": (2,)})
    {'in_features': 4, 'out_features': 2}
    """
    return {}


@attributes.register
def _(module: nn.Linear, shapes: Shapes) -> dict[str, Any]:
    out_features, in_features = shapes["weight"]
    _agree(module, shapes, {"bias": (out_features,)})
    return {"in_features": in_features, "out_features": out_features}


@attributes.register
def _(module: nn.Bilinear, shapes: Shapes) -> dict[str, Any]:
    out_features, in1_features, in2_features = shapes["weight"]
    _agree(module, shapes, {"bias": (out_features,)})
    return {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}


@attributes.register
def _(module: ConvNd, shapes: Shapes) -> dict[str, Any]:
    rows, columns = shapes["weight"][:2]
    groups = _groups(module, module.groups, module.out_channels, rows)
    each = columns if groups == 1 else module.in_channels // module.groups
    _agree(module, shapes, {"weight": (rows, each, *module.kernel_size), "bias": (rows,)})
    return {"in_channels": columns * groups, "out_channels": rows, "groups": groups}


@attributes.register
def _(module: ConvTransposeNd, shapes: Shapes) -> dict[str, Any]:
    rows, columns = shapes["weight"][:2]
    groups = _groups(module, module.groups, module.in_channels, rows)
    each = columns if groups == 1 else module.out_channels // module.groups
    _agree(module, shapes, {"weight": (rows, each, *module.kernel_size), "bias": (columns * groups,)})
    return {"in_channels": rows, "out_channels": columns * groups, "groups": groups}


@attributes.register
def _(module: NormBase, shapes: Shapes) -> dict[str, Any]:
    known = [shape for shape in shapes.values() if shape] or [(module.num_features,)]
    _agree(module, shapes, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), known[0]))
    return {"num_features": known[0][0]}


@attributes.register
def _(module: nn.GroupNorm, shapes: Shapes) -> dict[str, Any]:
    channels = shapes["weight"][0] if "weight" in shapes else module.num_channels
    _agree(module, shapes, {"bias": (channels,)})
    groups = _groups(module, module.num_groups, module.num_channels, channels)
    return {"num_channels": channels, "num_groups": groups}


@attributes.register(nn.LayerNorm)
@attributes.register(nn.RMSNorm)
def _(module: nn.LayerNorm | nn.RMSNorm, shapes: Shapes) -> dict[str, Any]:
    if "weight" not in shapes:
        return {}
    _agree(module, shapes, {"bias": shapes["weight"]})
    return {"normalized_shape": tuple(shapes["weight"])}


@attributes.register
def _(module: nn.Embedding, shapes: Shapes) -> dict[str, Any]:
    count, width = shapes["weight"]
    return {"num_embeddings": count, "embedding_dim": width}


@attributes.register
def _(module: nn.PReLU, shapes: Shapes) -> dict[str, Any]:
    return {"num_parameters": shapes["weight"][0]}


@attributes.register
def _(module: nn.RNNBase, shapes: Shapes) -> dict[str, Any]:
    hidden = shapes["weight_hr_l0" if module.proj_size else "weight_hh_l0"][1]
    projected = shapes["weight_hr_l0"][0] if module.proj_size else 0
    if projected >= hidden:
        # torch takes equal sizes for a module without projection.
        raise ResizeError(
            f"{type(module).__name__} projects {hidden} hidden units onto {projected}: expected more hidden units than "
            "projected ones. Resize the other of the two first."
        )
    size = shapes["weight_ih_l0"][1]
    rows, state = GATES[module.mode] * hidden, projected or hidden
    for layer in range(module.num_layers):
        inputs = state * (1 + module.bidirectional) if layer else size
        for end in (f"_l{layer}", f"_l{layer}_reverse"):
            expected = {"weight_ih": (rows, inputs), "weight_hh": (rows, state), "weight_hr": (projected, hidden)}
            expected |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            _agree(module, shapes, {name + end: shape for name, shape in expected.items()})
    return {"input_size": size, "hidden_size": hidden, "proj_size": projected}


@attributes.register
def _(module: nn.RNNCellBase, shapes: Shapes) -> dict[str, Any]:
    hidden, size = shapes["weight_hh"][1], shapes["weight_ih"][1]
    gates = module.get_parameter("weight_hh").shape[0] // module.hidden_size
    rows = gates * hidden
    expected = {"weight_hh": (rows, hidden), "weight_ih": (rows, size), "bias_hh": (rows,), "bias_ih": (rows,)}
    _agree(module, shapes, expected)
    return {"input_size": size, "hidden_size": hidden}


@attributes.register
def _(module: nn.MultiheadAttention, shapes: Shapes) -> dict[str, Any]:
    if "in_proj_weight" in shapes:
        width = shapes["in_proj_weight"][1]
        _agree(module, shapes, {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)})
        return {"embed_dim": width, "kdim": width, "vdim": width}
    width = shapes["q_proj_weight"][0]
    return {"embed_dim": width, "kdim": shapes["k_proj_weight"][1], "vdim": shapes["v_proj_weight"][1]}


def original_name(made_by: nn.Module) -> str:
    """The tensor that a parametrized one takes its shape from: of a length and directions, the directions."""
    sources = [*made_by.named_parameters(recurse=False), *made_by.named_buffers(recurse=False)]
    return max(sources, key=lambda source: source[1].numel())[0]


def shape_sources(module: nn.Module) -> dict[str, Tensor]:
    """Each of a module's tensors by local name, or of one that is computed from others, the one that has its shape.

    Computed by a parametrization, or by a hook of torch's older functions, see `evolvenet.surgery.hooked_weights`.

    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> {name: tuple(tensor.shape) for name, tensor in shape_sources(weight_norm(nn.Linear(4, 3))).items()}
    {'bias': (3,), 'weight': (3, 4)}
    """
    own = own_tensors(module)
    made = cast(nn.ModuleDict, module.parametrizations).items() if is_parametrized(module) else ()
    own |= {name: own_tensors(made_by)[original_name(made_by)] for name, made_by in made}
    return own | {name: own[source] for name, source in hook_sources(module).items()}


GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""Rows of a recurrent weight for each hidden unit, by `module.mode`."""


def _agree(module: nn.Module, shapes: Shapes, expected: Shapes) -> None:
    """Raise if the shapes of a module's tensors do not fit together."""
    for name, shape in expected.items():
        if name in shapes and tuple(shapes[name]) != tuple(shape):
            raise ResizeError(
                f"{type(module).__name__}: expected {name} of shape {tuple(shape)} beside its other tensors, got "
                f"{tuple(shapes[name])}. Only widths can change, and every tensor of a width changes with it."
            )


def _groups(module: nn.Module, groups: int, channels: int, new_channels: int) -> int:
    """The new number of groups: whole groups are added and removed, the channels of each group stay as many."""
    if groups == 1:
        return 1
    each = channels // groups
    if new_channels % each or new_channels // each < 2:
        raise ResizeError(
            f"{type(module).__name__} with {groups} groups of {each} channels: expected a new size of at least two whole "
            f"groups, got {new_channels} channels. Take a multiple of {each}, {2 * each} or more."
        )
    return new_channels // each


@singledispatch
def new_unit_value(module: nn.Module, name: str, dim: int) -> float:
    """Value of new units' entries along axis `dim` of the module's tensor `name`: 0, which keeps the outputs as they are."""
    return hook_unit_value(module, name, dim)


@new_unit_value.register(NormBase)
@new_unit_value.register(nn.GroupNorm)
@new_unit_value.register(nn.LayerNorm)
@new_unit_value.register(nn.RMSNorm)
def _(module: nn.Module, name: str, dim: int) -> float:
    return 1.0 if name in ("weight", "running_var") else 0.0


@new_unit_value.register
def _(module: ParametrizationList, name: str, dim: int) -> float:
    # A direction of length 0 would be normalised to 0/0. The new unit's length, original0, is 0, so the outputs stay the same.
    normed = module[0] if len(module) else None
    return 1.0 if isinstance(normed, WeightNorm) and name == "original1" and dim == normed.dim else 0.0


@singledispatch
def refresh(module: nn.Module) -> None:
    """Recompute what a module derives from its tensors; nothing for most types."""
    recompute(module)


@refresh.register
def _(module: nn.RNNBase) -> None:
    # It computes with a list of its parameters, in which a parameter that was exchanged would stay the old one, without an error.
    recompute(module)
    renew_flat_weights(module)
