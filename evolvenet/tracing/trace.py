"""`trace`: from a model and example inputs to the graph of its widths.

The model runs op by op in eval and in train mode, on shadows without data if its code allows that and on copies
otherwise. A dispatch mode passes label layers (`labels`) from the inputs of each op to its outputs and collects which units
are tied. `grouping` makes a `WidthGraph` of them, and `verification` freezes every width that cannot be resized.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import evolvenet.tracing.complex_rules  # registers its rules
import evolvenet.tracing.contraction_rules  # registers its rules
import evolvenet.tracing.grouped_rules  # registers its rules
import evolvenet.tracing.indexing_rules  # registers its rules
import evolvenet.tracing.joining_rules  # registers its rules
import evolvenet.tracing.linalg_rules  # registers its rules
import evolvenet.tracing.loss_rules  # registers its rules
import evolvenet.tracing.reduction_rules  # registers its rules
import evolvenet.tracing.trilinear_rules  # registers its rules
import evolvenet.tracing.window_rules  # noqa: F401  registers its rules
from evolvenet._compat.torch import in_backward, schema_of, torch_functions_off
from evolvenet.errors import TraceError, is_out_of_memory, memory_for_tracing
from evolvenet.execution.chosen_outputs import Outputs, normalized, with_chosen_outputs
from evolvenet.execution.inputs import tensors_of
from evolvenet.execution.isolation import isolated
from evolvenet.execution.own_gradients import GradientsNeededError
from evolvenet.execution.surroundings import autocast_devices, plain_surroundings
from evolvenet.graph.block_kinds import with_block_kinds
from evolvenet.graph.coverage import OUTPUT
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.whole import check_whole
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.signals import deferred_signals
from evolvenet.tracing.addends import record_addends, record_masks
from evolvenet.tracing.block_kinds import BlockKinds
from evolvenet.tracing.factorized import with_ranks
from evolvenet.tracing.findings import Findings, LabelRun
from evolvenet.tracing.idle_copies import tie_idle_copies
from evolvenet.tracing.labels import DATA, LABELLED, Label, LabelGraph, varying
from evolvenet.tracing.merging import merge
from evolvenet.tracing.numeric_proof import compare_numbers
from evolvenet.tracing.quantised import refuse_quantised
from evolvenet.tracing.reasons import source_line
from evolvenet.tracing.recurrent_layers import note_recurrent_layers
from evolvenet.tracing.routing_rules import route, settle_competition
from evolvenet.tracing.rules import Call, apply_rule
from evolvenet.tracing.searches import Searches, needed_modes
from evolvenet.tracing.shared_heads import SHARED
from evolvenet.tracing.tracing_mode import TracingMode, run_under_mode

ATTEMPTS = (("meta", (False, True)), (None, (False, True)), ("meta", (False,)), (None, (False,)))
"""(device of the shadows, training flags), tried in this order until the model runs; train mode is given up last."""


def trace(
    model: nn.Module, example_inputs: Any, outputs: Outputs | None = None, *, heads: bool | None = None
) -> WidthGraph:
    """Find every width of a model and verify by trials which of them can be resized.

    The graph does not depend on what surrounds the call: autocast (on only if the model does not run without it), inference
    mode, `no_grad`, a default device, deterministic algorithms.

    Args:
        model: any module; it is not changed.
        example_inputs: what it is called with: a tensor, a tuple of arguments, a dict of keyword arguments, a `Step`, or
            several of these `InTurn`.
        outputs: which of the model's outputs count: a name ("logits"), a path ("encoder.last_hidden_state", "0"), several
            of these, or a function of what the model returns. Their shapes and numbers must stay, so widths that reach them
            are frozen; other outputs may change. None for all. Of a `Step` it is what the step returns.
        heads: whether whole heads of an attention are units, or places of all heads, where its code permits. By default these
            are places, of which there are more; where rotary positions or norms tie these in all layers, whole heads are. With
            False places are even then, pairs of them where positions turn pairs.

    Returns:
        The graph, with a reason for each frozen width.

    Raises:
        TraceError: if the model does not run on the example inputs or has no parameters, or is quantised so that no width can
            change.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = trace(model, torch.zeros(1, 4))
    >>> graph.widths["0"].size, graph.widths["2"].frozen
    (8, "is the model's output")
    >>> trace(nn.LSTM(4, 8), torch.zeros(3, 1, 4), outputs=["1.0", "1.1"]).widths["weight_hh_l0"].frozen
    "is the model's output"
    """
    return trace_with_findings(model, example_inputs, outputs, heads=heads)[0]


@deferred_signals("the trace")
def trace_with_findings(
    model: nn.Module,
    example_inputs: Any,
    outputs: Outputs | None = None,
    *,
    heads: bool | None = None,
    known: Findings | None = None,
) -> tuple[WidthGraph, Findings]:
    """As `trace`, with what it has found, for a later trace with other `heads`, and what an earlier one has found.

    Args:
        model: as of `trace`.
        example_inputs: as of `trace`.
        outputs: as of `trace`.
        heads: as of `trace`.
        known: of a trace of the same model on the same inputs and outputs.

    Raises:
        TraceError: as `trace`.

    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)
    >>> graph, found = trace_with_findings(model, x)
    >>> trace_with_findings(model, x, known=found)[0] == graph
    True
    """
    selected = normalized(outputs)
    inputs = with_chosen_outputs(example_inputs, selected)
    check_whole(model)
    if next(model.parameters(), None) is None:
        refuse_quantised(model)
        raise TraceError(f"Expected a model with parameters, got a {type(model).__name__} without any.")
    found = None
    if autocast_devices():
        try:
            with memory_for_tracing(), plain_surroundings():
                found = _trace(model, inputs, heads, False, known)
        except TraceError as error:
            if is_out_of_memory(error):
                raise
    if found is None:
        with memory_for_tracing(), plain_surroundings(autocast=True):
            found = _trace(model, inputs, heads, True, known)
    graph, findings = found
    if not graph.resizable:
        refuse_quantised(model)
    return replace(graph, outputs=selected), findings


def _trace(
    model: nn.Module, example_inputs: Any, heads: bool | None, autocast: bool, known: Findings | None
) -> tuple[WidthGraph, Findings]:
    last_error: Exception | None = None
    gradients = False
    attempts = list(ATTEMPTS)
    plain = LabelRun()
    while attempts:
        device, modes = attempts.pop(0)
        surroundings = (device, modes, autocast, gradients)
        labels = dict(known.labels) if known is not None and known.surroundings == surroundings else {}
        run = partial(run_for_labels, example_inputs=example_inputs, device=device)
        try:
            if plain not in labels:
                with isolated(model, shadows=True, device=device, gradients=gradients):
                    labels[plain] = run(model, modes=modes)
                labels[plain].differentiates = gradients
        except TraceError:
            raise
        except GradientsNeededError as error:
            if not gradients:
                gradients, attempts = True, list(ATTEMPTS)
            last_error = error
            continue
        except Exception as error:
            # The model's own code may raise anything.
            if is_out_of_memory(error):
                raise
            last_error = error
            continue
        shapes = partial(run_for_shapes, example_inputs=example_inputs, device=device)
        graph, findings = Searches(model, surroundings, heads, labels, run, shapes, known).best()
        graph = compare_numbers(model, example_inputs, graph, needed_modes(labels[plain]), gradients)
        return with_block_kinds(with_ranks(model, graph)), findings
    line = "" if last_error is None else source_line(traceback.extract_tb(last_error.__traceback__))
    raise TraceError(
        f"The model does not run on the example inputs: {type(last_error).__name__}: {last_error}{line}. Give example_inputs "
        "exactly as the model is called: a tensor, a tuple of arguments, or a dict of keyword arguments; a function given as "
        "outputs gets all that the model returns."
    ) from last_error


def run_for_labels(
    model: nn.Module,
    example_inputs: Any,
    device: str | None,
    modes: Sequence[bool] = (False, True),
    given: frozenset[str] = frozenset(),
    keeps_heads: bool = False,
    tied_layers: bool = False,
) -> LabelGraph:
    """The ties of all units in a run of a (shadowed) model in each mode: eval (False), train (True).

    Train mode is included because auxiliary heads run in it only. Tensors in `given` count as data of a fixed size; for
    `keeps_heads` see `LabelGraph`. With `tied_layers` the layers and directions of an LSTM, GRU or RNN have the same units: their
    states have one axis of units then, which an op along the layers does not touch.
    """
    tensors, aliases, trainable = named_tensors(model)
    label_graph = LabelGraph(trainable=trainable, keeps_heads=keeps_heads)
    layers_of = {name: label_graph.add_tensor(name, tensor.shape) for name, tensor in tensors.items()}
    if not tied_layers:
        note_recurrent_layers(model, label_graph, aliases)
    for layer in (layer for name in given for layer in layers_of[name]):
        label_graph.freeze(layer, SHARED)
    for training in modes:
        mode = LabelMode(label_graph)
        used = len(label_graph.first_use)
        for name, tensor in tensors.items():
            layers = () if name in given else layers_of[name]
            mode.set_label(tensor, Label(layers, LABELLED if layers else DATA, None if name in given else name))
        result = run_under_mode(model, example_inputs, device, training, mode)
        for leaf in tensors_of(result):
            if training == modes[0]:
                label_graph.output_shapes.append(tuple(leaf.shape))
            label = mode.label_of(leaf)
            for layer in (*label.layers, *(() if label.places is None else (label.places,))):
                label_graph.freeze(layer, OUTPUT)
        label_graph.modes_with_new_tensors.append(len(label_graph.first_use) > used)
    tie_idle_copies(label_graph, {name: tensor.shape for name, tensor in tensors.items()})
    label_graph.mark_lengths()
    settle_competition(label_graph)
    return label_graph


def run_for_shapes(
    model: nn.Module, example_inputs: Any, device: str | None, modes: Sequence[bool] = (False, True)
) -> list[tuple[int, ...]]:
    """The shapes of the outputs in the first mode, as in `run_for_labels`, in a fraction of its time."""
    results = [run_under_mode(model, example_inputs, device, training, TracingMode()) for training in modes]
    return [tuple(leaf.shape) for leaf in tensors_of(results[0])]


class LabelMode(TracingMode):
    """Runs every op unchanged and passes the labels of its inputs to its outputs by the op's rule."""

    def __init__(self, label_graph: LabelGraph) -> None:
        super().__init__()
        self.label_graph = label_graph
        self.labels = WeakTensorKeyDictionary()
        self.kinds = BlockKinds()

    def label_of(self, tensor: Tensor) -> Label:
        """The label of a tensor; one without is data."""
        return self.labels.get(tensor) or Label()

    def set_label(self, tensor: Tensor, label: Label) -> None:
        """Set the label of a tensor."""
        self.labels[tensor] = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, then its rule. A backward pass ties nothing that the forward pass does not, see `on_gradients`."""
        with torch_functions_off():
            return self._run_and_label(func, types, args, kwargs or {})

    def _run_and_label(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if in_backward():
            return super().__torch_dispatch__(func, types, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            return self._view_in_place(func, args, kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        where = self.path[-1] if self.path else "the model"
        call = Call(func, args, kwargs, out, where, self.label_graph, self.label_of, self.set_label)
        for tensor in call.tensors:
            origin = self.label_of(tensor).origin
            if origin is not None:
                self.label_graph.first_use.setdefault(origin, len(self.label_graph.first_use))
        record_addends(call, self.label_graph)
        record_masks(call, self.label_graph)
        self.label_graph.op = call.location
        if not route(call):
            apply_rule(call)
        self.kinds.record(call)
        return out

    def on_gradients(
        self,
        outputs: Sequence[Tensor],
        given: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        found: Sequence[Tensor | None],
    ) -> None:
        """A gradient has the units of what it is with respect to, and those given for the outputs have the outputs' units.

        With respect to a weight it is no function of what the network computes: new units would change it, also where
        they leave the outputs as they are.
        """
        for output, gradient in zip(outputs, given, strict=True):
            if gradient is not None and gradient.dim() == output.dim():
                self._tie_to_output(self.label_of(output), self.label_of(gradient), gradient)
        for source, gradient in zip(inputs, found, strict=True):
            label = self.label_of(source)
            if gradient is None or gradient.dim() != source.dim():
                for layer in label.layers:
                    self.label_graph.freeze(
                        layer, "torch.autograd.grad in the model's code has its units in another place"
                    )
                continue
            if label.origin is not None:
                for layer in label.layers:
                    self.label_graph.mark_mixed(layer, f"torch.autograd.grad differentiates by {label.origin}")
            self.set_label(gradient, replace(label, origin=None))

    def _tie_to_output(self, output: Label, gradient: Label, tensor: Tensor) -> None:
        merge(self.label_graph, [output.layers, gradient.layers])
        known = {dim for layer in gradient.layers for dim in varying(layer)}
        for layer in output.layers:
            fixed = [dim for dim in varying(layer) if tensor.shape[dim] > 1 and dim not in known]
            if fixed and gradient.kind == DATA:
                self.label_graph.freeze(layer, "torch.autograd.grad is given gradients of a fixed size for its units")

    def _view_in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op such as `transpose_`; the label of its result is that of `transpose`."""
        with self:
            view = getattr(torch.ops.aten, schema_of(func).name.rpartition("::")[2].removesuffix("_"))(*args, **kwargs)
        out = func(*args, **kwargs)
        self.set_label(out, self.label_of(view))
        return out
