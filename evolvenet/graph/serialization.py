"""A `WidthGraph` as plain data and back, so that a resumed run continues with the same graph."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from evolvenet.errors import RecordError
from evolvenet.graph.exact_growth import ExactGrowth
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.plain_data import check_types, reading
from evolvenet.graph.width_graph import Segment, Width, WidthGraph, assemble


def to_state_dict(graph: WidthGraph) -> dict[str, Any]:
    """A graph as dicts, lists, strings and numbers, fit for JSON and for `weights_only` checkpoints.

    Chosen outputs are written if they are names; a function has no such form, and the graph read back has none.

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4))
    >>> from_state_dict(to_state_dict(graph)) == graph
    True
    """
    widths = [{**asdict(width), "ties": [], "patches": [list(entry) for entry in width.patches]}
              for width in graph.widths.values()]  # fmt: skip
    roles = [[tie.tensor, tie.dim, tie.role] for width in graph.widths.values() for tie in width.ties]
    layouts = {
        name: [
            [dim, [[part.width, part.length, part.repeat, part.part] for part in segments]]
            for dim, segments in axes.items()
        ]
        for name, axes in graph.layouts.items()
    }
    return {
        "widths": widths,
        "roles": roles,
        "layouts": layouts,
        "shapes": {name: list(shape) for name, shape in graph.shapes.items()},
        "trainable": sorted(graph.trainable),
        "aliases": dict(graph.aliases),
        "differentiates": graph.differentiates,
        "added": sorted(graph.added),
        "gates": sorted(graph.gates),
        "outputs": None if graph.outputs is None or callable(graph.outputs) else list(graph.outputs),
    }


def from_state_dict(state: Mapping[str, Any]) -> WidthGraph:
    """The graph that `to_state_dict` was called on.

    Raises:
        RecordError: if the state is none of a graph, or its parts do not fit each other.
    """
    with reading("The graph of widths in a checkpoint"):
        graph = _from_state_dict(state)
        check_types(graph, WidthGraph, "graph")
        check_types(dict(graph.widths), dict[str, Width], "widths")
        _check_lengths(graph)
    return graph


def _check_lengths(graph: WidthGraph) -> None:
    """Raise unless every axis is as long as its segments, and each of these as the units of its width take."""
    for name, axes in graph.layouts.items():
        for dim, segments in axes.items():
            taken = [
                part.length if part.width is None else graph.widths[part.width].size * part.repeat for part in segments
            ]
            if taken != [part.length for part in segments] or sum(taken) != graph.shapes[name][dim]:
                raise ValueError(f"axis {dim} of {name}: expected {graph.shapes[name][dim]} places, got {taken}")
            wrong = [
                part for part in segments if part.width and not 0 <= part.part < len(graph.widths[part.width].ties)
            ]
            if wrong:
                raise ValueError(
                    f"axis {dim} of {name}: expected fewer parts than places that hold them, got {wrong[0]}"
                )


def _from_state_dict(state: Mapping[str, Any]) -> WidthGraph:
    widths: dict[str, Width] = {}
    for entry in state["widths"]:
        patches = tuple((path, attribute) for path, attribute in entry["patches"])
        grown = entry.get("exact_growth")
        grown = None if grown is None else ExactGrowth(grown["new_units"], tuple(grown["norms"]))
        given: dict[str, Any] = {**entry, "ties": (), "patches": patches, "exact_growth": grown}
        widths[entry["name"]] = Width(**given)
    layouts = {
        name: {dim: tuple(Segment(*part) for part in segments) for dim, segments in axes}
        for name, axes in state["layouts"].items()
    }
    made = assemble(
        widths,
        layouts,
        {name: tuple(shape) for name, shape in state["shapes"].items()},
        frozenset(state["trainable"]),
        dict(state["aliases"]),
        {(tensor, dim): role for tensor, dim, role in state["roles"]},
        state.get("differentiates", False),
        frozenset(state.get("added", ())),
    )
    outputs = state.get("outputs")
    return replace(made, gates=frozenset(state.get("gates", ())), outputs=None if outputs is None else tuple(outputs))


def check_shapes(graph: WidthGraph, tensors: Mapping[str, Any]) -> None:
    """Raise if tensors that are to be copied into a model have other shapes than in its graph.

    Raises:
        RecordError: naming the tensor.
    """
    for name, tensor in tensors.items():
        expected = graph.shapes.get(name)
        if not isinstance(tensor, Tensor) or (expected is not None and tuple(tensor.shape) != expected):
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise RecordError(
                f"The checkpoint's {name} does not fit its widths: expected {expected}, got {got}. Use another checkpoint."
            )


def check_fits(graph: WidthGraph, model: nn.Module, besides: Container[str] = ()) -> None:
    """Raise if the shapes in a graph are not those of a model's tensors; the tensors named in `besides` are not compared.

    Raises:
        RecordError: naming the tensors that differ.
    """
    tensors, _, _ = named_tensors(model)
    have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name} {shape}, got {have.get(name, 'nothing of that name')}"
        for name, shape in graph.shapes.items()
        if name not in besides and have.get(name) != shape
    ]
    if wrong:
        raise RecordError(
            f"The checkpoint's widths are not this model's: expected {'; '.join(wrong[:5])} ({len(wrong)} in all). Load the "
            "model's weights from the same checkpoint first, into a model built as for that run."
        )
