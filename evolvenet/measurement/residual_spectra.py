"""Residual blocks x + B(A(x)): where they are, and their spectra as the operator Id + B·A beside those of A and B.

The candidates come from the graph: an inner width with one producer and one consumer, both of the same outer width.
Gates (`x * B(A(x))`) are candidates too, so the ops of one run of the model are checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evolvenet.errors import SpectrumError
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.step import run_model
from evolvenet.graph.current import check_current
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.spectrum import matricize, residual_operator, singular_values
from evolvenet.tracing.op_trace import Op, OpTrace, Value

ACTIVATIONS = frozenset(("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish")) | {
    *("_prelu_kernel", "relu", "selu", "sigmoid", "silu", "softplus", "tanh"),
}
"""Elementwise ops, left out of the linear part."""

MOVES = frozenset(("_unsafe_view", "alias", "clone", "detach", "view"))
"""Ops that change neither numbers nor their order."""

NORMS = frozenset(["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
"""(input, weight, bias, running mean, running variance, training, momentum, eps): in eval mode scales and shifts."""


@dataclass(frozen=True, eq=False)
class Block:
    """The linear part of a residual block: x + second(first(x)), activations and shifts left out.

    Args:
        inner: name of the width between the two weights.
        outer: name of the width of x.
        first: A, `[inner, outer, k…]`, with the scales of the batch norms before and after it.
        second: B, `[outer, inner, k…]`, with those of the ones after it.
    """

    inner: str
    outer: str
    first: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class BlockSpectra:
    """Singular values of a residual block, float64 on the CPU, descending.

    Args:
        first: those of A, matricized.
        second: those of B.
        operator: those of Id + B·A, `[outer]`.
    """

    first: Tensor
    second: Tensor
    operator: Tensor


def block_spectra(model: nn.Module, graph: WidthGraph, example_inputs: Any) -> dict[str, BlockSpectra]:
    """The spectra of every residual block of two weights, by the name of its inner width.

    A block close to the identity shows in Id + B·A, whose values are then all close to 1, not in A and B. For convolutions
    the kernels are matricized, and that of B·A is the convolution of both.

    Args:
        model: the model of the graph.
        graph: its widths.
        example_inputs: what the model is called with; it runs once, in eval mode.

    Returns:
        {inner width: spectra}; other widths are left out, `residual_blocks` gives the reason.

    Raises:
        ResizeError: if the graph was made before the last change of widths.
        SpectrumError: for NaN or infinite weights.

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.enter, self.leave = nn.Linear(2, 3), nn.Linear(3, 2)
    ...         self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)
    ...     def forward(self, x):
    ...         x = self.enter(x)
    ...         return self.leave(x + self.down(self.up(x).relu()))
    >>> model, x = Net(), torch.zeros(1, 2)
    >>> _ = nn.init.zeros_(model.down.weight)
    >>> block_spectra(model, trace(model, x), x)["up"].operator
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    found, _ = residual_blocks(model, graph, example_inputs)
    return {name: _spectra(block) for name, block in found.items()}


def _spectra(block: Block) -> BlockSpectra:
    operator = residual_operator(block.first, block.second)
    parts = {"A": block.first, "B": block.second, "Id + B·A": operator}
    values = [singular_values(matricize(part), f"{block.inner}, {name}") for name, part in parts.items()]
    return BlockSpectra(*(in_float64(each, "cpu") for each in values))


def residual_blocks(
    model: nn.Module, graph: WidthGraph, example_inputs: Any
) -> tuple[dict[str, Block], dict[str, str]]:
    """The residual blocks of two weights, and why the other widths are not the inside of one.

    A block adds B(A(x)) to x. Between lie only activations, views and batch norms with running statistics; of
    convolutions both have odd kernels, stride 1, dilation 1, one group, and keep the size by zero padding.

    Args:
        model: the model of the graph.
        graph: its widths.
        example_inputs: what the model is called with; it runs once, in eval mode.

    Returns:
        ({inner width: block}, {any other resizable width: reason}).

    >>> import torch
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> residual_blocks(model, trace(model, torch.zeros(1, 2)), torch.zeros(1, 2))
    ({}, {'0': "0.weight consumes the width '0:in', 2.weight produces the width '2'"})
    """
    tensors = check_current(model, graph)
    op_trace = OpTrace(tensors)
    with isolated(model, gradients=graph.differentiates), op_by_op(op_trace, fused=False):
        run_model(model, example_inputs)
    found: dict[str, Block] = {}
    refused: dict[str, str] = {}
    for width in graph.resizable:
        try:
            found[width.name] = _block(graph, op_trace, tensors, width)
        except SpectrumError as reason:
            refused[width.name] = str(reason)
    return found, refused


def _block(graph: WidthGraph, op_trace: OpTrace, tensors: Mapping[str, Tensor], width: Width) -> Block:
    one, two, outer = _candidates(graph, width)
    first, second = _use(op_trace, one), _use(op_trace, two)
    after, carried = _added(op_trace, second.output)
    into = _between(op_trace, carried, _before(op_trace, first))
    inside = _between(op_trace, first.output, _before(op_trace, second))
    ends = (carried, _before(op_trace, first), first.output, _before(op_trace, second), second.output)
    dense = tensors[one].dim() == 2
    _check_sizes([op_trace.shapes[value] for value in ends], dense=dense)
    front, middle, back = (_scale(op_trace, tensors, ops, dense=dense) for ops in (into, inside, after))
    a, b = _times(tensors[one], middle, front), _times(tensors[two], back, None)
    return Block(width.name, outer, a, b)


def _candidates(graph: WidthGraph, width: Width) -> tuple[str, str, str]:
    """Names of the producing weight, the consuming weight, and the width outside of both."""
    found = []
    for ties, dim, verb in ((width.producers, 0, "produced"), (width.consumers, 1, "consumed")):
        weights = sorted({tie.tensor for tie in ties})
        if len(weights) != 1:
            raise SpectrumError(f"it is {verb} by {len(weights)} weights")
        (name,) = weights
        inside, outside = (graph.layouts[name].get(axis, ()) for axis in (dim, 1 - dim))
        if [part.width for part in inside] != [width.name] or inside[0].repeat != 1 or len(outside) != 1:
            raise SpectrumError(
                f"axis {dim} of {name} holds more than its units, one place each, or axis {1 - dim} does"
            )
        found.append((name, outside[0].width))
    (one, consumed), (two, produced) = found
    if consumed is None or consumed != produced:
        raise SpectrumError(f"{one} consumes the width {consumed!r}, {two} produces the width {produced!r}")
    return one, two, consumed


def _before(op_trace: OpTrace, op: Op) -> Value:
    """The one input of an op besides parameters and buffers."""
    inputs = [value for value in op.inputs if value not in op_trace.tensor_names]
    if len(inputs) != 1:
        raise SpectrumError(f"{op.name} has {len(inputs)} inputs besides parameters")
    return inputs[0]


def _between(op_trace: OpTrace, start: Value, stop: Value) -> list[Op]:
    """The ops that make `stop` out of `start`, all of them norms, activations or views."""
    found: list[Op] = []
    while stop > start:
        op = op_trace.producers.get(stop)
        if op is None:
            break
        _check_passes(op)
        found.append(op)
        stop = _before(op_trace, op)
    if stop != start:
        raise SpectrumError("the input of the first weight is not computed from what the second one is added to")
    return found


def _added(op_trace: OpTrace, start: Value) -> tuple[list[Op], Value]:
    """The ops from `start` to an addition, all of them norms, activations or views, and what it is added to."""
    found: list[Op] = []
    while True:
        consumers = op_trace.consumers.get(start, [])
        if len(consumers) != 1:
            raise SpectrumError(f"the output of the second weight is used {len(consumers)} times")
        (op,) = consumers
        others = [value for value in op.inputs if value != start]
        if op.name == "add" and op.kwargs.get("alpha", 1) == 1 and len(others) == 1:
            return found, others[0]
        _check_passes(op)
        found.append(op)
        start = op.output


def _check_passes(op: Op) -> None:
    if op.name not in ACTIVATIONS | MOVES | NORMS:
        raise SpectrumError(f"{op.name} lies between the weights and the identity")
    if op.name in NORMS and op.args[5]:
        raise SpectrumError("a batch norm without running statistics scales by what the batch holds")


def _use(op_trace: OpTrace, name: str) -> Op:
    """The one product or convolution of stride 1 that a weight is used in."""
    uses = {
        op.output: op
        for value, held in op_trace.tensor_names.items()
        for op in op_trace.consumers.get(value, ())
        if held == name and op.output not in op_trace.tensor_names
    }
    if len(uses) != 1:
        raise SpectrumError(f"{name} is used {len(uses)} times")
    (op,) = uses.values()
    if op.name in ("mm", "addmm"):
        turned = op_trace.producers.get(op.args[-1])
        plain = turned is not None and turned.name == "t" and turned.args[0] in op_trace.own_values and not op.kwargs
    else:
        plain = op.name == "convolution" and op.args[1] in op_trace.own_values
    if not plain:
        raise SpectrumError(f"{name} goes into {op.name} and not as it is into a dense layer or a convolution")
    if op.name == "convolution":
        _check_convolution(name, op, op_trace.shapes[op.args[1]][2:])
    return op


def _check_convolution(name: str, op: Op, kernel: tuple[int, ...]) -> None:
    stride, padding, dilation, transposed, _, groups = op.args[3:9]
    keeps = all(extent % 2 and side == extent // 2 for extent, side in zip(kernel, padding, strict=True))
    if transposed or groups != 1 or {*stride, *dilation} != {1} or not keeps:
        raise SpectrumError(
            f"{name} is a convolution of kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation} and "
            f"{groups} groups{', transposed' if transposed else ''}"
        )


def _check_sizes(shapes: list[tuple[int, ...]], *, dense: bool) -> None:
    """Views may have rearranged places, but not units."""
    places = {math.prod(shape[:-1]) for shape in shapes} if dense else {(shape[0], *shape[2:]) for shape in shapes}
    if len(places) != 1:
        raise SpectrumError(f"its places change on the way: {shapes}")


def _scale(op_trace: OpTrace, tensors: Mapping[str, Tensor], ops: list[Op], *, dense: bool) -> Tensor | None:
    """What the batch norms among the ops multiply each unit with; None without any."""
    found = None
    for op in (op for op in ops if op.name in NORMS):
        weight, variance = op.args[1], op.args[4]
        if dense and len(op_trace.shapes[op.args[0]]) != 2:
            raise SpectrumError("a batch norm over another axis than the units lies between")
        if not op_trace.own_values >= {weight, variance} - {None}:
            raise SpectrumError("a batch norm scales by what is not as it is a parameter or buffer")
        scale = (in_float64(tensors[op_trace.tensor_names[variance]]) + op.args[7]).rsqrt()
        if weight is not None:
            scale = scale * in_float64(tensors[op_trace.tensor_names[weight]].detach())
        found = scale if found is None else found * scale
    return found


def _times(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A weight with its rows and columns scaled; half types become float32."""
    made = weight.detach()
    made = made.float() if made.element_size() < 4 else made
    for dim, scale in enumerate((rows, columns)):
        if scale is not None:
            made = made * scale.to(made.dtype).view([-1 if axis == dim else 1 for axis in range(made.dim())])
    return made
