"""Ranks rotated into the singular directions of their layer's outputs, so that pruning keeps the first ones.

Training mixes the coordinates between two factors: any invertible mixture computes the same. A cut of single coordinates is
then up to hundreds of times worse than the truncated SVD of the outputs, which a cut after the rotation equals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.singular_basis import balanced, singular_basis
from evolvenet.measurement.activation_moments import ActivationMoments
from evolvenet.measurement.rank_spectra import is_rotatable, rank_factors
from evolvenet.surgery.basis_change import BasisChange


def rank_bases(
    model: nn.Module, graph: WidthGraph, names: Iterable[str], statistics: ActivationMoments | None = None
) -> dict[str, BasisChange]:
    """The rotation of each width that is a rank; other widths, and ranks whose coordinates are fixed, are left out.

    Args:
        model: the model of the graph.
        graph: its widths.
        names: of widths.
        statistics: None, or from `collect`.

    Raises:
        ResizeError: for an unknown width.
        SpectrumError: for NaN or infinite weights.
    """
    widths = [graph.widths[name] for name in names]
    return {width.name: rank_basis(model, graph, width, statistics) for width in widths if is_rotatable(graph, width)}


def rank_basis(
    model: nn.Module, graph: WidthGraph, width: Width, statistics: ActivationMoments | None = None
) -> BasisChange:
    """The change of basis after which a rank's first q coordinates are the best q for the outputs of its layer, for every q.

    z' = R·z with A' = R·A and B' = B·R⁻¹ leaves the outputs as they are. The coordinates z' are the singular directions of
    B·S^½, S the second moment of the measured z (its covariance where the consumer has a bias); without
    a measurement those of the product of the layer's factors. Rows of A' are as long as the columns of B'.

    Args:
        model: the model of the graph.
        graph: its widths.
        width: a rank for which `is_rotatable`.
        statistics: None for the product alone, or from `collect`.

    Raises:
        SpectrumError: for NaN or infinite weights.

    >>> import torch
    >>> from evolvenet.lowrank.factorize import factorize
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(6, 6))
    >>> _ = factorize(model, {"0": 2})
    >>> graph = trace(model, torch.zeros(1, 6))
    >>> change = rank_basis(model, graph, graph.widths["0.0"])
    >>> bool(torch.dist(change.values @ change.gradients.mT, torch.eye(2).double()) < 1e-10)
    True
    """
    factors = rank_factors(model, graph, width)
    moment = factors.made
    if statistics is not None and factors.consumer in statistics:
        moment = statistics.second_moment(factors.consumer)
    basis = balanced(singular_basis(moment, factors.used), factors.rows, factors.columns)
    return BasisChange(basis.matrix, basis.inverse.mT.contiguous())


def removed_means(
    model: nn.Module,
    graph: WidthGraph,
    width: Width,
    basis: BasisChange,
    index_map: IndexMap,
    statistics: ActivationMoments,
) -> Iterator[tuple[str, Tensor]]:
    """What the removed coordinates of a rotated rank add to the outputs on average: (name of the bias that takes it, `[out]`).

    About their mean they are not correlated with those that stay, so nothing else is to be made up for. Consumers without a
    bias of their own, and those that were not measured, are left out.
    """
    removed = list(index_map.removed)
    for tie in width.consumers:
        bias = statistics.bias_of(tie)
        if bias is not None and tie in statistics:
            weight = in_float64(model.get_parameter(tie.tensor).detach(), "cpu")
            columns = weight.movedim(tie.dim, 0).reshape(width.size, weight.shape[1 - tie.dim], -1).sum(-1)
            means = basis.values @ statistics[tie].mean
            yield bias.name, bias.sign * means[removed] @ (basis.gradients @ columns)[removed]
