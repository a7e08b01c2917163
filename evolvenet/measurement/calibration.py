"""How many batches widths are measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from evolvenet._compat.torch import tree_leaves
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.sampling import samples_in
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp, WeightOpMode
from evolvenet.graph.width_graph import Tie, WidthGraph

LEAST = 4
"""Fewest batches."""

PER_UNIT = 2
"""Places (samples × positions) for each unit of the widest width."""

BYTES = 2**28
"""Most bytes in the batches beyond the first `LEAST`: they lie on the model's device until the event."""

EPOCH = 0.1
"""Most batches, as a share of an epoch's, where its length is known."""


def places_per_sample(model: nn.Module, graph: WidthGraph, inputs: Any) -> dict[str, float]:
    """At how many places of a sample the consumers of each width take in its units: positions of an image, words of a text.

    Args:
        model: the model of the graph.
        graph: its widths.
        inputs: a few samples; the model runs on them once.

    Returns:
        {resizable width: the number at the consumer that has most}; widths without a measured consumer are left out.

    >>> from torch import zeros
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))
    >>> places_per_sample(model, trace(model, zeros(1, 1, 8, 8)), zeros(2, 1, 8, 8))
    {'0': 36.0}
    """
    ties: dict[tuple[str, int], list[tuple[str, Tie]]] = {}
    for width in graph.resizable:
        for tie in width.consumers:
            ties.setdefault((tie.tensor, tie.dim), []).append((width.name, tie))
    found: dict[str, float] = {}

    def count(op: WeightOp) -> None:
        for name, tie in ties.get((op.tensor, op.axis), ()):
            places = op.input_positions * op.groups * tie.repeat / max(1, samples_in(inputs))
            found[name] = max(found.get(name, 0.0), places)

    with isolated(model, gradients=graph.differentiates), op_by_op(WeightOpMode(model, before=count)):
        run_model(model, inputs)
    return found


def batches_needed(graph: WidthGraph, places: Mapping[str, float], batch: Any, epoch: float = math.inf) -> int:
    """How many batches like one hold enough places for every width.

    Args:
        graph: the widths.
        places: from `places_per_sample`; 1 for a width that is left out.
        batch: a batch.
        epoch: batches in an epoch.

    Returns:
        At least `LEAST`, at most the share `EPOCH` of an epoch and `BYTES` beyond that: with fewer places than units,
        covariances are shrunk (`evolvenet.linalg.shrinkage`).

    >>> from torch import zeros
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(2, 1024), nn.Linear(1024, 2)), zeros(1, 2))
    >>> batches_needed(graph, {"0": 1.0}, zeros(64, 2)), batches_needed(graph, {"0": 1.0}, zeros(64, 2), epoch=100)
    (32, 10)
    """
    most = max((width.size / places.get(width.name, 1.0) for width in graph.resizable), default=0.0)
    wanted = math.ceil(PER_UNIT * most / max(1, samples_in(batch)))
    size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return max(LEAST, min(wanted, LEAST + BYTES // max(1, size), int(min(EPOCH * epoch, wanted))))
