"""Which units stay, and how the layers that read the others make up for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evolvenet.errors import ResizeError
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import FOLLOWS, Tie, Width, WidthGraph
from evolvenet.linalg.pivoted_cholesky import pivots
from evolvenet.measurement.activation_moments import ActivationMoments, Moments
from evolvenet.measurement.width_spectra import consumer_weighted, unit_rows
from evolvenet.surgery.resize_model import Surgery, TensorChange, check_finite, compile_surgery

RIDGES = (1e-10, 1e-7, 1e-5, 1e-3, 1e-1, float("inf"))
"""Ridges tried, relative to the mean energy of a kept unit; an infinite one leaves only the mean, in the bias."""


@dataclass(frozen=True, eq=False)
class Absorption:
    """How the kept units stand in for the removed ones: x_removed ≈ matrix · x_kept + offset.

    Args:
        matrix: `[removed, kept]` float64.
        offset: `[removed]` float64.
    """

    matrix: Tensor
    offset: Tensor

    def error(self, moments: Moments, kept: Tensor, removed: Tensor, reads: Tensor) -> float:
        """Mean squared error in what the consumer makes of the removed units.

        Args:
            moments: of the samples to judge on.
            kept: `[kept]` indices.
            removed: `[removed]` indices.
            reads: `[removed, removed]` scalar products of the consumer's columns.
        """
        whole = moments.covariance
        cross = whole[removed][:, kept] @ self.matrix.T
        left = whole[removed][:, removed] - cross - cross.T + self.matrix @ whole[kept][:, kept] @ self.matrix.T
        apart = moments.mean[removed] - self.matrix @ moments.mean[kept] - self.offset
        return float((reads * (left + torch.outer(apart, apart))).sum())


def choose(
    model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int], statistics: ActivationMoments | None = None
) -> dict[str, IndexMap]:
    """Choose which units of each width stay; they keep their order.

    With statistics by pivoted Cholesky, an interpolative decomposition, of the second moments of what the consumers
    read, weighted by the consumers' column norms: each next unit is the one that those before it predict worst, so that
    the others can be made up for. About the mean where a bias can take the mean. Without statistics, or for a width
    without a measured consumer, by joint group magnitude: norm of the producers' rows (of the scales, where batch norms
    follow) times that of the consumers' columns. From Liberty et al., "Randomized algorithms for the low-rank
    approximation of matrices", PNAS 104(51), 2007, and Harbrecht, Peters and Schneider, "On the low-rank approximation by
    the pivoted Cholesky decomposition", Applied Numerical Mathematics 62(4), 2012.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}, each at most the present size.
        statistics: None, or from `collect`.

    Returns:
        {width: map from its units to those that stay}.

    Raises:
        ResizeError: for an unknown or frozen width, or a size that it cannot take.
        SpectrumError: for NaN or infinite weights.

    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> model[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 0.1], [0.0, 4.0], [0.1, 0.0]])
    >>> _ = nn.init.ones_(model[2].weight)
    >>> choose(model, trace(model, torch.zeros(1, 2)), {"0": 2})["0"].indices
    (0, 2)
    """
    maps: dict[str, IndexMap] = {}
    for asked, size in sizes.items():
        width = graph.widths[asked]
        if not 0 < size <= width.size:
            raise ResizeError(
                f"Prune: width {width.name!r} has {width.size} units, expected a new size of 1 … {width.size}, "
                f"got {size}. To add units, use grow."
            )
        maps[width.name] = IndexMap.identity(width.size)
        # Refuse before choosing, which takes a while.
        graph.check({width.name: IndexMap.keep(range(size), width.size)})
        if size < width.size:
            kept = _choose_units(model, graph, width, size, statistics)
            maps[width.name] = IndexMap.keep(sorted(kept), width.size)
    return maps


def plan_prune(
    model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int], statistics: ActivationMoments | None = None
) -> Surgery:
    """Choose units, cut them out, and let the measured consumers absorb what they lose. Nothing is changed yet.

    Each consumer is refitted by ridge least squares: x_removed ≈ M·x_kept + m, so W_kept += W_removed·M at every kernel
    place, and its bias takes W_removed·m. Without a bias the fit goes through zero. The ridge is the one with the least
    error across the two halves of the samples, and a consumer of which neither half says that the fit is better
    than the bare cut stays bare. A convolution's zero padding makes the bias inexact at the borders; accepted here.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}, each at most the present size.
        statistics: None for a bare cut, or from `collect`.

    Returns:
        The changes, for `apply_surgery`.

    Raises:
        ResizeError: as `choose`.
        SpectrumError: as `choose`.

    >>> from evolvenet.measurement.activation_moments import collect
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> graph = trace(model, torch.zeros(1, 2))
    >>> surgery = plan_prune(model, graph, {"0": 3}, collect(model, graph, [torch.randn(50, 2)]))
    >>> {change.name: tuple(change.value.shape) for change in surgery.changes if "weight" in change.name}
    {'0.weight': (3, 2), '2.weight': (2, 3)}
    """
    maps = {name: kept for name, kept in choose(model, graph, sizes, statistics).items() if not kept.is_identity}
    return plan_cut(model, graph, maps, statistics)


def plan_cut(
    model: nn.Module, graph: WidthGraph, maps: Mapping[str, IndexMap], statistics: ActivationMoments | None = None
) -> Surgery:
    """`plan_prune` for units that are already chosen.

    Args:
        model: the model of the graph.
        graph: its widths.
        maps: {width: the units that stay}.
        statistics: None for a bare cut, or from `collect`.

    Raises:
        ResizeError: if a width cannot take its map.
        SpectrumError: for NaN or infinite weights.
    """
    surgery = check_finite(compile_surgery(model, graph, maps))
    if statistics is None:
        return surgery
    deltas: dict[str, Tensor] = {}
    for name, index_map in maps.items():
        for tie in graph.widths[name].consumers:
            if tie in statistics and is_unshared(graph, tie.tensor):
                for tensor, delta in _refit(model, graph, tie, index_map, statistics):
                    deltas[tensor] = deltas.get(tensor, 0) + delta
    return _with_deltas(model, surgery, deltas)


def absorb(
    even: Moments, odd: Moments, kept: Tensor, removed: Tensor, reads: Tensor, *, bias: bool
) -> Absorption | None:
    """Fit the removed units by the kept ones, or None where that is no better than leaving them out.

    Args:
        even: moments of one half of the samples.
        odd: those of the other half; what is fitted on one is judged on the other.
        kept: `[kept]` indices.
        removed: `[removed]` indices.
        reads: `[removed, removed]` scalar products of the consumer's columns.
        bias: whether the consumer has a bias that can take the mean.

    Returns:
        The fit on all samples, with the ridge that did best; its error is not above that of the bare cut on either half.

    >>> x = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [4.0, 8.0], [3.0, 6.0]], dtype=torch.float64)
    >>> even, odd = Moments.of(x[::2]), Moments.of(x[1::2])
    >>> made = absorb(even, odd, torch.tensor([0]), torch.tensor([1]), torch.ones(1, 1), bias=True)
    >>> round(made.matrix.item(), 6), round(made.offset.item(), 6) + 0.0
    (2.0, 0.0)
    """
    if not even.count or not odd.count:
        return None
    halves = (even, odd)
    nothing = Absorption(
        torch.zeros(len(removed), len(kept), dtype=torch.float64), torch.zeros(len(removed), dtype=torch.float64)
    )
    bare = [nothing.error(half, kept, removed, reads) for half in halves]
    best, chosen = sum(half.count * error for half, error in zip(halves, bare, strict=True)), None
    for ridge in RIDGES:
        fits = [fit(half, kept, removed, ridge, bias=bias) for half in halves]
        across = sum(
            other.count * (made.error(other, kept, removed, reads) if made else float("inf"))
            for made, other in zip(fits, reversed(halves), strict=True)
        )
        if across < best:
            best, chosen = across, ridge
    if chosen is None:
        return None
    made = fit(even.merge(odd), kept, removed, chosen, bias=bias)
    if made is None or any(
        made.error(half, kept, removed, reads) > cut for half, cut in zip(halves, bare, strict=True)
    ):
        return None
    return made


def fit(moments: Moments, kept: Tensor, removed: Tensor, ridge: float, *, bias: bool) -> Absorption | None:
    """Ridge least squares of the removed units on the kept ones, about the mean if there is a bias.

    Args:
        moments: of the samples to fit on.
        kept: `[kept]` indices.
        removed: `[removed]` indices.
        ridge: added to the diagonal, relative to its mean; infinite for the mean alone.
        bias: whether an offset may be used.

    Returns:
        The fit, or None if the ridge is too small for the rounding of the moments.

    >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [4.0, 8.0]], dtype=torch.float64)
    >>> made = fit(Moments.of(x), torch.tensor([0]), torch.tensor([1]), 1e-12, bias=False)
    >>> round(made.matrix.item(), 6)
    2.0
    """
    whole = moments.covariance if bias else moments.second
    matrix = torch.zeros(len(removed), len(kept), dtype=torch.float64)
    inner = whole[kept][:, kept]
    level = inner.diagonal().mean()
    if ridge != float("inf") and level > 0:
        factor, failed = torch.linalg.cholesky_ex(inner + ridge * level * torch.eye(len(kept), dtype=torch.float64))
        if failed:
            return None
        matrix = torch.cholesky_solve(whole[kept][:, removed], factor).T
    offset = moments.mean[removed] - matrix @ moments.mean[kept]
    return Absorption(matrix, offset if bias else torch.zeros_like(offset))


def _choose_units(
    model: nn.Module, graph: WidthGraph, width: Width, size: int, statistics: ActivationMoments | None
) -> list[int]:
    parts = {
        tie: statistics[tie].second if _bias(model, graph, tie) is None else statistics[tie].covariance
        for tie in width.consumers
        if statistics is not None and tie in statistics
    }
    taken = pivots(consumer_weighted(model, width, parts), size) if parts else []
    if len(taken) < size:
        strength = _magnitude(model, graph, width)
        ranked = strength.argsort(descending=True, stable=True).tolist()
        taken += [unit for unit in ranked if unit not in taken][: size - len(taken)]
    return taken


def _magnitude(model: nn.Module, graph: WidthGraph, width: Width) -> Tensor:
    """Norm of the producers' rows times norm of the consumers' columns for each unit, `[size]`.

    What makes a unit that a batch norm scales anew may be of any norm: the norm's own weight takes its place.
    """

    def norm(ties: Sequence[Tie]) -> Tensor:
        weights = [tie for tie in ties if tie.tensor in graph.trainable and len(graph.shapes[tie.tensor]) > 1]
        if not weights:
            return torch.ones(width.size, dtype=torch.float64)
        return torch.cat([unit_rows(model, width, tie) for tie in weights], dim=1).norm(dim=1)

    scales = [
        model.get_parameter(tie.tensor).detach().to("cpu", torch.float64).narrow(0, tie.start, width.size * tie.repeat)
        for tie in width.ties
        if tie.tensor in graph.trainable
        and tie.role == FOLLOWS
        and tie.tensor == f"{tie.module}.weight".removeprefix(".")
        and f"{tie.module}.running_mean".removeprefix(".") in graph.shapes
    ]
    made = torch.cat([each.reshape(width.size, -1) for each in scales], dim=1).norm(dim=1) if scales else None
    return (norm(width.producers) if made is None else made) * norm(width.consumers)


def is_unshared(graph: WidthGraph, tensor: str) -> bool:
    """Whether no other module uses the tensor: a refit for one reader would be wrong for the other."""
    return tensor in graph.shapes and tensor not in graph.aliases.values()


def _bias(model: nn.Module, graph: WidthGraph, tie: Tie) -> str | None:
    """Name of the bias that can take the mean of what the consumer reads."""
    # "weight" has "bias" beside it, "in_proj_weight" has "in_proj_bias".
    local = tie.tensor.rpartition(".")[2].replace("weight", "bias")
    name = f"{tie.module}.{local}" if tie.module else local
    has = getattr(model.get_submodule(tie.module), local, None) is not None
    return name if has and is_unshared(graph, name) else None


def _refit(
    model: nn.Module, graph: WidthGraph, tie: Tie, index_map: IndexMap, statistics: ActivationMoments
) -> Iterator[tuple[str, Tensor]]:
    """What to add to the consumer's weight and bias, in their old shapes: (tensor, delta) each."""
    kept, removed = index_map.tensor(), torch.tensor(index_map.removed)
    weight = model.get_parameter(tie.tensor).detach().to("cpu", torch.float64)
    length = index_map.size * tie.repeat
    # [size, repeat, rows, kernel places]: the same place of every unit stands in for the same place.
    reads = weight.narrow(tie.dim, tie.start, length).movedim(tie.dim, 0)
    places = reads.reshape(index_map.size, tie.repeat, reads.shape[1], -1)
    columns = places[removed].flatten(1)
    bias = _bias(model, graph, tie)
    made = absorb(statistics.even[tie], statistics.odd[tie], kept, removed, columns @ columns.T, bias=bias is not None)
    if made is None:
        return
    moved = torch.zeros_like(places)
    moved[kept] = (made.matrix.T @ columns).reshape(moved[kept].shape)
    delta = torch.zeros_like(weight)
    delta.narrow(tie.dim, tie.start, length).copy_(moved.reshape(reads.shape).movedim(0, tie.dim))
    yield tie.tensor, delta
    if bias is not None:
        yield bias, torch.einsum("u,upok->o", made.offset, places[removed])


def _with_deltas(model: nn.Module, surgery: Surgery, deltas: Mapping[str, Tensor]) -> Surgery:
    """The surgery with `deltas`, of the old shapes, added to the tensors before they are cut."""
    changes = {change.name: change for change in surgery.changes}
    for name, delta in deltas.items():
        tensor = model.get_parameter(name)
        change = changes.get(name) or TensorChange(tensor, name, {}, tensor.detach())
        value = tensor.detach().to("cpu", torch.float64) + delta
        for dim, index_map in change.axes.items():
            value = index_map.apply(value, dim)
        changes[name] = replace(change, value=value.to(tensor.device, tensor.dtype))
    return replace(surgery, changes=tuple(changes.values()))
