"""The surgery of a replica (an average of the weights, a target network) when its model changes widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from evolvenet.execution.inputs import cast_to_parameters
from evolvenet.graph.index_map import NEW_UNIT
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.reconstruction import fit_to_targets
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
from evolvenet.pruning.recording import record
from evolvenet.pruning.selection import plan_cut
from evolvenet.surgery.norm_expansion import expand_norms
from evolvenet.surgery.resize_model import Surgery, TensorChange, compile_surgery, moved


def plan_replica_update(copy: nn.Module, graph: WidthGraph, surgery: Surgery, batches: Sequence[Any]) -> Surgery:
    """Plan the surgery of a model's copy, which has weights of its own, from the model's surgery. Nothing is changed yet.

    The same units are removed and added; ranks get the same change of basis before. The consumers of a removed unit are fitted
    to the copy's own outputs before the cut, since the model's fit is for other weights. New units have the model's values:
    their fan-out is zero in both; in the copy alone, if the growth has moved the model's present weights. Under a norm they
    are those of the copy's own weights, see `surgery.norm_expansion`.

    Args:
        copy: a model with the same tensor names and shapes as the graph's.
        graph: the widths before the change.
        surgery: what is going to be done to the model: a cut or a growth.
        batches: inputs on which the copy's consumers are fitted.

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
    # An average that was made before the model got its precision has another one.
    batches = [cast_to_parameters(batch, copy) for batch in batches]
    removed = [name for name, index_map in surgery.maps.items() if index_map.removes_units]
    if removed:
        return _plan_copys_cut(copy, graph, surgery, removed, batches)
    own = compile_surgery(copy, graph, surgery.maps)
    values = {change.name: change.value for change in surgery.changes}
    with_new = replace(own, changes=tuple(_with_model_values(change, values[change.name]) for change in own.changes))
    if surgery.updated:
        with_new = _without_fan_out(graph, with_new)
    # What keeps the function of the copy under its norms follows from its own weights.
    return expand_norms(copy, graph, with_new, columns=False)


def _plan_copys_cut(
    copy: nn.Module, graph: WidthGraph, surgery: Surgery, removed: Sequence[str], batches: Sequence[Any]
) -> Surgery:
    """As `EventData.plan_pruning` for units that are chosen; moments are gathered for consumers that they refit alone."""
    recording = record(copy, graph, removed, batches, TRAINING_LIMITS)
    fitted = frozenset[str]() if recording is None else recording.fitted
    measured = [
        name
        for name in removed
        if name in surgery.bases or any(tie.tensor not in fitted for tie in graph.widths[name].consumers)
    ]
    statistics = collect(copy, graph, batches, measured) if measured else None
    cut = plan_cut(copy, graph, surgery.maps, statistics, surgery.bases, without=fitted)
    return cut if recording is None else fit_to_targets(copy, graph, cut, recording)


def without_shared_tensors(surgery: Surgery, model: nn.Module) -> Surgery:
    """A copy's surgery without the tensors that it shares with the model, which the model's surgery changes.

    Args:
        surgery: from `plan_replica_update`.
        model: what the copy is a copy of.
    """
    tensors, _, _ = named_tensors(model)
    own = tuple(change for change in surgery.changes if change.tensor is not tensors.get(change.name))
    return replace(surgery, changes=own)


def _without_fan_out(graph: WidthGraph, surgery: Surgery) -> Surgery:
    """A growth whose new units no consumer reads: 0 in the new columns."""
    consumed = {(tie.tensor, tie.dim) for name in surgery.maps for tie in graph.widths[name].consumers}
    changes: list[TensorChange] = []
    for change in surgery.changes:
        value = change.value.clone()
        for dim, index_map in change.axes.items():
            if (change.name, dim) in consumed:
                new = [place for place, index in enumerate(index_map.indices) if index == NEW_UNIT]
                value.index_fill_(dim, torch.tensor(new, dtype=torch.int64, device=value.device), 0)
        changes.append(replace(change, value=value))
    return replace(surgery, changes=tuple(changes))


def _with_model_values(change: TensorChange, model_value: torch.Tensor) -> TensorChange:
    mask = moved(change).to(change.value.device)
    source = model_value.to(change.value.device, change.value.dtype)
    return replace(change, value=torch.where(mask, change.value, source))
