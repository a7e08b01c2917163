"""Whether the ties in a new run of a resized model are those that its graph predicts."""

from __future__ import annotations

import numpy as np

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.tracing.labels import LabelGraph


def difference(graph: WidthGraph, rerun: LabelGraph, joined: frozenset[str]) -> str | None:
    """How the new run differs from the graph of the resized model, as the end of "the width is frozen: …"; None if it does not.

    Args:
        graph: of the resized model.
        rerun: the ties in its new run.
        joined: names of the widths whose units are tied by a fix.
    """
    predicted = _predicted(graph, rerun)
    axis = _disagreement(predicted, rerun) or _split_heads(graph, predicted, rerun, joined)
    if axis is not None:
        return f"a trial tied its units differently on {axis}"
    part = _partly_changed(graph, predicted, rerun)
    return f"in a trial {part}" if part else None


def _disagreement(predicted: np.ndarray, rerun: LabelGraph) -> str | None:
    """The first axis on which the ties of the new run differ from those that the graph predicts, or None.

    One unit of the graph may be several in the new run, as fixes tie units that no op ties; never the reverse.
    """
    known = predicted[:, 0] >= 0
    found, units = rerun.components()[: len(predicted)][known], predicted[known]
    if not len(found):
        return None
    code = units[:, 0] * (units[:, 1].max() + 1) + units[:, 1]
    expected = np.full(found.max() + 1, -1)
    # Backwards, so that the first occurrence of a component counts.
    expected[found[::-1]] = code[::-1]
    wrong = np.flatnonzero(known)[expected[found] != code]
    if not len(wrong):
        return None
    axis = next(axis for axis in rerun.axes if axis.start <= wrong[0] < axis.start + axis.size)
    return f"axis {axis.dim} of {axis.tensor}"


def _split_heads(graph: WidthGraph, predicted: np.ndarray, rerun: LabelGraph, joined: frozenset[str]) -> str | None:
    """The failure if the new run lays units out in grids that cut through units tied by a fix, or None.

    Units tied by a fix are whole rows or whole columns of grids of heads × places. If they no longer are, the boundaries
    between heads have moved, which changes no shape.
    """
    numbers = {k for (name, _), k in _numbers(graph).items() if name in joined}
    for ids in rerun.grids.values():
        grid = predicted[ids.numpy()]
        if int(ids.min()) < 0 or len(np.unique(grid[..., 0])) > 1 or int(grid[0, 0, 0]) not in numbers:
            continue
        units = grid[..., 1]
        if not ((units == units[:1]).all() or (units == units[:, :1]).all()):
            return "heads whose boundaries have moved"
    return None


def _partly_changed(graph: WidthGraph, predicted: np.ndarray, rerun: LabelGraph) -> str | None:
    """The op that in the new run changes some units of a width and not the others, or None.

    A slice at a number in the code, `h[:, :8].tanh()`, ties no units and changes no shape, but selects other units.
    """
    widths = [graph.widths[name] for name, _ in _numbers(graph)]
    sizes = [0 if width.frozen is not None else width.size for width in widths]
    for ids, reason in rerun.changed.items():
        units = np.unique(predicted[np.frombuffer(ids, np.int64)], axis=0)
        numbers, counts = np.unique(units[units[:, 0] >= 0, 0], return_counts=True)
        if any(count < sizes[number] for number, count in zip(numbers, counts, strict=True)):
            return reason
    return None


def _predicted(graph: WidthGraph, rerun: LabelGraph) -> np.ndarray:
    """(number of the width and part, unit) that the graph predicts for every id of the new run, −1 for none; `[units, 2]`."""
    found = np.full((rerun.units, 2), -1)
    numbers = _numbers(graph)
    for axis in rerun.axes:
        at = axis.start
        for part in graph.layouts.get(axis.tensor, {}).get(axis.dim, ()):
            if part.width is not None:
                found[at : at + part.length, 0] = numbers[part.width, part.part]
                found[at : at + part.length, 1] = np.repeat(np.arange(part.length // part.repeat), part.repeat)
            at += part.length
    return found


def _numbers(graph: WidthGraph) -> dict[tuple[str, int], int]:
    """A number for each part of every width, by its name and the part."""
    every = [(width.name, part) for width in graph.widths.values() for part in range(width.parts)]
    return {each: number for number, each in enumerate(every)}
