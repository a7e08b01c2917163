"""Layers that do not run because a copy stands in their place: they have the widths of the copy.

PEFT keeps a head that is trained whole (`modules_to_save`) beside the one that it was copied from, which runs where adapters
are disabled, and adapters that are not active beside the active one. Without ties they would keep their sizes, and fail later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from evolvenet.tracing.grouping import NEVER_RAN
from evolvenet.tracing.labels import LabelGraph

COPIES = re.compile(r"^(.*\.)?(?:original_module|modules_to_save\.[^.]+)\.(.+)$")
"""A tensor of a layer or of its trained copy: the path of both, and the tensor's name in the layer."""
FACTORS = re.compile(r"^(.*\.)?lora_([AB])\.([^.]+)\.(.+)$")
"""A factor of an adapter: the layer's path, which factor, the adapter's name, and the tensor's name."""
SHARED_AXIS = {"A": 1, "B": 0}
"""The axis that factors of all adapters at a layer have in common: inputs of A, outputs of B. The other is the rank."""


def tie_idle_copies(label_graph: LabelGraph, shapes: Mapping[str, Sequence[int]]) -> None:
    """Tie the units of tensors that have not run to those of a copy that has, with the same roles; ranks keep their size.

    Args:
        label_graph: after a run.
        shapes: of all tensors.
    """
    ids = {(axis.tensor, axis.dim): torch.arange(axis.start, axis.start + axis.size) for axis in label_graph.axes}
    for name, copy, dims in list(_pairs(list(label_graph.first_use), shapes)):
        label_graph.first_use[name] = len(label_graph.first_use)
        for dim in range(len(shapes[name])):
            own, other = ids.get((name, dim)), ids.get((copy, dim))
            if own is not None and dim not in dims:
                label_graph.freeze(own, NEVER_RAN)
            elif own is not None and other is not None:
                label_graph.union(own, other)
                if (role := label_graph.roles.get((copy, dim))) is not None:
                    label_graph.roles[name, dim] = role
                    label_graph.inherited_roles.add((name, dim))


def _pairs(used: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str, Sequence[int]]]:
    """(a tensor that has not run, its copy that has, the axes that they have in common)."""
    copies: dict[object, str] = {}
    for name in used:
        if key := _key(name):
            copies.setdefault(key, name)
    known = set(used)
    # In their order in the model: a set's order differs from process to process.
    for name in (name for name in shapes if name not in known):
        copy, factor = copies.get(_key(name)), FACTORS.match(name)
        if copy is not None:
            dims = range(len(shapes[name])) if COPIES.match(name) or not factor else (SHARED_AXIS[factor[2]],)
            if all(shapes[name][dim] == shapes[copy][dim] for dim in dims):
                yield name, copy, dims


def _key(name: str) -> object:
    """Equal for a tensor and its copies; None for a tensor without."""
    if found := COPIES.match(name):
        return found.groups()
    return (found[1], found[2], found[4]) if (found := FACTORS.match(name)) else None
