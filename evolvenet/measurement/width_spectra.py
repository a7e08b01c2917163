"""The singular spectrum of every width: of its producers' weights, or of its consumers' inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.graph.current import check_current
from evolvenet.graph.width_graph import FOLLOWS, Tie, Width, WidthGraph
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.spectrum import joint_spectrum
from evolvenet.measurement.activation_moments import ActivationMoments, Moments, collect
from evolvenet.measurement.host_model import on_host
from evolvenet.measurement.rank_spectra import is_rotatable, rank_spectrum
from evolvenet.measurement.unit_rows import native_rows, unit_rows


def spectra(model: nn.Module, graph: WidthGraph, batches: Iterable[Any] | None = None) -> dict[str, Tensor]:
    """Singular values of every resizable width.

    Without batches, those of the producers' matricized weights, several producers side by side. With batches, those of
    the consumers' inputs, see `measure`. Of a rank those of its layer's weight, and of its layer's outputs, see
    `evolvenet.measurement.rank_spectra`.

    Args:
        model: the model of the graph.
        graph: its widths.
        batches: None, or an iterable of model inputs: tensors, tuples or lists of arguments, dicts of keywords.

    Returns:
        {width: `[width.size]` float64 values on the CPU, descending}; frozen widths are left out.

    Raises:
        ResizeError: if the graph was made before the last change of widths.
        SpectrumError: for NaN or infinite weights or activations.
        TraceError: if there is no batch in `batches`.

    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> spectra(model, trace(model, torch.zeros(1, 4)))
    {'0': tensor([1., 1., 1.], dtype=torch.float64)}
    """
    check_current(model, graph)
    return measure(model, graph, None if batches is None else collect(model, graph, batches))


def measure(model: nn.Module, graph: WidthGraph, statistics: ActivationMoments | None = None) -> dict[str, Tensor]:
    """Singular values of every resizable width, from statistics already gathered.

    With statistics: the covariance of each consumer's inputs, every unit weighted by the norm of the consumer's columns
    (see `consumer_weighted`), divided by its trace, is averaged over the consumers; the singular values are the square
    roots of its eigenvalues. Their squares add up to 1, or to 0 if nothing varies. For a width without a measured
    consumer, the values of its weights. For a rank, whose units may be mixed, the singular values of the outputs that its
    layer computes through it, without statistics those of the layer's weight; neither is divided by anything. For a width
    with parts, the root of the mean square of theirs.

    Args:
        model: the model of the graph.
        graph: its widths.
        statistics: None, or from `collect`.

    Returns:
        {width: `[width.size]` float64 values on the CPU, descending}; widths without a weight are left out.

    Raises:
        SpectrumError: for NaN or infinite weights.
    """
    model = on_host(model)
    gathered: Mapping[Tie, Moments] = {} if statistics is None else statistics
    found: dict[str, Tensor] = {}
    for width in graph.resizable:
        if is_rotatable(graph, width):
            found[width.name] = rank_spectrum(model, graph, width, statistics)
            continue
        moments = {tie: gathered[tie].covariance for tie in width.consumers if tie in gathered}
        values = mean_square(spectrum for spectrum, _ in spectra_of_parts(model, graph, width, moments))
        if values is not None:
            found[width.name] = values
    return found


def spectra_of_parts(
    model: nn.Module, graph: WidthGraph, width: Width, moments: Mapping[Tie, Tensor]
) -> Iterator[tuple[Tensor, Mapping[Tie, Tensor]]]:
    """The singular values of each part of a width that has a weight, and the covariances that they are those of, if any.

    Args:
        model: the model.
        graph: its widths.
        width: one of them; most have one part.
        moments: {consumer tie: covariance `[n, n]`}.
    """
    for part in (width.part(number) for number in range(width.parts)):
        own = {tie: moments[tie] for tie in part.consumers if tie in moments}
        values = input_spectrum(model, part, own) if own else weight_spectrum(model, graph, part)
        if values is not None:
            yield values, own


def mean_square(spectra: Iterable[Tensor]) -> Tensor | None:
    """The root of the mean square of spectra, value by value; None without any.

    The parts of a width keep as many units each, so what is lost at a size is the sum of what each of them loses.
    """
    every = list(spectra)
    # One alone as it is, to the last digit.
    return None if not every else every[0] if len(every) == 1 else torch.stack(every).square().mean(0).sqrt()


def consumer_weighted(model: nn.Module, width: Width, parts: Mapping[Tie, Tensor]) -> Tensor:
    """The average over consumers of D·S·D / trace, D the norms of the consumer's columns of each unit.

    Args:
        model: the model of the width.
        width: `n` units.
        parts: {consumer tie: second moment or covariance `[n, n]`}.

    Returns:
        `[n, n]` with a trace of 1, or of 0 if all are 0.

    >>> model, tie = nn.Sequential(nn.Linear(2, 1)), Tie("0.weight", 1, 0, 1, "consumes")
    >>> _ = nn.init.constant_(model[0].weight, 7.0)
    >>> consumer_weighted(model, Width("0", size=2), {tie: torch.eye(2)}).diagonal()
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    total, count = None, 0
    for tie, moment in parts.items():
        # Only the proportions count: scaled first, products neither overflow nor vanish. No entry of a matrix of moments is
        # larger than the largest on its diagonal.
        norms = _scaled(_scaled(unit_rows(model, width, tie)).norm(dim=1))
        largest = moment.diagonal().max()
        factors = norms / (largest if largest > 0 else 1.0) ** 0.5
        scaled = (moment * factors).mul_(factors.unsqueeze(-1))
        trace = scaled.trace()
        if trace > 0:
            scaled, count = scaled.div_(trace), count + 1
            total = scaled if total is None else total.add_(scaled)
    if total is None:
        return torch.zeros(width.size, width.size, dtype=torch.float64, device="cpu")
    return total.div_(count)


def _scaled(matrix: Tensor) -> Tensor:
    """A matrix with a largest magnitude of 1, or of 0."""
    largest = matrix.abs().max()
    return matrix / largest if largest > 0 else matrix


def input_spectrum(model: nn.Module, width: Width, parts: Mapping[Tie, Tensor]) -> Tensor:
    """Singular values `[width.size]` of the covariances of the inputs of a width's consumers, see `measure`."""
    eigenvalues = torch.linalg.eigvalsh(consumer_weighted(model, width, parts))
    return eigenvalues.flip(0).clamp_min(0).sqrt()


def weight_ties(graph: WidthGraph, width: Width) -> list[Tie]:
    """The ties of a width in weights: trained ones, and buffers that are multiplied with data."""
    return [
        tie
        for tie in width.ties
        if len(graph.shapes[tie.tensor]) > 1 and (tie.tensor in graph.trainable or tie.role != FOLLOWS)
    ]


def weight_spectrum(model: nn.Module, graph: WidthGraph, width: Width) -> Tensor | None:
    """Singular values `[width.size]` of the weights of a width, of its producers if there are any; None without a weight."""
    weights = weight_ties(graph, width)
    made = [tie for tie in weights if tie in width.producers] or weights
    if not made:
        return None
    # In the weights' own type: float32 has a faster way to its singular values.
    values = in_float64(joint_spectrum([native_rows(model, width, tie) for tie in made], width.name), "cpu")
    # Fewer columns than units: the missing directions carry nothing.
    return torch.cat([values, values.new_zeros(width.size - len(values))])
