"""How much of a model can change: its parameters divided between the widths that they lie in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evolvenet.graph.width_graph import Segment, Width, WidthGraph

OUTPUT = "is the model's output"
"""The reason of a width that the model returns."""
OTHER_ORDER = "its units stand in another order"
"""How the reason of a width begins of which an axis has the units in another order, see `other_order`."""

TRIAL, NO_RULE = "a trial ", " has no rule"
"""What the reason of a width contains whose code is not understood: such a width is not given by the task."""


def other_order(tensor: str, dim: int) -> str:
    """The reason of a width whose units stand in another order on an axis, which is not among its ties."""
    return f"{OTHER_ORDER} on axis {dim} of {tensor}"


def tensor_in_other_order(reason: str | None) -> str | None:
    """The tensor that `other_order` has written into a reason; None for all other reasons.

    >>> tensor_in_other_order(other_order("attn.in_proj_weight", 0)), tensor_in_other_order("is the model's output")
    ('attn.in_proj_weight', None)
    """
    return reason.rpartition(" of ")[2] if reason is not None and reason.startswith(OTHER_ORDER) else None


def shares(graph: WidthGraph) -> dict[str, float]:
    """{width: share of the model's parameters that fall to it}, 0 … 1.

    Each entry of a parameter is divided equally between its axes that are part of a width: of a weight `[hidden, stream]`,
    half falls to the hidden width and half to the stream. Axes of given widths (see `is_given`) and of a convolution's
    kernel take no part: of the first layer's weight `[hidden, colours]` everything falls to the hidden width.

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> graph = trace(model, torch.zeros(1, 4))
    >>> {name: round(share, 3) for name, share in shares(graph).items()}  # all but the bias of 2 outputs, 112 of 114
    {'0': 0.982, '0:in': 0.0, '2': 0.0}
    """
    found = dict.fromkeys(graph.widths, 0.0)
    for tensor in graph.trainable:
        for name, count in entries_of(graph, tensor).items():
            found[name] += count
    total = graph.parameters
    return {name: share / total if total else 0.0 for name, share in found.items()}


def entries_of(graph: WidthGraph, tensor: str) -> dict[str, float]:
    """{width: number of a tensor's entries that fall to it}, as in `shares`."""
    found: dict[str, float] = {}
    names = {part.width for axis in graph.layouts[tensor].values() for part in axis if part.width is not None}
    counted = {name for name in names if not is_given(graph.widths[name])}
    axes = [
        _runs(graph.layouts[tensor].get(dim, ()), length, counted) for dim, length in enumerate(graph.shapes[tensor])
    ]
    for runs in product(*axes):
        parts = [width for width, _ in runs if width is not None]
        for width in parts:
            if width:
                found[width] = found.get(width, 0.0) + math.prod(length for _, length in runs) / len(parts)
    return found


def is_given(width: Width) -> bool:
    """Whether a frozen width is an end of the model: an input or output, a vocabulary, a number of positions.

    One weight at most produces or consumes it, or it is the model's output and nothing consumes it. A residual stream that
    is the model's output is not given: layers inside of the model consume it.
    """
    if width.frozen is None or width.frozen.startswith((OTHER_ORDER, TRIAL)) or NO_RULE in width.frozen:
        return False
    weights = len({(tie.tensor, tie.dim) for tie in (*width.producers, *width.consumers)})
    return weights < 2 or (width.frozen == OUTPUT and not width.consumers)


def _runs(segments: Sequence[Segment], length: int, counted: set[str]) -> list[tuple[str | None, int]]:
    """An axis as (width, places), None for places that take no part, "" for those of a width in another order.

    Only the units of a frozen width that stand in another order than elsewhere are single places without a width.
    """
    found: dict[str | None, int] = {}
    for part in segments:
        disordered = part.width is None and part.length == 1 and len(segments) > 1
        width = part.width if part.width in counted else "" if disordered else None
        found[width] = found.get(width, 0) + part.length
    return list(found.items()) or [(None, length)]
