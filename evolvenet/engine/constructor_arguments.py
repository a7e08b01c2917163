"""The arguments with which a model's layers and modules would be built at the widths that they have now."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

from torch import nn

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.module_handlers import attributes, shape_sources
from evolvenet.surgery.numbers import attribute_of

RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")


@dataclass(frozen=True)
class Arguments:
    """What a module's `__init__` would be called with.

    Args:
        type: the module's class.
        values: {argument: value}; of a layer of torch all that differ from their defaults, of another class those that are
            known to follow widths.
        reasons: {argument: from which width the value is}, where the class is not one of torch's.
        ambiguous: {argument: why its value cannot be told}.
    """

    type: str
    values: Mapping[str, Any]
    reasons: Mapping[str, str] = field(default_factory=dict[str, str])
    ambiguous: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        return (
            f"{self.type.rpartition('.')[2]}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"
        )


@singledispatch
def layer_arguments(layer: nn.Module) -> dict[str, Any]:
    """The arguments that build a layer of torch as it is now, but for those that have their defaults.

    >>> layer_arguments(nn.Conv2d(3, 5, 3, padding=1, bias=False))
    {'in_channels': 3, 'out_channels': 5, 'kernel_size': (3, 3), 'padding': (1, 1), 'bias': False}
    """
    found = dict(_stored(layer, inspect.signature(type(layer)).parameters))
    if found.get("padding_mode") == "zeros":
        del found["padding_mode"]
    return found


@layer_arguments.register
def _(layer: nn.RNNBase) -> dict[str, Any]:
    defaults = {
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        "proj_size": 0,
    }
    found = {name: getattr(layer, name) for name in RECURRENT}
    if layer.mode.startswith("RNN_") and layer.mode != "RNN_TANH":
        found["nonlinearity"] = layer.mode.removeprefix("RNN_").lower()
    return {name: value for name, value in found.items() if name not in defaults or value != defaults[name]}


@layer_arguments.register
def _(layer: nn.MultiheadAttention) -> dict[str, Any]:
    found = dict(_stored(layer, inspect.signature(nn.MultiheadAttention).parameters))
    found |= {} if layer.in_proj_bias is not None else {"bias": False}
    found |= {} if layer.bias_k is None else {"add_bias_kv": True}
    return {name: value for name, value in found.items() if name not in ("kdim", "vdim") or value != layer.embed_dim}


@layer_arguments.register(nn.TransformerEncoderLayer)
@layer_arguments.register(nn.TransformerDecoderLayer)
def _(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> dict[str, Any]:
    attention, activation = layer.self_attn, getattr(layer.activation, "__name__", type(layer.activation).__name__)
    found: dict[str, Any] = {"d_model": attention.embed_dim, "nhead": attention.num_heads}
    others = {
        "dim_feedforward": (layer.linear1.out_features, 2048),
        "dropout": (layer.dropout.p, 0.1),
        "activation": (activation, "relu"),
        "layer_norm_eps": (layer.norm1.eps, 1e-5),
        "batch_first": (attention.batch_first, False),
        "norm_first": (layer.norm_first, False),
        "bias": (layer.linear1.bias is not None, True),
    }
    return found | {name: value for name, (value, default) in others.items() if value != default}


BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch that are built whole: their sizes are those of the layers inside."""


def _stored(layer: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> Iterator[tuple[str, Any]]:
    """Arguments whose values a layer keeps under their names, or shows by what it has."""
    switches = {"bias": "bias", "elementwise_affine": "weight", "affine": "weight"}
    for name, parameter in parameters.items():
        value = getattr(layer, name, parameter.default)
        if name in switches and not isinstance(layer, nn.MultiheadAttention):
            value = getattr(layer, switches[name], None) is not None
        elif name == "bias":
            continue
        if not isinstance(value, int | float | str | tuple | None):
            continue
        if value != parameter.default and not _repeats(value, parameter.default):
            yield name, value


def _repeats(value: Any, default: Any) -> bool:
    """Whether a tuple is the default once for every axis: `stride=(1, 1)` for 1."""
    return isinstance(value, tuple) and all(entry == default for entry in value)


def of_torch_layers(model: nn.Module) -> dict[str, Arguments]:
    """{path: arguments} of a model's layers of torch whose sizes are known by their type."""
    found: dict[str, Arguments] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}." if outer else "") for outer in found):
            continue  # the outer one builds it
        local = {name: tuple(tensor.shape) for name, tensor in shape_sources(module).items()}
        if isinstance(module, BLOCKS) or (_is_torchs(module) and local and attributes(module, local)):
            found[path] = Arguments(f"torch.nn.{type(module).__name__}", layer_arguments(module))
    return found


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def of_own_classes(model: nn.Module, graph: WidthGraph, original: Mapping[str, int]) -> dict[str, Arguments]:
    """{path: arguments} of the modules of other classes whose arguments follow widths.

    An argument's first value is taken from `hparams` (`save_hyperparameters`) or from the attribute of its name. It follows
    a width if it is the number of units, or of places on a tensor's axis, that this width had before anything was
    changed. Where widths that had it are of different sizes now, or several arguments had the same value, it is ambiguous.

    Args:
        model: the model.
        graph: its widths now.
        original: {width: size before anything was changed}.
    """
    numbers = {(path, attribute_of(n)): width.name for width in graph.widths.values() for path, n in width.patches}
    found: dict[str, Arguments] = {}
    for path, module in model.named_modules():
        if _is_torchs(module) or type(module).__init__ is nn.Module.__init__:
            continue
        first = _first_values(module)
        follows = {name: numbers[path, name] for name in first if (path, name) in numbers}
        own = {n: v for n, v in first.items() if n not in follows}
        values: dict[str, Any] = {name: getattr(module, name) for name in follows}
        reasons = {name: f"follows width {width!r}" for name, width in follows.items()}
        ambiguous: dict[str, str] = {}
        sizes = _sizes_in(path, graph, original)
        for name, value in own.items():
            _tell(name, value, own, sizes, values, reasons, ambiguous)
        if values or ambiguous:
            found[path] = Arguments(
                f"{type(module).__module__}.{type(module).__qualname__}", values, reasons, ambiguous
            )
    return found


def _first_values(module: nn.Module) -> dict[str, Any]:
    """What is known of the whole numbers, or sequences of them, that the module was built with."""
    hparams: Any = getattr(module, "hparams", {})
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = hparams[name] if name in hparams else getattr(module, name, None)
        entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if entries and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
            found[name] = value
    return found


def _sizes_in(path: str, graph: WidthGraph, original: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """{first size: {width: size now}} of the widths inside a module, also in places on an axis."""
    start = f"{path}." if path else ""
    found: dict[int, dict[str, int]] = {}
    for width in graph.widths.values():
        repeats = {tie.repeat for tie in width.ties if tie.tensor.startswith(start)}
        for repeat in {1, *repeats} if repeats else ():
            found.setdefault(original.get(width.name, width.size) * repeat, {})[width.name] = width.size * repeat
    return found


def _tell(
    name: str,
    value: Any,
    own: Mapping[str, Any],
    sizes: Mapping[int, Mapping[str, int]],
    values: dict[str, Any],
    reasons: dict[str, str],
    ambiguous: dict[str, str],
) -> None:
    """Enter what is known of one argument: its value now and why, or why it cannot be told."""
    entries = list(value) if isinstance(value, Sequence) else [value]
    now: list[int] = []
    why: list[str] = []
    for entry in entries:
        widths = sizes.get(entry, {})
        others = [other for other, number in own.items() if other != name and number == entry]
        changed = {width: size for width, size in widths.items() if size != entry}
        if changed and (others or len(set(widths.values())) > 1):
            places = ", ".join(f"{width} ({size} now)" for width, size in widths.items())
            also = f", and that of {', '.join(others)} too" if others else ""
            ambiguous[name] = f"{entry} was the size of {places}{also}"
            return
        now.append(next(iter(changed.values()), entry))
        why += [f"{entry} was the size of width {width!r}, now {size}" for width, size in changed.items()]
    if why:
        values[name] = type(value)(now) if isinstance(value, list | tuple) else now[0]
        reasons[name] = "; ".join(dict.fromkeys(why))
