"""Layers that are not trained: a frozen backbone, a teacher, the network of a perceptual loss keep their sizes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import FOLLOWS, Width, WidthGraph, Widths


def untrained_parameters(model: nn.Module, trained: Collection[int] = ()) -> dict[str, str]:
    """{name of each parameter that training leaves as it is: why}.

    A model of which nothing is trained is not in training, and has none.

    Args:
        model: any module.
        trained: the `id` of each parameter that an optimizer holds; empty if that is not known.

    >>> model = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.Linear(8, 2))
    >>> list(untrained_parameters(model))
    ['0.weight', '0.bias']
    """
    found: dict[str, str] = {}
    tensors, _, parameters = named_tensors(model)
    for name in sorted(parameters):
        if not tensors[name].requires_grad:
            found[name] = "requires_grad is False"
        elif trained and id(tensors[name]) not in trained:
            found[name] = "no optimizer holds it"
    return {} if len(found) == len(parameters) else {name: found[name] for name in tensors if name in found}


def freeze_untrained(graph: WidthGraph, untrained: dict[str, str]) -> WidthGraph:
    """The graph in which no weight that training leaves as it is would be resized.

    Weights count that produce or consume a width: norms and biases beside trained weights do not.

    Args:
        graph: as traced.
        untrained: see `untrained_parameters`.

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> graph = freeze_untrained(trace(model, torch.zeros(1, 4)), untrained_parameters(model))
    >>> graph.sizes, graph.widths["0"].frozen
    ({'2': 6}, '0.weight is not trained (requires_grad is False), so its layer keeps its sizes')
    """
    if not untrained:
        return graph
    widths = {name: _checked(width, untrained) for name, width in graph.widths.items()}
    return replace(graph, widths=Widths(widths))


def freeze_unchanged(graph: WidthGraph, model: nn.Module, stepped: Collection[int]) -> WidthGraph:
    """The graph without the widths of modules that an optimizer holds, but which training has left as they are so far.

    A teacher that runs under `no_grad` is one. Where nothing is known of any parameter, nothing is frozen.

    Args:
        graph: of the model.
        model: in training.
        stepped: the `id` of each parameter for which an optimizer keeps a state.
    """
    tensors, _, parameters = named_tensors(model)
    changed = {name for name in parameters if tensors[name].grad is not None or id(tensors[name]) in stepped}
    if not changed:
        return graph
    idle = {name: "no step has changed it so far" for name in parameters - changed if tensors[name].requires_grad}
    widths = {
        name: width if any(tie.tensor in changed for tie in width.ties) else _checked(width, idle)
        for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths)) if any(widths[n] is not graph.widths[n] for n in widths) else graph


def _checked(width: Width, untrained: dict[str, str]) -> Width:
    found = next((tie.tensor for tie in width.ties if tie.role != FOLLOWS and tie.tensor in untrained), None)
    if found is None or width.frozen is not None:
        return width
    reason = f"{found} is not trained ({untrained[found]}), so its layer keeps its sizes"
    return replace(width, frozen=reason, patches=())
