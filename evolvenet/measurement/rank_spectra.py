"""The singular spectrum of a rank: of the outputs that its layer computes through it.

A rank lies between two factors, z = A·x and B·z. Its units are coordinates, and any invertible change of them leaves the
function as it is: what counts are the singular values of B·S^½, S the second moment of z, with the whole BᵀB. In a chain of
several factors, B is all of them that follow, and without batches S that of inputs of unit variance through all that come
before, so that the values are those of the layer's weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evolvenet.graph.width_graph import CONSUMES, FOLLOWS, PRODUCES, Tie, Width, WidthGraph
from evolvenet.linalg.shrinkage import shrunk_covariance
from evolvenet.linalg.singular_basis import balanced, singular_basis, singular_values_between
from evolvenet.measurement.activation_moments import ActivationMoments, Moments
from evolvenet.measurement.unit_rows import unit_rows


@dataclass(frozen=True, eq=False)
class RankFactors:
    """What lies on the two sides of a rank of n, in its present coordinates; all float64 on the CPU.

    Args:
        consumer: the tie of the factor that is multiplied with its coordinates.
        made: `[n, n]` second moment of the coordinates for inputs of unit variance, of all factors before it.
        used: `[n, n]` scalar products of the columns of the product of all factors after it.
        rows: `[n, n]` scalar products of the rows of the factor right before it.
        columns: `[n, n]` scalar products of the columns of the factor right after it.
    """

    consumer: Tie
    made: Tensor
    used: Tensor
    rows: Tensor
    columns: Tensor


def is_rotatable(graph: WidthGraph, width: Width) -> bool:
    """Whether a width is a rank whose coordinates may be mixed: every tensor in which it occurs holds it whole, and alone.

    Where each unit has a kernel of its own (the depthwise layers of a CP decomposition) the coordinates are fixed.
    """
    if width.rank_of is None or len(_own(width, PRODUCES)) != 1 or len(_own(width, CONSUMES)) != 1:
        return False
    return all(
        tie.tensor in graph.trainable
        and (tie.start, tie.repeat, graph.shapes[tie.tensor][tie.dim]) == (0, 1, width.size)
        and (tie.role != FOLLOWS or len(graph.shapes[tie.tensor]) == 1)
        and (tie.role == FOLLOWS or tie.dim < 2 <= len(graph.shapes[tie.tensor]))
        for tie in width.ties
    )


def rank_factors(model: nn.Module, graph: WidthGraph, width: Width) -> RankFactors:
    """The two sides of a rank.

    Args:
        model: the model of the graph.
        graph: its widths.
        width: a rank for which `is_rotatable`.

    Raises:
        SpectrumError: for NaN or infinite weights.
    """
    (producer,), (consumer,) = _own(width, PRODUCES), _own(width, CONSUMES)
    return RankFactors(
        consumer,
        made=_products(model, graph, width, producer),
        used=_products(model, graph, width, consumer),
        rows=_products(model, None, width, producer),
        columns=_products(model, None, width, consumer),
    )


def rank_spectrum(
    model: nn.Module,
    graph: WidthGraph,
    width: Width,
    statistics: ActivationMoments | None = None,
    *,
    shrink: bool = False,
) -> Tensor:
    """Singular values `[width.size]` of a rank: of B·S^½ if it was measured, else of the product of its factors.

    Args:
        model: the model of the graph.
        graph: its widths.
        width: a rank for which `is_rotatable`.
        statistics: None, or from `collect`.
        shrink: whether the covariance is shrunk, in the singular directions of the product (see `linalg.shrinkage`).

    Raises:
        SpectrumError: for NaN or infinite weights.
    """
    factors = rank_factors(model, graph, width)
    if statistics is None or factors.consumer not in statistics:
        return singular_values_between(factors.made, factors.used)
    # In coordinates that do not depend on the present ones: the shrinkage of correlations does.
    basis = balanced(singular_basis(factors.made, factors.used), factors.made, factors.used)
    moments = statistics[factors.consumer]
    inside = Moments(moments.count, basis.matrix @ moments.mean, basis.of_moment(moments.covariance))
    if shrink:
        inside = replace(inside, covariance=shrunk_covariance(inside.covariance, inside.count))
    moment = statistics.second_moment(factors.consumer, inside)
    return singular_values_between(moment, basis.of_gram(factors.used))


def _own(width: Width, role: str) -> list[Tie]:
    """The ties of a rank in its own chain; replicas that are resized along have others."""
    ties = [tie for tie in width.ties if tie.role == role]
    return [tie for tie in ties if tie.tensor.startswith(f"{width.rank_of}.".removeprefix("."))] or ties


def _products(model: nn.Module, graph: WidthGraph | None, width: Width, tie: Tie) -> Tensor:
    """Scalar products `[n, n]` of what a factor holds for each unit, over all of its other axes.

    With a graph, those of the product with all factors on its side: on the factor's other axis, units of another rank of
    the same layer are weighted by their own products.
    """
    rows = unit_rows(model, width, tie)
    other = None if graph is None else _beyond(graph, width, tie)
    if graph is None or other is None:
        return rows @ rows.mT
    (next_tie,) = _own(other, tie.role)
    metric = _products(model, graph, other, next_tie)
    places = rows.reshape(width.size, other.size, -1)
    return torch.einsum("amk,mn,bnk->ab", places, metric, places)


def _beyond(graph: WidthGraph, width: Width, tie: Tie) -> Width | None:
    """The rank on the other axis of a factor, if it has one there."""
    segments = graph.layouts[tie.tensor].get(1 - tie.dim, ())
    if len(segments) != 1 or segments[0].width is None:
        return None
    other = graph.widths[segments[0].width]
    return other if other.rank_of == width.rank_of and is_rotatable(graph, other) else None
