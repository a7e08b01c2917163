"""Label rules of ops that read or write places given by an index: units along the indexed dimensions are frozen.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evolvenet._compat.torch import tree_map_only
from evolvenet.tracing.labels import DATA, Label, align, compress, varying
from evolvenet.tracing.merging import merge
from evolvenet.tracing.rules import Call, elementwise, movement, rule, tie_elements

_MASKS = (torch.bool, torch.uint8)
"""Types of an index that says of each place whether it is picked; others hold the numbers of places."""


@rule("index", "index_select")
def pick(call: Call) -> None:
    """Selected by an index: units along the indexed dimensions are frozen, the others pass, and so do those of the index.

    A single place that the code names, as in `heads[:, [-2]]`, is a slice: its units pass.
    """
    source, label = call.args[0], call.label_of(call.args[0])
    picked = _picked(call)
    if _names_places(call) and any(picked & set(varying(layer)) for layer in label.layers):
        return movement(call)
    # Along dimensions without units any index gives the same labels, also one without values (meta) or entries.
    rest = tree_map_only(Tensor, _first_place, call.args[1:])
    layers = []
    for layer in label.layers:
        if picked & set(varying(layer)):
            call.label_graph.freeze(layer, f"{call.location} picks them by an index")
        else:
            layers.append(compress(call.func(layer.expand(_indexable(source.shape, picked)), *rest)))
    own = _units_of_index(call, picked)
    call.label_output(call.out, [*layers, *own], origin=None if own else label.origin)
    return None


def _units_of_index(call: Call, picked: set[int]) -> list[Tensor]:
    """The units of an index `[units]` that picks along one dimension, in the place of that dimension; others are frozen.

    A buffer with the number of each head picks the rows of what was computed for all heads. A mask that is computed from
    units picks as many as it is true for, which are no units of its own. A tensor of the model whose entries are the index
    is recorded as a gate: a new unit's entry has to be a place that there is, so it is that of another unit.
    """
    found: list[Tensor] = []
    for index in call.tensors[1:]:
        reason, origin = _no_units_of_index(call, index, picked), call.label_of(index).origin
        if reason is None and origin is not None:
            call.label_graph.gates.add(origin)
        for layer in call.label_of(index).layers:
            if reason is None:
                found.append(layer.view([-1 if dim in picked else 1 for dim in range(call.out.dim())]))
            else:
                call.label_graph.freeze(layer, f"{call.location} picks by {reason}")
    return found


def _no_units_of_index(call: Call, index: Tensor, picked: set[int]) -> str | None:
    """What an index is whose units are not those of what it picks; None if they are, one picked place for each."""
    if index.dtype in _MASKS:
        return "a mask that is computed from them"
    if len(call.tensors) > 2 or len(picked) != 1:
        return "several indices at once"
    return None if index.dim() == 1 else f"an index of {index.dim()} dimensions"


def _names_places(call: Call) -> bool:
    """Whether all indices may be lists of one number in the code; on meta, where that is not known, `movement` needs data."""
    if call.op != "aten::index":
        return False
    indices = [index for index in call.args[1] if index is not None]
    return all(
        index.shape == (1,) and (call.label_of(index).value is not None or index.device.type == "meta")
        for index in indices
    )


@rule("lift_fresh")
def literal(call: Call) -> None:
    """Numbers in the code as a tensor; of one number it is known."""
    elementwise(call)
    label = call.label_of(call.out)
    known = call.out.numel() == 1 and call.out.device.type != "meta" and not call.out.is_complex()
    if known and not label.layers:
        call.set_label(call.out, replace(label, value=float(call.out)))


def _indexable(shape: Sequence[int], picked: set[int]) -> list[int]:
    """The shape of a source with one place along the dimensions that are indexed."""
    return [1 if dim in picked else size for dim, size in enumerate(shape)]


def _first_place(index: Tensor) -> Tensor:
    """An index of as many dimensions that picks one place; a mask picks along one dimension."""
    mask = index.dtype in _MASKS
    return (
        torch.ones((1,) * index.dim(), dtype=index.dtype) if mask else index.new_zeros((1,) * index.dim(), device="cpu")
    )


def _picked(call: Call) -> set[int]:
    """Dimensions of the source that are indexed; a mask indexes as many as it has."""
    if call.op == "aten::index_select":
        return {call.args[1] % max(call.args[0].dim(), 1)}
    picked: set[int] = set()
    position = 0
    for index in call.args[1]:
        covered = index.dim() if index is not None and index.dtype in _MASKS else 1
        if index is not None:
            picked |= set(range(position, position + covered))
        position += covered
    return picked


@rule("index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_")
def write_slices(call: Call) -> None:
    """Slices of a source are added to, or copied into, those slices of a tensor that an index names (message passing)."""
    target, source = call.args[0], call.args[3]
    _tie_beside(call, [target, source], {call.args[1] % max(target.dim(), 1)})


@rule("index_fill", "index_fill_")
def fill_slices(call: Call) -> None:
    """The slices that an index names are filled with one number."""
    _tie_beside(call, [call.args[0]], {call.args[1] % max(call.args[0].dim(), 1)})


@rule("_pack_padded_sequence")
def packed(call: Call) -> None:
    """The steps of all samples `[steps, samples, …]` below each other as `[all steps, …]`, without those of padding."""
    kept = []
    for layer in call.label_of(call.args[0]).layers:
        if {0, 1} & set(varying(layer)):
            call.label_graph.freeze(layer, f"{call.location} packs them")
        else:
            kept.append(layer[0])
    call.label_output(call.outputs[0], kept)


@rule("segment_reduce")
def segments(call: Call) -> None:
    """Slices along an axis are reduced in segments: units along it are frozen, the others pass."""
    source = call.args[0]
    axis = call.argument("axis", 0) % max(source.dim(), 1)
    kept = []
    for layer in call.label_of(source).layers:
        if axis in varying(layer):
            call.label_graph.freeze(layer, f"{call.location} works along its units")
        else:
            kept.append(layer)
    call.label_output(call.out, kept)


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(call: Call) -> None:
    """Rows of a source take the place of those rows of a tensor that a mask names, which is repeated over the columns."""
    target, mask, source = call.args
    last = target.dim() - 1
    repeated = mask.dim() == target.dim() and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    whole_rows = repeated and source.shape[-1:] == target.shape[-1:]
    labels = []
    for tensor in (target, source):
        label = call.label_of(tensor)
        passing = [layer for layer in label.layers if whole_rows and varying(layer) == (tensor.dim() - 1,)]
        for layer in label.layers:
            if not any(layer is each for each in passing):
                call.label_graph.freeze(layer, f"{call.location} picks them by a mask")
        labels.append([layer.view([-1 if dim == last else 1 for dim in range(target.dim())]) for layer in passing])
    if not whole_rows or not all(labels):
        for layers in labels:
            for layer in layers:
                call.label_graph.freeze(layer, f"{call.location} combines it with data that has a fixed size")
        labels = []
    call.label_output(call.out, merge(call.label_graph, labels))


@rule("gather")
def gather(call: Call) -> None:
    """One element for each entry of the index, which has as many dimensions."""
    source = call.args[0]
    _tie_beside(call, [source, call.args[2]], {call.args[1] % max(source.dim(), 1)})


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(call: Call) -> None:
    """Each element of a source, or one number, is written to the place that an index of as many dimensions names."""
    target = call.args[0]
    _tie_beside(call, [each for each in call.tensors if each.dim()], {call.args[1] % max(target.dim(), 1)})


@rule("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def put(call: Call) -> None:
    """Values are written to the elements, or slices, that indices of the first dimensions name.

    What the indices leave of the dimensions are the last ones of the tensor and of the values.
    """
    target, values = call.args[0], call.args[2]
    picked = _picked(call)
    if picked != set(range(len(picked))):
        call.freeze_all(f"{call.location} writes them by an index")
        picked = set(range(target.dim()))
    dims = max(target.dim(), values.dim())
    _tie_beside(call, [target, values], set(range(dims - target.dim() + len(picked))), dims)


def _tie_beside(call: Call, tensors: Sequence[Tensor], indexed: Iterable[int], dims: int | None = None) -> None:
    """Freeze units along indexed dimensions, and units of which only a part meets; tie the others element by element.

    Args:
        call: the op.
        tensors: those whose elements correspond beside the indexed dimensions, the target or source first.
        indexed: dimensions, counted in `dims`.
        dims: of all tensors, axes of size 1 in front included; None for those of the first one.
    """
    dims = tensors[0].dim() if dims is None else dims
    shapes = [(1,) * (dims - tensor.dim()) + tuple(tensor.shape) for tensor in tensors]
    partly = {
        dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len({size for size in sizes if size > 1}) > 1
    }
    labels: list[Label] = []
    for tensor in tensors:
        label = call.label_of(tensor)
        passing = []
        for layer in label.layers:
            axes = set(varying(align(layer, dims)))
            if axes & set(indexed):
                call.label_graph.freeze(layer, f"{call.location} picks them by an index")
            elif axes & partly:
                call.label_graph.freeze(layer, f"{call.location} works on a part of its units")
            else:
                passing.append(layer)
        labels.append(replace(label, layers=tuple(passing)))
    tie_elements(call, tensors, labels)
    for out in call.outputs:
        if not call.label_of(out).layers:
            # A constant is no longer the same everywhere once an index has written to it.
            call.set_label(out, replace(call.label_of(out), kind=DATA))
