"""The graph of one network beside that of a training step that runs it."""

from __future__ import annotations

from dataclasses import replace

from evolvenet.graph.width_graph import Tie, Width, WidthGraph, Widths
from evolvenet.tracing.grouping import NEVER_RAN

Place = tuple[str, int, int]


def reconciled(alone: WidthGraph, whole: WidthGraph, path: str = "") -> WidthGraph | None:
    """The network's graph, with the step's reasons to keep a size and its least sizes.

    None where the step ties the network's widths to anything more.

    Args:
        alone: the graph of a network called with its own inputs.
        whole: the graph of a step, in which losses may read layers and other networks run.
        path: of the network in the model of `whole`.

    >>> import torch
    >>> from torch import nn
    >>> from evolvenet.execution.step import Step
    >>> from evolvenet.tracing.trace import trace
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 4)
    >>> def step(model, x):
    ...     return model(x).softmax(1).sum() + model[0](x).argmax(1).sum()
    >>> reconciled(trace(net, x), trace(net, Step(step, x))).widths["0"].frozen.partition(" at ")[0]
    'aten::argmax in the model works along its units'
    """
    prefix = f"{path}." if path else ""
    by_place = {_place(tie): width for width in whole.widths.values() for tie in width.ties}
    places = {width.name: {_place(tie, prefix) for tie in width.ties} for width in alone.widths.values()}
    known = {place for width in alone.resizable for place in places[width.name]}
    if any(_place(tie) not in known for width in whole.resizable for tie in width.ties):
        return None
    widths = dict(alone.widths)
    for width in alone.widths.values():
        others = {other.name: other for place in places[width.name] if (other := by_place.get(place)) is not None}
        if width.frozen is None:
            other = next(iter(others.values()), None)
            if other is None or len(others) > 1 or {_place(tie) for tie in other.ties} != places[width.name]:
                return None
            if other.frozen is None and _ties_parts(width, other, prefix):
                return None
            if other.frozen is not None:
                widths[width.name] = replace(width, frozen=other.frozen, patches=())
            else:
                widths[width.name] = replace(width, smallest=max(width.smallest, other.smallest))
        elif width.frozen == NEVER_RAN:
            reason = next((other.frozen for other in others.values() if other.frozen is not None), NEVER_RAN)
            widths[width.name] = replace(width, frozen=reason)
    return replace(alone, widths=Widths(widths))


def _ties_parts(width: Width, other: Width, prefix: str) -> bool:
    """Whether two parts of a width are one in the step: they have to keep the same units there."""
    numbers = {(tie.tensor, tie.dim, tie.start): tie.part for tie in other.ties}
    pairs = {(tie.part, numbers.get((prefix + tie.tensor, tie.dim, tie.start))) for tie in width.ties}
    return len({number for _, number in pairs}) < width.parts


def _place(tie: Tie, prefix: str = "") -> Place:
    return prefix + tie.tensor, tie.dim, tie.repeat
