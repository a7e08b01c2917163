"""Label layers of what an elementwise op combines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolvenet.tracing.labels import CONSTANT, MET_DATA, Label, LabelGraph, align, compress, is_constant, varying
from evolvenet.tracing.partitions import partners


def merge(label_graph: LabelGraph, groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The layers of the elementwise combination of several tensors, given the layers of each with equal dimensions.

    Layers of different tensors that vary along a common dimension are tied to each other; the smallest one of them is
    kept, with the units of the others where it has places of a constant. See `partitions` for several layers of one
    tensor along a dimension.
    """
    # Each a layer, and the layers that it was merged from by the number of their group.
    merged: list[tuple[Tensor, dict[int, Tensor]]] = []
    ordered = [(source, layer) for source, layers in enumerate(groups) for layer in layers]
    # Placeholders come last, so that they can be tied to finer layers.
    for source, layer in sorted(ordered, key=lambda each: label_graph.is_placeholder(each[1])):
        axes = set(varying(layer))
        finer = [other for other, _ in merged if axes < set(varying(other))]
        if finer and label_graph.is_placeholder(layer):
            for other in finer:
                label_graph.tie_to_placeholders(other, layer)
            continue
        met = {
            k: min(theirs, key=lambda each: each.numel())
            for k, (other, parts) in enumerate(merged)
            if set(varying(other)) & axes and (theirs := [part for key, part in parts.items() if key != source])
        }
        own = [each for each in groups[source] if set(varying(each)) & axes]
        tied = partners(layer, own, list(met.values()))
        shared = [k for k, other in met.items() if any(other is each for each in tied)]
        for k in shared:
            label_graph.union(met[k], layer)
        smallest = min([layer, *(merged[k][0] for k in shared)], key=lambda each: each.numel())
        parts = {source: layer}
        for k in shared:
            smallest = known(known(smallest, merged[k][0]), layer)
            parts = {**merged[k][1], **parts}
        merged = [entry for k, entry in enumerate(merged) if k not in shared] + [(smallest, parts)]
    return tuple(layer for layer, _ in merged)


def known(one: Tensor, two: Tensor) -> Tensor:
    """A layer with what `two` holds where `one` has places of a constant.

    >>> known(torch.tensor([-1, -2, -3]), torch.tensor([-2, 7, -4]))
    tensor([-1,  7, -4])
    """
    places = one < -1
    return compress(torch.where(places, two, one)) if bool(places.any()) else one


def freeze_met_by_data(
    label_graph: LabelGraph, location: str, tensors: Sequence[Tensor], labels: Sequence[Label], dims: int
) -> set[int]:
    """Freeze units that are combined with data along their axes; returns those axes.

    Of heads × places, data along the places (rotary embeddings) keeps the number of places: whole heads can still go, so the
    units of each head are tied.
    """
    fixed: set[int] = set()
    for label in labels:
        for layer in label.layers:
            if is_constant(layer):
                continue
            aligned = align(layer, dims)
            axes = set(varying(aligned))
            for tensor, other in zip(tensors, labels, strict=True):
                sizes = (1,) * (dims - tensor.dim()) + unexpanded_sizes(tensor)
                known = {axis for each in other.layers for axis in varying(align(each, dims))}
                met = {axis for axis in axes if sizes[axis] > 1}
                if other.kind == CONSTANT or known & axes or not met:
                    continue
                if met < axes and bool((layer >= 0).all()):
                    label_graph.tie_rows(aligned, met)
                else:
                    label_graph.freeze(layer, f"{location} {MET_DATA}")
                    fixed |= axes
    return fixed


def unexpanded_sizes(tensor: Tensor) -> tuple[int, ...]:
    """The shape, with 1 along dimensions that `expand` has repeated: whether that size changes with a width, trials find."""
    return tuple(size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
