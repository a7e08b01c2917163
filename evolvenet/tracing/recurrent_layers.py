"""The layers and directions of one LSTM, GRU or RNN: torch gives them one size, but no op ties the units of one to another's.

They are the parts of one width (see `evolvenet.graph.width_graph.Width`), unless the model's code ties their units: by states
that it passes in, by a sum over the layers, by a slice of the last layer's outputs. Where units of each cannot go, another run
with labels has all of them tied, see `frozen_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.tracing.labels import LabelGraph

EqualSizes = tuple[Tensor, ...]
"""The ids of axes of one length, which cannot be changed for one of them alone."""


def note_recurrent_layers(model: nn.Module, label_graph: LabelGraph, aliases: Mapping[str, str]) -> None:
    """Keep which axes hold the hidden and projected units of each layer and direction, and the modules of these.

    Of a module whose weights are computed (weight norm) nothing is kept, so its layers stay tied.

    Args:
        model: the model.
        label_graph: with its tensors.
        aliases: other names of tied tensors, from `named_tensors`.
    """
    ids = {(axis.tensor, axis.dim): torch.arange(axis.start, axis.start + axis.size) for axis in label_graph.axes}
    for path, module in model.named_modules():
        if not isinstance(module, nn.RNNBase):
            continue
        ends = [f"_l{k}{end}" for k in range(module.num_layers) for end in ("", "_reverse")[: 1 + module.bidirectional]]
        # Projected units are what the next step reads; the cells are what is projected.
        names = ("weight_hh", "weight_hr") if module.proj_size else ("weight_hh",)
        prefix = f"{path}." if path else ""
        found: list[list[Tensor]] = []
        for name in names:
            full = [prefix + name + end for end in ends]
            axes = [ids.get((aliases.get(each, each), 1)) for each in full]
            found.append([axis for axis in axes if axis is not None])
        if all(len(axes) == len(ends) for axes in found):
            label_graph.equal_sizes += [tuple(axes) for axes in found]
            label_graph.recurrent.add(path)


def with_tied_layers(label_graph: LabelGraph, sets: Sequence[EqualSizes]) -> LabelGraph:
    """The label graph in which unit i of one of the axes is unit i of all others of its set."""
    edges = [(axes[0], other) for axes in sets for other in axes[1:]]
    left = [axes for axes in label_graph.equal_sizes if not any(axes is each for each in sets)]
    return replace(label_graph, edges=[*label_graph.edges, *edges], equal_sizes=left)


def frozen_layers(graph: WidthGraph, label_graph: LabelGraph) -> list[Width]:
    """The frozen widths with the units of several layers, which may be resizable where all layers have the same units.

    The states of all layers have one axis for layers and one for units. An op along the first (a maximum, a product with a factor
    for each layer) looks as if it ran over units, where each layer has units of its own.

    Args:
        graph: of a run in which each layer has units of its own.
        label_graph: its ties.
    """
    starts = {int(axis[0]) for axes in label_graph.equal_sizes if len(axes) > 1 for axis in axes}
    hidden = {(axis.tensor, axis.dim) for axis in label_graph.axes if axis.start in starts}
    frozen = (width for width in graph.widths.values() if width.frozen is not None)
    return [width for width in frozen if any((tie.tensor, tie.dim) in hidden for tie in width.ties)]


@dataclass(frozen=True)
class Parts:
    """Which groups of units are the parts of one width.

    Args:
        leaders: {group: the first one of its width}, of groups that are parts.
        numbers: {group: number of the part}.
        unfit: the sets of axes that are not one whole group each.
    """

    leaders: Mapping[int, int]
    numbers: Mapping[int, int]
    unfit: Sequence[EqualSizes] = ()


def parts_of(label_graph: LabelGraph, places: np.ndarray, kinds: Sequence[tuple[int, int]]) -> Parts:
    """The groups that are parts of one width.

    Args:
        label_graph: with the axes of equal sizes.
        places: (group, unit) of every id, `[units, 2]`, −1 for none.
        kinds: of every group, how many units it has, and of which number its size stays a multiple.
    """
    families: list[set[int]] = []
    unfit: list[EqualSizes] = []
    for axes in label_graph.equal_sizes:
        found = [places[axis.numpy()] for axis in axes]
        groups = {int(along[0, 0]) for along in found}
        whole = all(
            along[0, 0] >= 0
            and kinds[along[0, 0]][0] == len(along)
            and bool((along[:, 0] == along[0, 0]).all() and (along[:, 1] == np.arange(len(along))).all())
            for along in found
        )
        if not whole or len({kinds[group][1] for group in groups}) > 1:
            unfit.append(axes)
            continue
        # An encoder's states may be those that a decoder begins with: its layers are the same groups.
        joined = groups.union(*(family for family in families if family & groups))
        families = [family for family in families if not family & groups] + [joined]
    leaders = {group: min(family) for family in families for group in family}
    numbers = {group: number for family in families for number, group in enumerate(sorted(family))}
    return Parts(leaders, numbers, unfit)
