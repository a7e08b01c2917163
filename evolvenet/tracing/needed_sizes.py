"""Sizes that ops need whatever the widths are: multiples of a number of places, and as many units as `topk` selects."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from evolvenet.tracing.labels import LabelGraph, varying

Multiple = tuple[int, str]
"""The number of units of which a multiple is needed, and the op that needs it."""


def mark_multiple(label_graph: LabelGraph, layer: Tensor, places: int, where: str) -> None:
    """Keep that an op needs a multiple of so many places along an axis.

    Args:
        label_graph: the units.
        layer: of a tensor that the op is given, varying along the axis alone; others are left out.
        places: the number.
        where: the op.
    """
    if len(varying(layer)) == 1:
        label_graph.multiples.append((layer.reshape(-1), places, where))


def needed_multiples(label_graph: LabelGraph, component: np.ndarray) -> dict[int, Multiple]:
    """{component: the number of units of which a multiple is needed}.

    A unit with several places on the axis (a gate and what it gates, a head) needs less: of 4 places on it, with a multiple
    of 8 places needed, a multiple of 2 units.
    """
    found: dict[int, Multiple] = {}
    for layer, places, where in label_graph.multiples:
        members, counts = np.unique(component[layer[layer >= 0].numpy()], return_counts=True)
        for member, count in zip(members.tolist(), counts.tolist(), strict=True):
            known = found.get(member, (1, where))
            found[member] = math.lcm(known[0], places // math.gcd(places, count)), known[1]
    return found


def common_multiple(needed: Sequence[Multiple]) -> Multiple:
    """The multiple that fits several needs, with the op of the first one.

    >>> common_multiple([(4, "mm in fc"), (8, "mm in out")]), common_multiple([])
    ((8, 'mm in fc'), (1, ''))
    """
    return math.lcm(*(number for number, _ in needed)), next((where for _, where in needed), "")


def needed_units(label_graph: LabelGraph, component: np.ndarray) -> dict[int, int]:
    """{component: how many units like it must remain at least}."""
    found: dict[int, int] = {}
    for ids, least in label_graph.fewest:
        for member in np.unique(component[ids.numpy()]).tolist():
            found[member] = max(found.get(member, 1), least)
    return found
