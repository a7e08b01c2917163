"""Copies of a model (averages of its weights) through the change that the model itself goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.reconstruction import TRAINING_LIMITS, reconstruct
from evolvenet.pruning.selection import plan_cut
from evolvenet.surgery.resize_model import Surgery, TensorChange, compile_surgery, moved


def plan_replica_update(copy: nn.Module, graph: WidthGraph, surgery: Surgery, batches: Sequence[Any]) -> Surgery:
    """What a change of a model's widths means for a copy of it with weights of its own. Nothing is changed yet.

    The same units go and come. What reads a removed unit is fitted to what the copy itself answered, since another model's
    fit would not suit its weights. New units are the model's own: they are read by nobody yet, there as here.

    Args:
        copy: a model with the same tensor names and shapes as the graph's.
        graph: the widths before the change.
        surgery: what is going to be done to the model: a cut or a growth.
        batches: inputs that the copy's fit may look at.

    Returns:
        The surgery for the copy.

    Raises:
        ResizeError: if the copy does not have the graph's shapes.

    >>> from evolvenet.graph.index_map import IndexMap
    >>> from evolvenet.tracing.trace import trace
    >>> model, copy = (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(2))
    >>> graph = trace(model, torch.zeros(1, 4))
    >>> grown = compile_surgery(model, graph, {"0": IndexMap.grow(3, 1)})
    >>> change = plan_replica_update(copy, graph, grown, []).changes[0]
    >>> change.name, torch.equal(change.value[:3], copy[0].weight), torch.equal(change.value[3:], grown.changes[0].value[3:])
    ('0.weight', True, True)
    """
    if any(index_map.removed for index_map in surgery.maps.values()):
        cut = plan_cut(copy, graph, surgery.maps, collect(copy, graph, batches))
        return reconstruct(copy, graph, cut, batches, TRAINING_LIMITS)
    own = compile_surgery(copy, graph, surgery.maps)
    values = {change.name: change.value for change in surgery.changes}
    return replace(own, changes=tuple(_born(change, values[change.name]) for change in own.changes))


def without_shared_tensors(surgery: Surgery, model: nn.Module) -> Surgery:
    """A copy's surgery without the tensors that it shares with the model: they go through the model's.

    Args:
        surgery: from `plan_replica_update`.
        model: what the copy is a copy of.
    """
    tensors, _, _ = named_tensors(model)
    own = tuple(change for change in surgery.changes if change.tensor is not tensors.get(change.name))
    return replace(surgery, changes=own)


def _born(change: TensorChange, model_value: torch.Tensor) -> TensorChange:
    mask = moved(change).to(change.value.device)
    source = model_value.to(change.value.device, change.value.dtype)
    return replace(change, value=torch.where(mask, change.value, source))
