"""Label rules of ops that put several tensors together, the parts of one, or padding around one.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolvenet.tracing.labels import CONSTANT, DATA, Label, compress, is_constant, places_of_constant, varying
from evolvenet.tracing.merging import merge
from evolvenet.tracing.rules import Call, constant_axes, rule


@rule("constant_pad_nd")
def pad(call: Call) -> None:
    """Padding adds elements that belong to no unit."""
    source, widths = call.args[0], call.args[1]
    label = call.label_of(source)
    padded = {source.dim() - 1 - k // 2 for k, amount in enumerate(widths) if amount}
    layers = []
    for layer in label.layers:
        if padded & set(varying(layer)):
            layer = compress(torch.constant_pad_nd(layer.expand(source.shape), widths, -1))
        layers.append(layer)
    call.label_output(call.out, layers)


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> None:
    """Units along the concatenated dimension stay side by side; corresponding units along the others are tied."""
    tensors = [t for t in call.args[0] if not (t.dim() == 1 and t.numel() == 0)] or list(call.args[0])
    labels = _with_equal_constants([call.label_of(t) for t in tensors])
    axis = (call.argument("dim") or 0) % tensors[0].dim()
    along = [[layer for layer in label.layers if axis in varying(layer)] for label in labels]
    across = [
        [layer for layer in label.layers if axis not in varying(layer) and not is_constant(layer)] for label in labels
    ]
    all_constant = all(label.kind == CONSTANT for label in labels)
    count = max(len(layers) for layers in (*along, []))
    if not all_constant and any(label.kind == CONSTANT for label in labels):
        count = max(count, 1)
    joined = list(merge(call.label_graph, across))
    joined += constant_axes(tensors, labels, {axis, *(dim for layer in joined for dim in varying(layer))})
    for k in range(count):
        pieces = [
            layers[k] if k < len(layers) else _without_units(label, t, axis, bool(layers))
            for t, label, layers in zip(tensors, labels, along, strict=True)
        ]
        # Only as large as they vary: expanded over an image they would take most of the memory.
        shape = [max(sizes) for sizes in zip(*(layer.shape for layer in pieces), strict=True)]
        parts = [
            layer.expand([t.shape[axis] if dim == axis else size for dim, size in enumerate(shape)])
            for layer, t in zip(pieces, tensors, strict=True)
        ]
        joined.append(compress(torch.cat(parts, axis)))
    call.label_output(
        call.out, joined, CONSTANT if all_constant else DATA, value=labels[0].value if all_constant else None
    )


def _with_equal_constants(labels: list[Label]) -> list[Label]:
    """The labels of pieces put side by side, in which constants of different numbers count as data: places differ then."""
    values = [label.value for label in labels if label.kind == CONSTANT]
    if len(values) < 2 or (len(set(values)) == 1 and values[0] is not None):
        return labels
    return [label if label.kind != CONSTANT else Label() for label in labels]


def _without_units(label: Label, tensor: Tensor, axis: int, has_layers: bool) -> Tensor:
    """A layer of a piece that has no units in it: of a constant, of data, or of what has its units in another layer."""
    if label.kind == CONSTANT or has_layers:
        return places_of_constant(tensor.shape[axis], axis, tensor.dim())
    return torch.full((1,) * tensor.dim(), -1)


@rule("stack")
def stack(call: Call) -> None:
    """Corresponding units of the tensors are tied; those of the states of recurrent layers stay beside each other."""
    tensors = call.args[0]
    labels = [call.label_of(t) for t in tensors]
    axis = (call.argument("dim") or 0) % call.out.dim()
    if call.where.rpartition(" (")[0] in call.label_graph.recurrent and _are_alike(labels):
        call.label_output(call.out, [compress(torch.stack([label.layers[0] for label in labels], axis))])
        return
    layers = list(
        merge(call.label_graph, [[each for each in label.layers if not is_constant(each)] for label in labels])
    )
    layers += constant_axes(tensors, labels, {dim for layer in layers for dim in varying(layer)})
    all_constant = all(label.kind == CONSTANT for label in labels)
    call.label_output(call.out, [layer.unsqueeze(axis) for layer in layers], CONSTANT if all_constant else DATA)


def _are_alike(labels: Sequence[Label]) -> bool:
    """Whether each of the tensors has one layer of units, of the same shape."""
    shapes = {tuple(layer.shape) for label in labels for layer in label.layers if not is_constant(layer)}
    return len(shapes) == 1 and all(len(label.layers) == 1 for label in labels)


@rule("glu")
def glu(call: Call) -> None:
    """The first half gated by the second: unit i of one half is tied to unit i of the other."""
    source = call.args[0]
    axis = call.argument("dim") % source.dim()
    halves = [[], []]
    for layer in call.label_of(source).layers:
        for half, part in zip(halves, layer.expand(source.shape).chunk(2, axis), strict=True):
            half.append(compress(part))
    call.label_output(call.out, merge(call.label_graph, halves))
