"""Heads of queries that share one head of keys and values, which keeps its size while whole heads go (multi-query attention).

A product over the places of a head ties the queries of all heads to the keys: one unit is then a place of all heads. In a run
that keeps heads apart the keys and values count as data of a fixed size instead, so that a unit is a head of queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolvenet.tracing.labels import CONSTANT, Label, LabelGraph, is_constant, varying
from evolvenet.tracing.rearranged import rows_along

SHARED = "is shared by all heads, of which each can go as a whole"
"""Why units are frozen that all heads have in common."""


def meets_shared_places(
    label_graph: LabelGraph,
    layer: Tensor,
    partners: Sequence[Tensor],
    beside: Sequence[Tensor],
    other: Label,
    summed: set[int],
) -> bool:
    """Whether a product sums over the places of several heads on one side, and of a single one on the other side.

    In a run that keeps heads apart the layer is settled: places of each of several heads are tied, a single head is frozen.

    Args:
        label_graph: of the run.
        layer: of an activation.
        partners: layers of the other activation that the product ties to it, in equal dimensions.
        beside: those of its layers that vary along the heads alone.
        other: the label of the other activation.
        summed: the dimensions that are summed over.
    """
    own = set(varying(layer))
    if partners:
        others = set(varying(partners[0]))
        meets = len(partners) == 1 and bool(own & others & summed) and (own <= summed) != (others <= summed)
        meets = meets and bool((partners[0] >= 0).all())
    else:
        # An embedding of positions has met the keys, so that their places have no units any more.
        meets = not own <= summed and other.kind != CONSTANT and all(map(is_constant, beside))
    if not meets or bool((layer < 0).any()):
        return False
    if not own <= summed:
        label_graph.one_key.append(torch.unique(rows_along(layer, own & summed), dim=0))
    if not label_graph.keeps_heads:
        return False
    if own <= summed:
        label_graph.freeze(layer, SHARED)
    else:
        label_graph.tie_rows(layer, own & summed)
    return True


def without_shared_places(label_graph: LabelGraph, layers: list[Tensor]) -> list[Tensor]:
    """The layers of a tensor without places that all heads share, which are frozen, where these lie on an axis of heads.

    What several heads pick of the same values has heads and places; once an axis holds both, its units are whole heads.
    """
    if not label_graph.keeps_heads or len(layers) < 2:
        return layers
    heads = {dim for layer in layers if label_graph.is_placeholder(layer) for dim in varying(layer)}
    shared = [layer for layer in layers if heads & set(varying(layer)) and not label_graph.is_placeholder(layer)]
    for layer in shared:
        label_graph.freeze(layer, SHARED)
    return [layer for layer in layers if not any(layer is each for each in shared)]
