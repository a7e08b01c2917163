"""Label rules: how label layers pass through an op. `RULES` maps ATen ops to rules; an op without one freezes its units.

Most of ATen falls into four families: *movement* (the op itself is run on the label layers), *elementwise* (corresponding
elements are tied), *contraction* (units along the contracted dimension are tied) and *reduction*. Movement and elementwise
ops are recognised by their schema or tags; all others are registered by name with `rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from evolvenet._compat.torch import OpOverload, base_of, schema_of, tree_flatten
from evolvenet.tracing.labels import (
    CONSTANT,
    DATA,
    LABELLED,
    Label,
    LabelGraph,
    align,
    compress,
    is_constant,
    places_of_constant,
    useful,
    varying,
)
from evolvenet.tracing.merging import freeze_met_by_data, merge, unexpanded_sizes
from evolvenet.tracing.part_writes import data_in_base, in_base, places_of_view
from evolvenet.tracing.rearranged import moved_without_elements, reshaped
from evolvenet.tracing.shared_heads import without_shared_places


@dataclass(frozen=True)
class Call:
    """One op that has run: the input of a rule.

    Args:
        func: the op.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: its result.
        where: path and type of the module that ran it.
        label_graph: to which the rule adds ties.
        label_of: gives the label of a tensor.
        set_label: sets that of a tensor.
    """

    func: OpOverload
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any
    where: str
    label_graph: LabelGraph
    label_of: Callable[[Tensor], Label]
    set_label: Callable[[Tensor, Label], None]

    @cached_property
    def op(self) -> str:
        """The op's name without overload, "aten::add"."""
        return schema_of(self.func).name

    @cached_property
    def outputs(self) -> list[Tensor]:
        """Every tensor that the op returned."""
        return [leaf for leaf in tree_flatten(self.out)[0] if isinstance(leaf, Tensor)]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor that the op was given, in order."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]

    @property
    def location(self) -> str:
        """Op and module, as named in reasons."""
        return f"{self.op} in {self.where}"

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name."""
        for position, argument in enumerate(schema_of(self.func).arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value)
        return default

    def label_output(
        self,
        tensor: Tensor,
        layers: Sequence[Tensor],
        fallback: str = DATA,
        origin: str | None = None,
        value: float | None = None,
    ) -> None:
        """Set the label of an output; without any useful layer its kind is `fallback`."""
        kept = useful(layers)
        self.set_label(tensor, Label(kept, LABELLED if kept else fallback, origin, value))

    def mark_changed(self, tensor: Tensor) -> None:
        """Keep that the op changes every unit that this tensor holds; see `LabelGraph.mark_changed`."""
        for layer in self.label_of(tensor).layers:
            self.label_graph.mark_changed(layer, f"{self.location} works on a part of its units")

    def mark_singles(self) -> None:
        """Keep that the op computes with a single unit of a width: the code may combine it with all the others."""
        for tensor in self.tensors:
            single = self.label_of(tensor).single
            if single is not None:
                self.label_graph.mark_changed(single, f"{self.location} works on a part of its units")

    def freeze_all(self, reason: str) -> None:
        """Freeze every unit that reaches this op."""
        for tensor in self.tensors:
            for layer in self.label_of(tensor).layers:
                self.label_graph.freeze(layer, reason)


class NeedsDataError(RuntimeError):
    """A rule needs the values of a meta tensor: the model has to be run on copies with data."""


Rule = Callable[[Call], None]
RULES: dict[str, Rule] = {}
RESHAPING = frozenset({"aten::view", "aten::_unsafe_view", "aten::_reshape_copy"})
"""Ops that give the same elements in the same order other dimensions."""
CUTTING = frozenset(f"aten::{name}" for name in ("slice", "split", "split_with_sizes", "unsafe_split"))
"""Ops that take pieces along one axis."""
SPLITTING = {"aten::split": False, "aten::split_with_sizes": True}
"""Ops that divide an axis into pieces, and whether the code gives a size for every piece."""
_PARTING = """slice select narrow split split_with_sizes chunk unbind unsafe_split unsafe_chunk unsafe_split_with_sizes view
_unsafe_view _reshape_copy unsqueeze squeeze expand alias detach clone _to_copy lift_fresh cat concat concatenate stack"""
PARTING = frozenset(f"aten::{name}" for name in _PARTING.split())
"""Ops that take a part of a tensor out, or put parts together, and change nothing in them."""
SHAPING = PARTING - {"aten::cat", "aten::concat", "aten::concatenate", "aten::stack", "aten::clone", "aten::_to_copy"}
"""Ops whose result is a view of one tensor."""
FILLED_WITH: Mapping[str, float] = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "zero_": 0.0} | dict.fromkeys(
    ("ones", "new_ones", "ones_like"), 1.0
)
"""The number with which an op fills a tensor from end to end; others have it as the argument `fill_value` or `value`."""


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops, named without namespace and overload."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[f"aten::{op}"] = function
        return function

    return register


def apply_rule(call: Call) -> None:
    """Pass labels through an op that has run, by its rule; without one its units are frozen."""
    if not call.outputs:
        return
    if call.op not in PARTING:
        for tensor in call.tensors:
            call.mark_changed(tensor)
    if call.op not in SHAPING and not call.op.endswith("_like"):
        call.mark_singles()
    found = RULES.get(call.op) or _by_schema(call)
    if found is not None:
        found(call)
    else:
        call.freeze_all(f"{call.location} has no rule")
        for out in call.outputs:
            # An op in place may have changed the shape.
            call.set_label(out, Label())


def _by_schema(call: Call) -> Rule | None:
    returns = schema_of(call.func).returns
    if schema_of(call.func).overload_name == "dtype":
        return None  # The same memory as numbers of another type.
    if any(item.alias_info is not None and not item.alias_info.is_write for item in returns):
        return movement
    if torch.Tag.pointwise in call.func.tags:
        return elementwise
    name = call.op.rpartition("::")[2]
    if name.endswith("_like"):
        return alike
    return constant if not call.tensors or name.startswith("new_") else None


def alike(call: Call) -> None:
    """Created by the model's code in the shape of another tensor: its places are that tensor's units."""
    layers = [layer for layer in call.label_of(call.args[0]).layers if not is_constant(layer)]
    for out in call.outputs:
        call.label_output(out, layers, CONSTANT, value=_filled_with(call))


def constant(call: Call) -> None:
    """Created by the model's code from the shapes of other tensors: its size may change with a width's."""
    for out in call.outputs:
        call.set_label(out, Label((), CONSTANT, value=_filled_with(call)))


def _filled_with(call: Call) -> float | None:
    """The number that an op fills its whole result with, or None: random numbers, memory that is filled later."""
    found = FILLED_WITH.get(call.op.rpartition("::")[2], call.argument("fill_value", call.argument("value")))
    return float(found) if isinstance(found, int | float) else None


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "randperm")
@rule("hann_window", "hamming_window", "blackman_window", "bartlett_window", "kaiser_window")
def positional(call: Call) -> None:
    """Created by the model's code with another number at every position: it counts as data."""
    for out in call.outputs:
        call.set_label(out, Label())


@rule("uniform_", "normal_", "bernoulli_", "zero_", "fill_", "exponential_", "random_")
def unchanged(call: Call) -> None:
    """Filled in place: labels do not change, but a constant of which a part is filled is no longer the same everywhere."""
    target = call.args[0]
    written_in_part(call, target)
    call.set_label(target, replace(call.label_of(target), value=_filled_with(call)))


def written_in_part(call: Call, target: Tensor) -> None:
    """Count a constant as data from now on if the target, a view, is a part of it: its numbers depend on the place."""
    base = base_of(target)
    if base is None or base.numel() == target.numel():
        return
    label = call.label_of(base)
    if label.kind == CONSTANT and not label.layers:
        call.set_label(base, Label())


@rule("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "_unsafe_view", "roll", "flip", "repeat")
@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "_reshape_copy")
def movement(call: Call) -> None:
    """Elements are only rearranged: the same op is run on the labels."""
    source = call.args[0]
    label = call.label_of(source)
    strided = call.op in ("aten::as_strided", "aten::_reshape_alias")
    if strided and not (source.is_contiguous() and source.storage_offset() == 0):
        call.freeze_all(f"{call.location} reads memory that is laid out in another way than it looks")
        label = Label()
    if not all(map(is_constant, label.layers)) and any(tensor.device.type == "meta" for tensor in call.tensors[1:]):
        raise NeedsDataError(f"{call.location} moves units to places that only data can tell")
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    singles: dict[int, Tensor] = {}
    for layer in label.layers:
        moved = _moved(call, layer, strided)
        for result, part in zip(results, tree_flatten(moved)[0], strict=True):
            result.append(compress(part))
            singles.update(_single(id(result), layer, result[-1]))
            call.label_graph.add_grid(result[-1])
        if call.op in SPLITTING and all(len(varying(each[-1])) == 1 for each in results):
            call.label_graph.add_pieces([each[-1] for each in results], SPLITTING[call.op])
        if call.op == "aten::channel_shuffle" and varying(layer) == (1,):
            # It lays the channels out as groups × channels of a group, and goes through them in the other order.
            call.label_graph.add_grid(layer.unflatten(1, (call.args[1], -1)))
    for out, found in zip(call.outputs, results, strict=True):
        layers = without_shared_places(call.label_graph, found)
        kind = CONSTANT if label.kind == CONSTANT else DATA
        call.label_output(out, layers, kind, label.origin, label.value if call.op in PARTING else None)
        call.set_label(out, replace(call.label_of(out), single=singles.get(id(layers), label.single)))


def _moved(call: Call, layer: Tensor, strided: bool) -> Any:
    """The layers of an op's outputs: the op is run on a layer of its input."""
    source = call.args[0]
    if call.op in CUTTING and layer.shape[call.argument("dim") % source.dim()] == 1:
        return [layer] * len(call.outputs)  # Also where the piece has no places: tokens of an expert that gets none.
    if call.op in RESHAPING:
        return reshaped(layer, source.shape, call.out.shape)
    if not source.numel():
        return moved_without_elements(partial(call.func, **call.kwargs), layer, call.args, call.outputs)
    whole = layer.expand(source.shape)
    return call.func(whole.contiguous() if strided else whole, *call.args[1:], **call.kwargs)


def _single(key: int, before: Tensor, after: Tensor) -> dict[int, Tensor]:
    """{key: the id} if an op has taken a single unit out of a layer."""
    return {key: after} if before.numel() > 1 and after.numel() == 1 and int(after) >= 0 else {}


@rule("clone", "_to_copy", "copy_", "hardswish", "hardswish_", "_prelu_kernel")
@rule("masked_fill", "masked_fill_", "native_dropout", "silu_", "elu_", "leaky_relu_", "hardtanh_")
@rule("leaky_relu", "celu_", "selu_", "hardsigmoid_", "ldexp", "ldexp_")  # torch 2.8 does not tag them as pointwise
@rule("bernoulli", "fake_quantize_per_tensor_affine_cachemask")
@rule("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams")
@rule("hardtanh", "log_sigmoid_forward", "rrelu_with_noise", "softplus", "mish", "hardsigmoid", "celu", "hardshrink")
def elementwise(call: Call) -> None:
    """Corresponding elements are tied; units combined with data of a fixed size along their axis are frozen."""
    tie_elements(call, call.tensors, [call.label_of(tensor) for tensor in call.tensors])


def tie_elements(call: Call, tensors: Sequence[Tensor], labels: Sequence[Label]) -> None:
    """Tie corresponding elements of some of an op's tensors, and label its outputs.

    Args:
        call: the op.
        tensors: those whose elements correspond; the first one is what an op in place writes to.
        labels: of these tensors, without layers that do not pass.
    """
    dims = max(tensor.dim() for tensor in tensors)
    fixed = freeze_met_by_data(call.label_graph, call.location, tensors, labels, dims)
    origin = _origin_after(tensors, labels, call)
    # Of equal layers the last one is kept: it should be the origin's, whose ids identify its axes.
    order = sorted(labels, key=lambda label: label.origin is not None and label.origin == origin)
    aligned = [[align(layer, dims) for layer in label.layers if not is_constant(layer)] for label in order]
    layers = merge(call.label_graph, aligned)
    if origin is not None:
        for dim in range(dims):
            call.label_graph.share_role([layer for each in aligned for layer in each if varying(layer) == (dim,)])
    # Layers just frozen are dropped: a later reshape would tie others to them, which would be frozen too.
    layers = [layer for layer in layers if not fixed & set(varying(layer))]
    if call.op.endswith("_") and isinstance(call.args[0], Tensor):
        _write_through(call, labels[0], layers, labels)
    all_constant = all(label.kind == CONSTANT for label in labels)
    layers += constant_axes(tensors, labels, {axis for layer in layers for axis in varying(layer)})
    value = labels[0].value if call.op in PARTING else None
    for out in call.outputs:
        if out.dim() == dims:
            call.label_output(out, layers, CONSTANT if all_constant else DATA, origin, value)


def _write_through(call: Call, label: Label, layers: Sequence[Tensor], labels: Sequence[Label]) -> None:
    """Pass what an op has written into a view without units, as into `out[:, 0]`, to the tensor that it is a view of."""
    target = call.args[0]
    base = base_of(target)
    if base is None or any(bool((layer >= 0).any()) for layer in label.layers):
        return
    places = places_of_view(base, target)
    before = call.label_of(base)
    layers = [layer for layer in layers if not is_constant(layer)]
    moved = [in_base(base, places, layer) for layer in layers]
    written = [layer for layer in moved if layer is not None]
    for layer, found in zip(layers, moved, strict=True):
        if found is None:
            call.label_graph.freeze(layer, f"{call.location} writes it into a part of another tensor")
    simple = len(places) == sum(size > 1 for size in target.shape)
    if not layers and simple and labels[-1].kind == DATA and (before.kind == CONSTANT or before.layers):
        call.label_output(base, data_in_base(base, places, before.layers))
    elif written:
        call.label_output(base, merge(call.label_graph, [before.layers, written]))
    elif before.kind == CONSTANT and target.numel() < base.numel():
        call.set_label(base, Label())


def constant_axes(tensors: Sequence[Tensor], labels: Sequence[Label], taken: set[int]) -> list[Tensor]:
    """A layer for each axis of an elementwise combination along which all that is combined is constant.

    In `state * (1 - done)`, a state of zeros `[batch, units]` times data `[batch, 1]`, that is the last axis.

    Args:
        tensors: what is combined.
        labels: of these tensors.
        taken: axes that have units; what is constant along them belongs to these.
    """
    if all(label.kind == CONSTANT for label in labels):
        return []  # The whole result is a constant.
    dims = max(tensor.dim() for tensor in tensors)
    sizes = [(1,) * (dims - tensor.dim()) + unexpanded_sizes(tensor) for tensor in tensors]
    layers = []
    for axis in range(dims):
        size = max(tensor.shape[axis - dims] if tensor.dim() >= dims - axis else 1 for tensor in tensors)
        met = [label for each, label in zip(sizes, labels, strict=True) if each[axis] > 1]
        if size > 1 and axis not in taken and all(_is_constant_along(label, axis, dims) for label in met):
            layers.append(places_of_constant(size, axis, dims))
    return layers


def _is_constant_along(label: Label, axis: int, dims: int) -> bool:
    return label.kind == CONSTANT or any(
        is_constant(layer) and axis in varying(align(layer, dims)) for layer in label.layers
    )


def _origin_after(tensors: Sequence[Tensor], labels: Sequence[Label], call: Call) -> str | None:
    """Origin of the output of an elementwise op on weights and constants only (spectral norm, LoRA, masks); else None.

    Of a parameter and a buffer it is the parameter.
    """
    met = [(t, label.origin) for t, label in zip(tensors, labels, strict=True) if label.kind != CONSTANT]
    if any(origin is None for _, origin in met) or not call.outputs:
        return None
    whole = [origin for tensor, origin in met if tensor.shape == call.outputs[0].shape]
    return next((origin for origin in whole if origin in call.label_graph.trainable), whole[0] if whole else None)
