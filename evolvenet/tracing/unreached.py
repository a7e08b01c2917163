"""Parameters that no traced run has used, and the widths that may be their inputs.

The inputs of a head that starts at a later epoch, of a probe that only validation calls, or of a layer that the traced
batch does not reach are unknown. Every width as long as one of the axes of such a parameter is frozen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.graph.width_graph import Width, WidthGraph, Widths
from evolvenet.tracing.grouping import NEVER_RAN
from evolvenet.tracing.trace import trace
from evolvenet.tracing.untrained import freeze_untrained, untrained_parameters

log = logging.getLogger("evolvenet")

CONVOLUTION = 3
"""A weight of at least as many axes is a kernel, whose channels may be flattened together with spatial positions."""

MAY_FEED = "may feed "


def unreached_parameters(graph: WidthGraph) -> tuple[str, ...]:
    """Names of the parameters that no traced run has used.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.head, self.probe = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)
    ...     def forward(self, x):
    ...         return self.head(self.body(x))
    >>> unreached_parameters(trace(Net(), torch.zeros(1, 4)))
    ('probe.weight', 'probe.bias')
    """
    idle = {name for name, width in graph.widths.items() if width.frozen == NEVER_RAN}
    return tuple(
        tensor
        for tensor, axes in graph.layouts.items()
        if tensor in graph.trainable and any(part.width in idle for parts in axes.values() for part in parts)
    )


def freeze_possible_inputs(graph: WidthGraph, besides: Iterable[str] = ()) -> WidthGraph:
    """The graph in which every width that may be an input of an unreached parameter is frozen.

    A width may be one if an axis that holds it is as long as an axis of the parameter. The channels of a convolution
    also may be one if a dense weight's second axis is a multiple of them: they may be flattened with spatial positions.

    Args:
        graph: as traced.
        besides: paths of modules that are ignored, such as replicas of the network.

    Returns:
        The graph, each such width frozen with the parameter as its reason.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.head, self.probe = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)
    ...     def forward(self, x):
    ...         return self.head(self.body(x))
    >>> freeze_possible_inputs(trace(Net(), torch.zeros(1, 4))).widths["body"].frozen
    'may feed probe, which has not run: axis 1 of probe.weight has 8 places, too'
    """
    left_out = tuple(f"{path}." for path in besides)
    shapes = {
        name: graph.shapes[name]
        for name in unreached_parameters(graph)
        if not name.startswith(left_out) or not left_out
    }
    if not shapes:
        return graph
    widths = {name: _checked(graph, width, shapes) for name, width in graph.widths.items()}
    return replace(graph, widths=Widths(widths))


def trace_for_training(model: nn.Module, example_inputs: Any, outputs: Outputs | None = None) -> WidthGraph:
    """The graph of `trace` for a run in which other modules may come to run than on the example inputs.

    Widths that might feed an unreached parameter keep their size, with a warning, and so do layers that are not trained.

    Raises:
        TraceError: as `trace`.
    """
    graph = freeze_untrained(trace(model, example_inputs, outputs), untrained_parameters(model))
    graph = freeze_possible_inputs(graph)
    warn_of_unreached(graph)
    return graph


def warn_of_unreached(graph: WidthGraph) -> None:
    """Log one warning for each unreached module, with the widths frozen because of it and the remedy."""
    held: dict[str, list[str]] = {}
    for width in graph.widths.values():
        if width.frozen is not None and width.frozen.startswith(MAY_FEED):
            held.setdefault(width.frozen.removeprefix(MAY_FEED).partition(",")[0], []).append(width.name)
    for module, names in held.items():
        log.warning(
            "%s has not run on the example inputs, so the size of %s stays: expected every module to run there. Trace with "
            "inputs, or a step, that reach it, or remove it from the model if it is not used.",
            module,
            ", ".join(names),
        )


def _checked(graph: WidthGraph, width: Width, shapes: Mapping[str, tuple[int, ...]]) -> Width:
    if width.frozen is not None:
        return width
    lengths = {graph.shapes[tie.tensor][tie.dim] for tie in width.ties}
    channels = any(len(graph.shapes[tie.tensor]) >= CONVOLUTION for tie in width.producers)
    for tensor, shape in shapes.items():
        for dim, length in enumerate(shape):
            flattened = channels and len(shape) == 2 and dim == 1 and length > width.size and length % width.size == 0
            if length > 1 and (length in lengths or flattened):
                module = tensor.rpartition(".")[0] or tensor
                reason = f"{MAY_FEED}{module}, which has not run: axis {dim} of {tensor} has {length} places, too"
                return replace(width, frozen=reason, patches=())
    return width
