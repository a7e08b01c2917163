"""Singular values of the outputs of every width's producers, from streaming second moments.

The spectrum of a weight W counts directions that its input never takes. That of W·S^½, S the second moment of the input,
does not; its squared values are the eigenvalues of W·S·Wᵀ, the second moment of the layer's output before its bias. So the
outputs are gathered and not the inputs: `[out, out]` for each layer where patches take `[in·k·k, in·k·k]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import SpectrumError, TraceError
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.sampling import evenly, samples_in
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp, WeightOpMode, output_positions
from evolvenet.graph.current import check_current
from evolvenet.graph.width_graph import Tie, Width, WidthGraph
from evolvenet.linalg.host_transfers import to_device
from evolvenet.measurement.activation_moments import CAP, Moments, moments_on_host


def output_spectra(model: nn.Module, graph: WidthGraph, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Singular values of the outputs of each resizable width's producers, over samples and positions.

    They are those of the matrix `[width.size, samples]` of the units' outputs before the bias, divided by the square root
    of the number of samples: of W·S^½, S the uncentred second moment of the layer's inputs (patches for a
    convolution). Several producers and several places of a unit stand side by side. Of more than `CAP` samples in a
    batch as many are taken evenly. The model runs in eval mode, its buffers and random states stay as they are.

    Args:
        model: the model of the graph.
        graph: its widths.
        batches: what the model is called with: tensors, tuples or lists of arguments, dicts of keyword arguments.

    Returns:
        {width: `[width.size]` float64 on the CPU, descending}. Left out are widths without a producer that is, unmodified,
        the weight of a matrix product or a convolution. Values below 1e-8 of the largest are rounding, 3e-4 for float32
        and narrower types.

    Raises:
        ResizeError: if the graph was made before the last change of widths.
        TraceError: if there is no sample in `batches`.
        SpectrumError: for NaN or infinite outputs of a layer.

    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    >>> _ = nn.init.eye_(model[0].weight)
    >>> x = torch.tensor([[6.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 2.0]]).double()
    >>> output_spectra(model, trace(model, x), [x])["0"].round(decimals=4)
    tensor([3.0000, 1.4142, 0.0000], dtype=torch.float64)
    """
    if isinstance(batches, Tensor):
        raise TraceError("Batches: expected an iterable of model inputs, got one tensor. Wrap it in a list: [inputs].")
    check_current(model, graph)
    gathered = {
        tie: Moments.empty(width.size)
        for width in graph.resizable
        for tie in width.producers
        if tie.tensor in graph.trainable
    }
    seen = 0
    with isolated(model, gradients=graph.differentiates):
        for batch in batches:
            with op_by_op(WeightOpMode(model, after=partial(_gather, gathered))):
                run_model(model, batch)
            seen += samples_in(batch)
    if not seen:
        raise TraceError("Batches: expected at least one sample of model inputs, got none.")
    gathered = dict(zip(gathered, moments_on_host(list(gathered.values())), strict=True))
    found = {width.name: _values(width, gathered) for width in graph.resizable}
    return {name: values for name, values in found.items() if values is not None}


def _gather(gathered: dict[Tie, Moments], op: WeightOp, out: Tensor) -> None:
    """Add the outputs of a weight op to the moments of its ties, each place of a unit as a sample of its own."""
    ties = [tie for tie in gathered if tie.tensor == op.tensor and tie.dim == op.output_axis]
    if not ties or op.weight.is_complex():
        return
    rows = to_device(evenly(output_positions(op, out), CAP), out.device)
    columns, matrix = (part if part.element_size() >= 4 else part.float() for part in (op.columns(rows), op.matrix()))
    made = (columns @ matrix.mT).movedim(0, 1).flatten(1)
    for tie in ties:
        size, start = len(gathered[tie].mean), tie.start - op.start
        if 0 <= start <= made.shape[1] - size * tie.repeat:
            part = made[:, start : start + size * tie.repeat].reshape(len(made), size, tie.repeat)
            gathered[tie] = gathered[tie].merge(Moments.of(part.movedim(1, -1).reshape(-1, size)))


def _values(width: Width, gathered: Mapping[Tie, Moments]) -> Tensor | None:
    """Singular values of all producers of a width side by side; None if none of them was run.

    Of a width with parts the root of the sum of their squares: each part has units of its own.
    """
    energies: list[Tensor] = []
    for part in (width.part(number) for number in range(width.parts)):
        total = torch.zeros(width.size, width.size, dtype=torch.float64, device="cpu")
        seen = [tie for tie in part.producers if tie in gathered and gathered[tie].count]
        for tie in seen:
            total += tie.repeat * gathered[tie].second
            if not bool(total.isfinite().all()):
                raise SpectrumError(
                    f"{tie.tensor}: expected finite outputs while measuring, got NaN or infinite ones. Training has "
                    "diverged, or the batch holds such values: check both."
                )
        energies += [torch.linalg.eigvalsh(total).flip(0).clamp_min(0)] if seen else []
    return torch.stack(energies).sum(0).sqrt() if energies else None
