"""Spectra of what layers make: the singular values of every width's outputs, from streaming second moments.

The spectrum of a weight W counts directions that its input never takes. That of W·S^½, S being the second moment of what
it reads, does not; squared, its values are the eigenvalues of W·S·Wᵀ, and that is the second moment of the layer's
output before its bias. So the outputs are gathered and not the inputs: `[out, out]` for each layer where patches take
`[in·k·k, in·k·k]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from evolvenet.components import named_tensors
from evolvenet.errors import SpectrumError, TraceError
from evolvenet.graph import Tie, WidthGraph
from evolvenet.inputs import arguments
from evolvenet.statistics import CAP, Moments, evenly, quiet
from evolvenet.trace import PlainMode, quiet_run

Found = Callable[[Tensor], "tuple[str, bool] | None"]
"""Name of the parameter that a tensor is, and whether it is turned (`weight.t()`); None for any other tensor."""

Made = tuple[str, int, Tensor]
"""A weight's name, the axis of its units, and what they made without the bias: `[…, units]`."""


def output_spectra(model: nn.Module, graph: WidthGraph, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Singular values of what makes each resizable width, over samples and positions.

    They are those of the matrix `[width.size, samples]` of the units' outputs before the bias, divided by the square root
    of the number of samples: of W·S^½, S the uncentred second moment of what the layer reads (patches for a
    convolution). Several producers and several places of a unit stand side by side. Of more than `CAP` samples in a
    batch as many are taken evenly. The model runs in eval mode, its buffers and random states stay as they are.

    Args:
        model: the model of the graph.
        graph: its widths.
        batches: what the model is called with: tensors, tuples or lists of arguments, dicts of keyword arguments.

    Returns:
        {width: `[width.size]` float64 on the CPU, descending}. Left out is a width of which no producer goes as it is
        into a matrix product or a convolution. Values below 1e-8 of the largest are rounding, 3e-4 for float32 and less.

    Raises:
        TraceError: if there is no sample in `batches`.
        SpectrumError: if a layer makes NaN or infinite values.

    >>> from evolvenet.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    >>> _ = nn.init.eye_(model[0].weight)
    >>> x = torch.tensor([[6.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 2.0]]).double()
    >>> output_spectra(model, trace(model, x), [x])["0"].round(decimals=4)
    tensor([3.0000, 1.4142, 0.0000], dtype=torch.float64)
    """
    if isinstance(batches, Tensor):
        raise TraceError("Batches: expected an iterable of model inputs, got one tensor. Wrap it in a list: [inputs].")
    ties = {tie: width for width in graph.resizable for tie in width.producers if tie.tensor in graph.trainable}
    moments: dict[Tie, Moments] = {}
    mode = _Outputs(model, {(tie.tensor, tie.dim): [] for tie in ties})
    for tie in ties:
        mode.wanted[tie.tensor, tie.dim].append(_adder(moments, tie, ties[tie].size))
    device = next(model.parameters()).device.type
    batch = None
    with quiet(model):
        for batch in batches:
            args, kwargs = arguments(batch)
            with quiet_run(mode), torch.autocast(device, enabled=False):
                model(*args, **kwargs)
    if batch is None or (moments and not any(each.count for each in moments.values())):
        raise TraceError("Batches: expected at least one sample of model inputs, got none.")
    found: dict[str, Tensor] = {}
    for width in graph.resizable:
        parts = [_checked(tie, moments[tie]) * tie.repeat for tie in width.producers if tie in moments]
        if parts:
            values = torch.linalg.eigvalsh(torch.stack(parts).sum(0))
            found[width.name] = values.flip(0).clamp_min(0).sqrt()
    return found


def _adder(moments: dict[Tie, Moments], tie: Tie, size: int) -> Callable[[Tensor], None]:
    """Adds outputs `[…, units]` to the moments of one tie, each place of a unit as a sample of its own."""

    def add(outputs: Tensor) -> None:
        rows = outputs.flatten(0, -2)
        rows = rows[evenly(len(rows), max(1, CAP // tie.repeat)).to(rows.device)]
        part = rows[:, tie.start : tie.start + size * tie.repeat].reshape(len(rows), size, tie.repeat)
        made = Moments.of(part.movedim(1, -1).reshape(-1, size))
        moments[tie] = moments[tie].merge(made) if tie in moments else made

    return add


def _checked(tie: Tie, moments: Moments) -> Tensor:
    """The second moment, unless it is not finite."""
    if not bool(moments.second.isfinite().all()):
        raise SpectrumError(
            f"{tie.tensor}: expected finite outputs while measuring, got NaN or infinite ones. Training has diverged, or "
            "the batch holds such values: check both."
        )
    return moments.second


class _Outputs(PlainMode):
    """Hands what the wanted weights make on to whom it concerns.

    Args:
        model: whose parameters are the weights.
        wanted: {(weight, axis of the units): functions to call}.
    """

    def __init__(self, model: nn.Module, wanted: dict[tuple[str, int], list[Callable[[Tensor], None]]]) -> None:
        super().__init__()
        self.wanted = wanted
        self.known = WeakTensorKeyDictionary()
        for name, tensor in named_tensors(model)[0].items():
            self.known[tensor] = (name, False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and look whether it is one of a weight."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name
        if name == "aten::t" and args[0] in self.known:
            weight, turned = self.known[args[0]]
            self.known[out] = (weight, not turned)
        made = PRODUCTS[name](self.known.get, args, out) if name in PRODUCTS and not kwargs else None
        if made is not None:
            weight, axis, outputs = made
            for add in self.wanted.get((weight, axis), ()):
                add(outputs)
        return out


def _product(find: Found, args: Any, out: Tensor) -> Made | None:
    """`mm(x, weight)`."""
    weight = find(args[1])
    return None if weight is None else (weight[0], 0 if weight[1] else 1, out)


def _sum(find: Found, args: Any, out: Tensor) -> Made | None:
    """`addmm(bias, x, weight)`."""
    weight = find(args[2])
    return None if weight is None else (weight[0], 0 if weight[1] else 1, out - args[0])


def _convolution(find: Found, args: Any, out: Tensor) -> Made | None:
    """`convolution(x, weight, bias, stride, padding, dilation, transposed, output padding, groups)`."""
    # Grouped, a layer works on the units that it reads and makes no new ones: nobody waits for what it makes.
    weight, bias, transposed = find(args[1]), args[2], args[6]
    if weight is None:
        return None
    last = out.movedim(1, -1)
    return weight[0], int(transposed), last if bias is None else last - bias


PRODUCTS: Mapping[str, Callable[[Found, Any, Tensor], Made | None]] = {
    "aten::mm": _product,
    "aten::addmm": _sum,
    "aten::convolution": _convolution,
}
"""What makes units out of a weight, by op."""
