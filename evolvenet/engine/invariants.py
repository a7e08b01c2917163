"""Checks of a model after every change of its widths, before training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.errors import OutputError, SkippedEvent, TraceError, ValidationError, concerning, is_out_of_memory
from evolvenet.execution.isolation import model_outputs
from evolvenet.execution.step import Step
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.host_transfers import all_true, values_of
from evolvenet.surgery.optimizer_state import validate_state
from evolvenet.surgery.optimizer_tensors import with_inner
from evolvenet.surgery.resize_model import stale_attributes


@dataclass(frozen=True, eq=False)
class ModelReference:
    """What a change of widths must not alter, taken from the model before it.

    Args:
        parameters: the parameter objects by name.
        shapes: of every output tensor that counts.
        finite: whether all outputs were finite.
    """

    parameters: Mapping[str, Tensor]
    shapes: tuple[tuple[int, ...], ...]
    finite: bool

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, graph: WidthGraph | None = None) -> ModelReference:
        """Run the model once, in eval mode, and record what a change must keep of the outputs that count in its graph."""
        gradients, outputs = (False, None) if graph is None else (graph.differentiates, graph.outputs)
        found = model_outputs(model, example_inputs, gradients, outputs)
        return cls(dict(model.named_parameters()), _shapes(found, example_inputs), _finite(found))

    def with_layers_of(self, model: nn.Module) -> ModelReference:
        """The same after layers were exchanged: parameters by a name that was there before must be the objects from then.

        Those of layers that have got other names are there under these.
        """
        now = dict(model.named_parameters())
        there = set(now.values())
        kept = {
            name: tensor for name, tensor in self.parameters.items() if now.get(name) is tensor or tensor not in there
        }
        return replace(self, parameters={name: kept.get(name, tensor) for name, tensor in now.items()})


def validate(
    model: nn.Module, graph: WidthGraph, optimizers: Iterable[Optimizer], example_inputs: Any, before: ModelReference
) -> None:
    """Check a model after a change of its widths.

    Its parameters are the objects that they were; every tensor has the shape that the graph says, every optimizer state
    fits its parameter, every module's numbers (`in_features`, `groups`, …) fit its tensors; the model runs, and its answers
    have the shapes that they had and are finite if they were.

    Args:
        model: the changed model.
        graph: its widths as they should be now.
        optimizers: those that hold its parameters.
        example_inputs: what it is run on, in eval mode; afterwards buffers and random states are as before.
        before: recorded before the change.

    Raises:
        ValidationError: naming the first thing that is wrong; an `OutputError` if it is the outputs.
        OptimizerStateError: if a state does not fit.

    >>> from evolvenet.tracing.trace import trace
    >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4)
    >>> before, graph = ModelReference.of(model, x), trace(model, x)
    >>> model[0].out_features = 5
    >>> validate(model, graph, [], x, before)
    Traceback (most recent call last):
    ...
    evolvenet.errors.ValidationError: After a change of widths: expected out_features of Linear to be 3, got 5. ...
    """
    parameters = dict(model.named_parameters())
    for name, parameter in before.parameters.items():
        if parameters.get(name) is not parameter:
            raise _wrong(f"parameter {name} to be the object that it was", "another one")
    tensors, _, _ = named_tensors(model)
    for name, shape in graph.shapes.items():
        with concerning(name):
            if tuple(tensors[name].shape) != shape:
                raise _wrong(f"{name} of shape {shape}", f"{tuple(tensors[name].shape)}")
    for change in stale_attributes(model, graph):
        path = next(path for path, module in model.named_modules() if module is change.module)
        with concerning(*(name for name in graph.shapes if name.startswith(f"{path}." if path else ""))):
            module = type(change.module).__name__
            raise _wrong(f"{change.name} of {module} to be {change.value}", f"{getattr(change.module, change.name)}")
    for optimizer in with_inner(optimizers):
        validate_state(optimizer)
    found = _outputs_after(model, graph, example_inputs)
    shapes = _shapes(found, example_inputs)
    if shapes != before.shapes:
        raise _wrong(f"outputs of the shapes {before.shapes}", f"{shapes}", OutputError)
    if before.finite and not _finite(found):
        raise _wrong("finite outputs", "NaN or infinite ones", OutputError)


def _outputs_after(model: nn.Module, graph: WidthGraph, example_inputs: Any) -> list[Tensor]:
    try:
        return model_outputs(model, example_inputs, graph.differentiates, graph.outputs)
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        raise _wrong("a model that runs", f"{type(problem).__name__}: {problem}", OutputError) from problem


def check_resizable(model: nn.Module, graph: WidthGraph) -> None:
    """Check that at least one width of a model can be resized.

    Raises:
        TraceError: with the reason why each width is frozen.
    """
    if not graph.resizable:
        reasons = "; ".join(f"{width.name}: {width.frozen}" for width in graph.widths.values())
        raise TraceError(
            f"Expected a model with at least one resizable width, got a {type(model).__name__} without any ({reasons}). "
            "A width is what lies between two layers: a single layer from input to output has none."
        )


def check_finite_weights(model: nn.Module) -> None:
    """Check that all weights are finite, so that the model can be measured.

    Raises:
        SkippedEvent: naming the first parameter with NaN or infinite entries.
    """
    parameters = dict(model.named_parameters())
    finite = values_of([torch.isfinite(parameter).all() for parameter in parameters.values()])
    for name, each in zip(parameters, finite, strict=True):
        if not each:
            raise SkippedEvent(
                f"Expected finite weights, got NaN or infinite values in {name}. Widths are left alone until they are "
                "finite again; if they stay so, lower the learning rate or clip the gradients."
            )


def _wrong(expected: str, got: str, error: type[ValidationError] = ValidationError) -> ValidationError:
    return error(
        f"After a change of widths: expected {expected}, got {got}. The change is taken back; please report it with the model."
    )


def _shapes(found: Iterable[Tensor], inputs: Any) -> tuple[tuple[int, ...], ...]:
    """Of every output; in a step, whose networks may change the sizes of what they hand to each other, the lengths alone."""
    return tuple(tuple(output.shape[:1] if isinstance(inputs, Step) else output.shape) for output in found)


def _finite(found: Iterable[Tensor]) -> bool:
    return all_true([answer.isfinite().all() for answer in found])
