"""Whether a state dict differs from a model in widths alone."""

# nn.Module.named_parameters has no full type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from evolvenet._compat.torch import own_tensors
from evolvenet.errors import RecordError
from evolvenet.graph.sizes import Misfit, sizes_from_shapes
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.bare_shapes import Side, unexplained
from evolvenet.surgery.number_uses import numbers_in_doubt
from evolvenet.surgery.width_record import WidthRecord, in_replicas, shapes_of

Shapes = Mapping[str, tuple[int, ...]]


def problem_by_record(model: nn.Module, shapes: Shapes, record: Mapping[str, Any]) -> str | None:
    """What a file says is no width, and yet differs from the model.

    Args:
        model: the model as it is.
        shapes: {name: shape} in the file.
        record: of the file, from `WidthRecord.state_dict`, with its graph.

    Raises:
        RecordError: if the record is not of the file's own tensors.
    """
    recorded = WidthRecord.from_state_dict(record)
    assert recorded.graph is not None
    _, stale = sizes_from_shapes(recorded.graph, shapes)
    if stale:
        name, recorded_shape = stale[0].tensor, recorded.graph.shapes.get(stale[0].tensor)
        raise RecordError(
            f"The widths that are recorded in the file are not those of its tensors: expected {name} of shape "
            f"{recorded_shape}, got {shapes[name]}. The tensors were changed after the record was written: save the "
            "model anew with evolvenet.save."
        )
    present = shapes_of(model)
    return _first_difference(recorded.graph, present, shapes, present, recorded.original, recorded.replicas)


def problem_by_graph(model: nn.Module, shapes: Shapes, graph: WidthGraph) -> str | None:
    """What is no width of the traced model, and yet differs in a file.

    Args:
        model: the model as it is.
        shapes: {name: shape} in the file.
        graph: the model's widths.
    """
    return _first_difference(graph, shapes, shapes, shapes_of(model), {}, {})


def _first_difference(
    graph: WidthGraph,
    solved: Shapes,
    there: Shapes,
    here: Shapes,
    original: Mapping[str, int],
    replicas: Mapping[str, str],
) -> str | None:
    """The first tensor of other shapes that no sizes of the graph's widths give, as a sentence."""
    owners = _owners(graph, replicas)
    for copy in (None, *replicas):
        own = {first: name for name, (first, replica) in owners.items() if replica == copy}
        _, misfits = sizes_from_shapes(graph, {f: solved[n] for f, n in own.items() if n in solved}, original)
        for misfit in misfits:
            name = own[misfit.tensor]
            if there.get(name) != here.get(name):
                return _sentence(Misfit(name, misfit.dim, misfit.reason), there, here)
    for name, shape in here.items():
        if name not in owners and there.get(name, shape) != shape:
            return _sentence(Misfit(name, None, "it belongs to no width"), there, here)
    return None


def _owners(graph: WidthGraph, replicas: Mapping[str, str]) -> dict[str, tuple[str, str | None]]:
    """{name in the model: (a name in the graph, the replica that it lies in)}."""
    names = [*graph.shapes, *graph.aliases]
    found: dict[str, tuple[str, str | None]] = {
        copied: (name, copy)
        for copy, own in replicas.items()
        for name in names
        for copied in in_replicas(name, {copy: own})
    }
    return {**found, **{name: (name, None) for name in names}}


def _sentence(misfit: Misfit, there: Shapes, here: Shapes) -> str:
    axis = "" if misfit.dim is None else f" on axis {misfit.dim}"
    return (
        f"expected {misfit.tensor} of shape {here.get(misfit.tensor)}, as in this model, got {there.get(misfit.tensor)}. "
        f"They may not differ{axis}: {misfit.reason}"
    )


def problem_without_record(model: nn.Module, planned: Mapping[Tensor, tuple[int, ...]]) -> str | None:
    """What differs from the model and cannot be told to be a width, where nothing says what is one.

    Args:
        model: the model as it is.
        planned: shape in the file of each of its tensors.
    """
    sides = unexplained(model, planned)
    if not sides:
        return None
    name, tensor = next(_tensors(model, sides[0], planned))
    partner = {"input": "no earlier layer produces", "output": "no later layer consumes"}
    return (
        f"expected {name} of shape {tuple(tensor.shape)}, as in this model, got {planned[tensor]} ({sides[0].name} = "
        f"{sides[0].new}, not {sides[0].old}; {len(sides)} such in all). The file has no record of its widths, and "
        f"{partner.get(sides[0].role, 'no other layer has')} that number, so it cannot be told to be a width. If it is one, "
        "save the file with evolvenet.save, which records the widths, or call evolvenet.load(model, path, "
        "example_inputs=...), which traces them"
    )


def refuse_numbers_in_doubt(model: nn.Module, planned: Mapping[Tensor, tuple[int, ...]], what: str) -> None:
    """Raise for numbers in a model's own attributes that may follow a width which a file without a record changes.

    Args:
        model: the model as it is.
        planned: shape in the file of each of its tensors.
        what: the name of the file.

    Raises:
        RecordError: naming them.
    """
    found = numbers_in_doubt(model, planned)
    if found:
        raise RecordError(
            f"{what} has no record of its widths, and other ones than this model: expected to know the numbers of the model's "
            f"own code that follow them, got tensors alone. Its forward pass uses {', '.join(found[:5])} ({len(found)} such "
            "in all), which may have to be others. Save the file with evolvenet.save, which records them, or call "
            "evolvenet.load(model, path, example_inputs=...), which traces them."
        )


def _tensors(model: nn.Module, side: Side, planned: Mapping[Tensor, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The layer's tensors that differ, first those in which the side's own sizes stand."""
    start = f"{side.path}." if side.path else ""
    local = own_tensors(model.get_submodule(side.path))
    changed = {n: t for n, t in local.items() if t in planned and planned[t] != tuple(t.shape)}
    for exact in (True, False):
        for name, tensor in changed.items():
            pairs = list(zip(tensor.shape, planned[tensor], strict=True))
            if not exact or (side.old, side.new) in pairs:
                yield start + name, tensor
