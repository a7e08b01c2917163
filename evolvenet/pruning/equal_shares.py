"""Sizes by equal shares of all widths: what is known about a network without data does not say where cuts cost least.

The spectrum of a layer's weights counts the directions that it computes from, not the units that the next layer needs after a
nonlinearity: of the inner units of a transformer's block it would give all beyond the stream's size away. On pretrained
networks equal shares are better.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.pruning.selection import magnitude

DEAD = 1e-7
"""Units of at most this share of the largest magnitude of their width do not count."""
STEPS = 40
"""Halvings of the interval in which the share is searched."""


def live_units(model: nn.Module, graph: WidthGraph) -> dict[str, int]:
    """How many units of each resizable width have weights that are not 0, on both sides; one at least.

    Of a width with parts, those of the part that has the most.

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> model[0].weight.data[1] = 0
    >>> live_units(model, trace(model, torch.zeros(1, 2)))
    {'0': 2}
    """
    found: dict[str, int] = {}
    for width in graph.resizable:
        parts = (magnitude(model, graph, width.part(number)) for number in range(width.parts))
        found[width.name] = max(1, *(int((strength > DEAD * strength.max()).sum()) for strength in parts))
    return found


def equal_shares(
    units: Mapping[str, int],
    options: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], float],
    limit: float,
) -> dict[str, int]:
    """Sizes within a cost that are the same share of every width's units, but for rounding.

    What rounding leaves over goes to the widths with the smallest shares first.

    Args:
        units: of each width.
        options: of each width, the sizes that it may take, ascending.
        cost: of some sizes; it rises with each of them.
        limit: of the cost.

    Returns:
        {width: one of its options}; the smallest ones where even their cost is above the limit.

    >>> equal_shares({"a": 10, "b": 4}, {"a": range(1, 11), "b": range(1, 5)}, lambda sizes: sum(sizes.values()), limit=9)
    {'a': 7, 'b': 2}
    """
    # A width of units that are 0 keeps them where there is room: shares may exceed 1.
    low, high = 0.0, max((sizes[-1] / units[name] for name, sizes in options.items()), default=0.0)

    def at(share: float) -> dict[str, int]:
        return {name: sizes[_place(sizes, share * units[name])] for name, sizes in options.items()}

    if cost(at(high)) <= limit:
        return at(high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= limit else (low, middle)
    found = at(low)
    while True:
        larger = {
            name: sizes[place + 1]
            for name, sizes in options.items()
            if (place := _place(sizes, found[name])) + 1 < len(sizes)
        }
        for name in sorted(larger, key=lambda each: larger[each] / units[each]):
            if cost({**found, name: larger[name]}) <= limit:
                found[name] = larger[name]
                break
        else:
            return found


def _place(sizes: Sequence[int], most: float) -> int:
    """The number of the largest size of at most so many units; of the smallest one if all are larger."""
    return max(0, bisect_right(sizes, most + 1e-9) - 1)
