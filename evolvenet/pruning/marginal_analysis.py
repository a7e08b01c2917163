"""Sizes within a cost by marginal analysis: what is cut next is what loses least for the cost that it saves."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import pairwise

from evolvenet.pruning.trials import Curve

_LEAST = 1e-12

STRIDES = 64
"""Cuts in which a width may go at most from its largest to its smallest option."""


def fit_to_cost(
    curves: Mapping[str, Curve],
    options: Mapping[str, Sequence[int]],
    start: Mapping[str, int],
    cost: Callable[[Mapping[str, int]], float],
    limit: float,
    ahead: Container[str] = (),
) -> dict[str, int]:
    """Sizes within a cost, with a small sum of losses: marginal analysis (Fox 1966), with costs that depend on each other.

    From `start` down, the width is cut next whose loss rises least for the cost saved, by a 64th of its options at once; what
    is saved below the limit does not count, so that the last cut takes no more than it must. Then single options are given
    back, those with the most loss for their cost first, while the cost stays within the limit.

    Args:
        curves: of each width, convex: a steep beginning must not hide a flat end.
        options: of each width, the sizes that it may take, ascending.
        start: sizes from which widths are cut; between two options, the lower one.
        cost: of some sizes.
        limit: of the cost.
        ahead: names of which cuts of 1, 2, 4 … times that depth are compared, the one with the least loss for its cost is
            made: ranks, whose first cuts may save nothing.

    Returns:
        {width: one of its options}; the smallest ones where even their cost is above the limit.

    >>> curves = {"a": [(0, 4.0), (4, 0.0)], "b": [(0, 8.0), (4, 0.0)]}
    >>> options = {"a": range(1, 5), "b": range(1, 5)}
    >>> fit_to_cost(curves, options, {"a": 4, "b": 4}, lambda sizes: sum(sizes.values()), limit=4)
    {'a': 1, 'b': 3}
    """
    places = {name: max(0, bisect_right(sizes, start[name]) - 1) for name, sizes in options.items()}

    def cost_with(changed: Mapping[str, int]) -> float:
        return cost({name: options[name][place] for name, place in {**places, **changed}.items()})

    def next_cut(name: str) -> tuple[float, str, int] | None:
        """Loss per cost saved, width, new place."""
        here = places[name]
        depths = [min(here, max(1, len(options[name]) // STRIDES))]
        while name in ahead and 0 < depths[-1] < here:
            depths.append(min(here, 2 * depths[-1]))
        cuts = [(ratio(name, here - depth), name, here - depth) for depth in depths if depth]
        return min(cuts, default=None)

    def ratio(name: str, place: int) -> float:
        loss = loss_at(curves[name], options[name][place]) - loss_at(curves[name], options[name][places[name]])
        return loss / max(min(now - cost_with({name: place}), now - limit), _LEAST)

    now = cost_with({})
    queue = [cut for cut in map(next_cut, places) if cut is not None]
    heapq.heapify(queue)
    while now > limit and queue:
        _, name, _ = heapq.heappop(queue)
        # Loss per cost only rises while other widths shrink: what is still the least when computed anew is the least.
        cut = next_cut(name)
        if cut is not None and queue and cut > queue[0]:
            heapq.heappush(queue, cut)
        elif cut is not None:
            places[name] = cut[2]
            now = cost_with({})
            heapq.heappush(queue, cut)
    return _filled(curves, options, places, cost, limit)


def _filled(
    curves: Mapping[str, Curve],
    options: Mapping[str, Sequence[int]],
    places: dict[str, int],
    cost: Callable[[Mapping[str, int]], float],
    limit: float,
) -> dict[str, int]:
    """Give back single options, those with the most loss for their cost first, while the cost stays within the limit."""
    while True:
        sizes = {name: options[name][place] for name, place in places.items()}
        now, gains = cost(sizes), []
        for name, place in places.items():
            if place + 1 < len(options[name]):
                larger = options[name][place + 1]
                more = cost({**sizes, name: larger})
                gain = loss_at(curves[name], sizes[name]) - loss_at(curves[name], larger)
                if more <= limit:
                    gains.append((gain / max(more - now, _LEAST), name))
        if not gains:
            return sizes
        places[max(gains)[1]] += 1


def convex(curve: Curve) -> Curve:
    """The lower convex hull of a curve (Andrew's monotone chain, 1979).

    >>> convex([(0, 4.0), (1, 3.0), (2, 0.5), (3, 0.0)])
    [(0, 4.0), (2, 0.5), (3, 0.0)]
    """
    hull: list[tuple[int, float]] = []
    for size, loss in sorted(curve):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (size - hull[-1][0]) >= (loss - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((size, loss))
    return hull


def loss_at(curve: Curve, size: int) -> float:
    """The loss at a size between two of the curve's, in proportion.

    >>> loss_at([(0, 4.0), (2, 0.0)], 1)
    2.0
    """
    for (low, above), (high, below) in pairwise(curve):
        if size <= high:
            return above + (below - above) * (max(size, low) - low) / (high - low)
    return curve[-1][1]
