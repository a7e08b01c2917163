"""`trace`: run a model once and find out which widths it has and what each one is tied to.

The model runs eagerly under a dispatch mode that passes unit labels (`labels`) beside the tensors, in eval and in train
mode, on shadows without data where its code allows that and on copies where it does not. What comes out is proved
(`prove`) before it is offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

import evolvenet.tracing.contraction_rules  # registers its rules
import evolvenet.tracing.loss_rules  # registers its rules
import evolvenet.tracing.reduction_rules  # noqa: F401  registers its rules
from evolvenet.errors import TraceError
from evolvenet.execution.inputs import tensors_of
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.step import run_model
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.tracing.labels import DATA, LABELLED, Label, Ledger
from evolvenet.tracing.rules import Call, apply_rule
from evolvenet.tracing.verification import Rerun, prove

ATTEMPTS = (("meta", (False, True)), (None, (False, True)), ("meta", (False,)), (None, (False,)))
"""(device, modes) to trace in, in order, until the model runs: a train mode that cannot run counts as not run."""


def trace(model: nn.Module, example_inputs: Any) -> WidthGraph:
    """Find every width of a model and prove which ones can be resized.

    Args:
        model: any module; it is left as it was, bit for bit.
        example_inputs: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The graph, with a reason for each frozen width.

    Raises:
        TraceError: if the model does not run on the example inputs or has no parameters.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = trace(model, torch.zeros(1, 4))
    >>> graph.widths["0"].size, graph.widths["2"].frozen
    (8, "is the model's output")
    """
    if next(model.parameters(), None) is None:
        raise TraceError(f"Expected a model with parameters, got a {type(model).__name__} without any.")
    last_error: Exception | None = None
    for device, modes in ATTEMPTS:
        try:
            with isolated(model, shadows=True, device=device):
                ledger = read_labels(model, example_inputs, device, modes)
        except TraceError:
            raise
        except Exception as error:  # noqa: BLE001  the model's own code may raise anything
            last_error = error
            continue
        runs = [
            Rerun(
                partial(read_labels, example_inputs=example_inputs, device=device, modes=each),
                partial(read_shapes, example_inputs=example_inputs, device=device, modes=each),
            )
            for each in dict.fromkeys((_telling_modes(ledger), modes))
        ]
        return prove(model, ledger, device, runs)
    raise TraceError(
        f"The model does not run on the example inputs: {type(last_error).__name__}: {last_error}. Give example_inputs "
        "exactly as the model is called: a tensor, a tuple of arguments, or a dict of keyword arguments."
    ) from last_error


def read_labels(
    model: nn.Module, example_inputs: Any, device: str | None, modes: Sequence[bool] = (False, True)
) -> Ledger:
    """Run the (shadowed) model in eval mode (False) and in train mode (True) and write down all ties.

    Auxiliary heads run in train mode only.
    """
    tensors, _, trainable = named_tensors(model)
    ledger = Ledger(trainable=trainable)
    enrolled = {name: ledger.enroll(name, tensor.shape) for name, tensor in tensors.items()}
    for training in modes:
        mode = LabelMode(ledger)
        ran = len(ledger.order)
        for name, tensor in tensors.items():
            mode.write(tensor, Label(enrolled[name], LABELLED if enrolled[name] else DATA, name))
        result = _run(model, example_inputs, device, training, mode)
        for leaf in tensors_of(result):
            if training == modes[0]:
                ledger.outputs.append(tuple(leaf.shape))
            for layer in mode.read(leaf).layers:
                ledger.freeze(layer, "is the model's output")
        ledger.modes.append(len(ledger.order) > ran)
    return ledger


def read_shapes(
    model: nn.Module, example_inputs: Any, device: str | None, modes: Sequence[bool] = (False, True)
) -> list[tuple[int, ...]]:
    """The shapes of the outputs in the first mode, as `read_labels` finds them, in a fraction of its time."""
    results = [_run(model, example_inputs, device, training, TracingMode()) for training in modes]
    return [tuple(leaf.shape) for leaf in tensors_of(results[0])]


def _run(model: nn.Module, example_inputs: Any, device: str | None, training: bool, mode: TracingMode) -> Any:
    """One forward pass under `mode`. A train mode that refuses a batch of one is given the batch twice."""
    # A model may write into its inputs; those on another device are copies anyway.
    inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs) if device is None else example_inputs
    model.train(training)
    mode.names = {id(module): name for name, module in model.named_modules()}
    try:
        with op_by_op(mode, fused=False):
            return run_model(model, inputs, device)
    except ValueError:
        if not training:
            raise
    with op_by_op(mode, fused=False):
        return run_model(model, _twice(inputs), device)


def _telling_modes(ledger: Ledger) -> tuple[bool, ...]:
    """The modes that each trial must run: train mode only where it reaches parameters that eval mode does not."""
    return (False, True) if ledger.modes[1:] == [True] else (False,)


def _twice(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, inputs)


def _batch_norm_shapes(source: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What batch norm returns, without the dozens of steps that PyTorch takes to find its shape without data."""
    channels = source.shape[1]
    for tensor in others[:4]:
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise RuntimeError(f"batch norm of {channels} channels with a parameter of shape {tuple(tensor.shape)}")
    return torch.empty_like(source), source.new_empty(channels), source.new_empty(channels)


WITHOUT_DATA = {torch.ops.aten.native_batch_norm.default: _batch_norm_shapes}
"""Ops of which a run without data takes most of its time in working out shapes, and a quicker way to do it."""


class TracingMode(TorchDispatchMode):
    """Runs every op unchanged.

    Attributes:
        names: path of every module by its `id`.
        path: path and type of the modules that are running while the mode is active, the innermost one last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.path: list[str] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> TracingMode:
        self._hooks.append(register_module_forward_pre_hook(self._enter_module))
        self._hooks.append(register_module_forward_hook(self._leave_module, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for _ in range(2):
            self._hooks.pop().remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        quick = WITHOUT_DATA.get(func)
        if quick is not None and args[0].is_meta:
            return quick(*args)
        return func(*args, **(kwargs or {}))

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        name = self.names.get(id(module))
        self.path.append(f"{name} ({type(module).__name__})" if name else type(module).__name__)

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.path.pop()


class LabelMode(TracingMode):
    """Lets every op run as it is and passes the labels of its inputs on to its outputs."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.labels = WeakTensorKeyDictionary()

    def read(self, tensor: Tensor) -> Label:
        """What is known of a tensor; one never seen before is data."""
        return self.labels.get(tensor) or Label()

    def write(self, tensor: Tensor, label: Label) -> None:
        """Remember what a tensor carries."""
        self.labels[tensor] = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, then its rule."""
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:
            return self._view_in_place(func, args, kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        where = self.path[-1] if self.path else "the model"
        call = Call(func, args, kwargs, out, where, self.ledger, self.read, self.write)
        for tensor in call.tensors:
            origin = self.read(tensor).origin
            if origin is not None:
                self.ledger.order.setdefault(origin, len(self.ledger.order))
        apply_rule(call)
        return out

    def _view_in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`transpose_` and its kin: what `transpose` makes carries the labels that the tensor itself will."""
        with self:
            view = getattr(torch.ops.aten, func._schema.name.rpartition("::")[2].removesuffix("_"))(*args, **kwargs)
        out = func(*args, **kwargs)
        self.write(out, self.read(view))
        return out
