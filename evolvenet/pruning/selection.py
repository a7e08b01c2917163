"""Which units stay, and the refit of the consumers of the others: both from second moments, without another pass."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import NormBase
from evolvenet.errors import ResizeError, concerning
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.naming import tensor_named
from evolvenet.graph.width_graph import FOLLOWS, Tie, Width, WidthGraph
from evolvenet.linalg.full_precision import full_precision
from evolvenet.linalg.host_transfers import to_device
from evolvenet.linalg.pivoted_cholesky import pivots
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.ridge import Fit, refit_residuals, solve_held_out
from evolvenet.linalg.ridge_problems import PrimalProblem
from evolvenet.measurement.activation_moments import ActivationMoments, Moments
from evolvenet.measurement.host_model import on_host
from evolvenet.measurement.rank_spectra import is_rotatable
from evolvenet.measurement.unit_rows import unit_rows
from evolvenet.measurement.width_spectra import consumer_weighted
from evolvenet.pruning.rank_basis import rank_bases, removed_means
from evolvenet.surgery.basis_change import BasisChange, along
from evolvenet.surgery.resize_model import Surgery, TensorChange, check_finite, compile_surgery


def choose(
    model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int], statistics: ActivationMoments | None = None
) -> dict[str, IndexMap]:
    """Choose which units of each width stay; they keep their order.

    With statistics by pivoted Cholesky, an interpolative decomposition, of the second moments of the consumers' inputs,
    weighted by the consumers' column norms (see `consumer_weighted`): each next unit is the one that those before it
    predict worst. The moments are about the mean where the consumer has a bias, about 0 otherwise. Without statistics, or
    for a width without a measured consumer, by joint group magnitude: norm of the producers' rows (of the scales, where
    batch norms follow) times that of the consumers' columns. From Liberty et al., "Randomized algorithms for the low-rank
    approximation of matrices", PNAS 104(51), 2007, and Harbrecht, Peters and Schneider, "On the low-rank approximation by
    the pivoted Cholesky decomposition", Applied Numerical Mathematics 62(4), 2012. Of a rank the first coordinates stay, after
    its rotation (see `evolvenet.pruning.rank_basis`). Each part of a width (the layers and directions of an LSTM) keeps units
    of its own, as many in each.

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
    for name, size in sizes.items():
        width = graph.widths[name]
        if not 0 < size <= width.size:
            raise ResizeError(
                f"Prune: width {width.name!r} has {width.size} units, expected a new size of 1 … {width.size}, "
                f"got {size}. To add units, use grow."
            )
        maps[width.name] = IndexMap.identity(width.size)
        # Refuse before choosing, which takes a while.
        graph.check({width.name: IndexMap.keep(range(size), width.size)})
        if size < width.size and is_rotatable(graph, width):
            maps[width.name] = IndexMap.keep(range(size), width.size)
        elif size < width.size:
            with concerning(width.name):
                each = (_choose_units(model, graph, width.part(k), size, statistics) for k in range(width.parts))
                maps[width.name] = IndexMap.of_parts([sorted(kept) for kept in each], width.size)
    return maps


def plan_prune(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    statistics: ActivationMoments | None = None,
    host: nn.Module | None = None,
    without: Container[str] = (),
) -> Surgery:
    """Choose units, cut them out, and refit the measured consumers. Nothing is changed yet.

    The removed units are predicted from the kept ones, x_removed ≈ M·x_kept + m, by ridge least squares (see
    `predict_removed`). So W_kept += W_removed·M at every kernel position and bias += W_removed·m; m = 0 without a bias.
    A consumer whose output error no ridge lowers on held-out samples is cut and not refitted. At borders with zero padding
    the change of the bias is inexact. A rank is rotated into the singular directions of its layer's outputs and cut to the
    first ones, the truncated SVD of the outputs: its consumer's bias alone is refitted.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}, each at most the present size.
        statistics: None for a bare cut, or from `collect`.
        host: the model's weights on the CPU, if they have been transferred there, see `on_host`.
        without: consumers that are not refitted, as they will be fitted to their outputs.

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
    host = on_host(model) if host is None else host
    maps, bases = chosen(host, graph, sizes, statistics)
    return plan_cut(model, graph, maps, statistics, bases, host, without)


def chosen(
    model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int], statistics: ActivationMoments | None
) -> tuple[dict[str, IndexMap], dict[str, BasisChange]]:
    """The maps of `choose` that remove units, and the rotations of the ranks among them. The arguments are those of `choose`."""
    maps = {name: kept for name, kept in choose(model, graph, sizes, statistics).items() if not kept.is_identity}
    return maps, rank_bases(model, graph, maps, statistics)


def plan_cut(
    model: nn.Module,
    graph: WidthGraph,
    maps: Mapping[str, IndexMap],
    statistics: ActivationMoments | None = None,
    bases: Mapping[str, BasisChange] | None = None,
    host: nn.Module | None = None,
    without: Container[str] = (),
) -> Surgery:
    """`plan_prune` for units that are already chosen.

    Args:
        model: the model of the graph.
        graph: its widths.
        maps: {width: the units that stay}.
        statistics: None for a bare cut, or from `collect`.
        bases: {rank: its rotation before the cut}, from `rank_bases`.
        host: the model's weights on the CPU, see `plan_prune`.
        without: see `plan_prune`.

    Raises:
        ResizeError: for an unknown or frozen width, or a map of another size.
        SpectrumError: for NaN or infinite weights.
    """
    surgery = check_finite(compile_surgery(model, graph, maps, bases))
    if statistics is None:
        return surgery
    host = on_host(model) if host is None else host
    deltas: dict[str, Tensor] = {}
    add_refits(deltas, host, graph, maps, statistics, surgery.bases, without)
    return with_deltas(model, surgery, deltas, host)


def add_refits(
    deltas: dict[str, Tensor],
    model: nn.Module,
    graph: WidthGraph,
    maps: Mapping[str, IndexMap],
    statistics: ActivationMoments,
    bases: Mapping[str, BasisChange],
    without: Container[str] = (),
) -> None:
    """Add the changes of the consumers that reconstruct the removed units from the kept ones.

    Args:
        deltas: {tensor: change so far, of the old shape}.
        model: the model of the graph.
        graph: its widths.
        maps: {width: the units that stay}.
        statistics: from `collect`.
        bases: {rank: its rotation before the cut}.
        without: consumers that are not refitted.
    """
    for name, index_map in maps.items():
        with concerning(name):
            for tensor, delta in _column_refits(model, graph, name, index_map, statistics, bases.get(name), without):
                deltas[tensor] = deltas.get(tensor, 0) + delta


def _column_refits(
    model: nn.Module,
    graph: WidthGraph,
    name: str,
    index_map: IndexMap,
    statistics: ActivationMoments,
    basis: BasisChange | None,
    without: Container[str],
) -> Iterator[tuple[str, Tensor]]:
    """(tensor's name, delta of the old shape) of each change that reconstructs the removed units of one width."""
    if basis is not None:
        yield from removed_means(model, graph, graph.widths[name], basis, index_map, statistics)
        return
    for tie in graph.widths[name].consumers:
        if tie.tensor not in without and tie in statistics and statistics.is_refittable(tie):
            yield from refit_columns(model, tie, index_map.part(tie.part), statistics)


def predict_removed(
    even: Moments, odd: Moments, kept: Tensor, removed: Tensor, metric: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor] | None:
    """Ridge least squares of the removed units on the kept ones, x_removed ≈ M·x_kept + m, see `solve_held_out`.

    Args:
        even: moments of the even samples.
        odd: those of the odd ones, which select the ridge.
        kept: `[kept]` indices.
        removed: `[removed]` indices.
        metric: `[removed, removed]` scalar products of the consumer's columns: an error e of the removed units is an error
            eᵀ·metric·e of the consumer's outputs.
        bias: whether the consumer has a bias, which takes m; else m is 0.

    Returns:
        (M `[removed, kept]`, m `[removed]`) float64, or None if that is no better than M = 0, m = 0.

    >>> x = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [4.0, 8.0], [3.0, 6.0]], dtype=torch.float64)
    >>> even, odd = Moments.of(x[::2]), Moments.of(x[1::2])
    >>> matrix, offset = predict_removed(even, odd, torch.tensor([0]), torch.tensor([1]), torch.ones(1, 1).double(), bias=True)
    >>> round(matrix.item(), 6), round(offset.item(), 6) + 0.0
    (2.0, 0.0)
    """
    halves = (even, odd)
    # The kept units about their mean: a shift that both halves share changes no fit and keeps the digits of the sums.
    centre = torch.zeros_like(even.mean)
    if bias:
        centre[kept] = ((even.count * even.mean + odd.count * odd.mean) / max(1, even.count + odd.count))[kept]
    means = [half.count * (half.mean - centre) for half in halves]
    seconds = [half.count * half.second_about(centre) for half in halves]
    found = solve_held_out(
        PrimalProblem(
            count=(even.count, odd.count),
            centred=bias,
            inputs=torch.stack([mean[kept] for mean in means]),
            residuals=torch.stack([mean[removed] for mean in means]),
            gram=torch.stack([second[kept][:, kept] for second in seconds]),
            cross=torch.stack([second[kept][:, removed] for second in seconds]),
            energies=torch.stack([(metric * second[removed][:, removed]).sum() for second in seconds]),
            metric=metric,
        )
    )
    if found is None:
        return None
    matrix, offset = found
    return matrix, offset - matrix @ centre[kept]


def _choose_units(
    model: nn.Module, graph: WidthGraph, width: Width, size: int, statistics: ActivationMoments | None
) -> list[int]:
    parts = {
        tie: statistics.second_moment(tie) for tie in width.consumers if statistics is not None and tie in statistics
    }
    taken = pivots(consumer_weighted(model, width, parts), size) if parts else []
    if len(taken) < size:
        strength = magnitude(model, graph, width)
        ranked = strength.argsort(descending=True, stable=True).tolist()
        taken += [unit for unit in ranked if unit not in taken][: size - len(taken)]
    return taken


def magnitude(model: nn.Module, graph: WidthGraph, width: Width) -> Tensor:
    """Norm of the producers' rows times norm of the consumers' columns for each unit, `[size]`.

    Where batch norms follow, their weights take the place of the rows, whose norm they divide out. Learned latents and
    queries, which no weight consumes along this axis, count by the norm of their rows alone, with data too; of experts the
    norms of their weights in each stack take the place of the columns.
    """

    def norm(ties: Sequence[Tie]) -> Tensor:
        weights = [tie for tie in ties if len(graph.shapes[tie.tensor]) > 1]
        if not weights:
            return torch.ones(width.size, dtype=torch.float64, device="cpu")
        return torch.cat([unit_rows(model, width, tie) for tie in weights], dim=1).norm(dim=1)

    scales = [
        in_float64(tensor_named(model, tie.tensor).detach(), "cpu").narrow(0, tie.start, width.size * tie.repeat)
        for tie in width.ties
        if isinstance(owner := model.get_submodule(tie.module), NormBase)
        and tensor_named(model, tie.tensor) is owner.weight
    ]
    made = torch.cat([each.reshape(width.size, -1) for each in scales], dim=1).norm(dim=1) if scales else None
    stacks = [t for t in width.ties if t.role == FOLLOWS and t.dim == 0 and len(graph.shapes[t.tensor]) > 2]
    others = (
        norm(width.consumers) if width.consumers else torch.stack([norm([tie]) for tie in stacks] or [norm([])]).prod(0)
    )
    return (norm(width.producers) if made is None else made) * others


def refit_columns(
    model: nn.Module,
    tie: Tie,
    index_map: IndexMap,
    statistics: ActivationMoments,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The changes with which a consumer reconstructs removed units from kept ones, see `predict_removed`.

    Args:
        model: the model.
        tie: of the consumer.
        index_map: the units that stay.
        statistics: from `collect`.
        rows: the inputs themselves, `[rows, size]`, and which are held out, `[rows]` booleans, of a dense consumer of one
            place: the fit is the same, and where there are few rows takes less time in its dual form.

    Returns:
        (tensor's name, delta of the old shape) for the weight and the bias.
    """
    kept, removed = index_map.tensor(), torch.tensor(index_map.removed, device="cpu")
    weight = in_float64(model.get_parameter(tie.tensor).detach(), "cpu")
    length = index_map.size * tie.repeat
    # [size, repeat, rows, kernel places]: a removed unit's entries go to the same repeat and kernel place of the kept ones.
    consumed = weight.narrow(tie.dim, tie.start, length).movedim(tie.dim, 0)
    places = consumed.reshape(index_map.size, tie.repeat, consumed.shape[1], -1)
    columns = places[removed].flatten(1)
    bias = statistics.bias_of(tie)
    if rows is None:
        even, odd = statistics.even[tie], statistics.odd[tie]
        found = predict_removed(even, odd, kept, removed, columns @ columns.T, bias=bias is not None)
        if found is None:
            return
        matrix, offset = found
        made, shift = matrix.T @ columns, torch.einsum("u,upok->o", offset, places[removed])
    else:
        fit = _fit_of_rows(*rows, kept, removed, columns, bias=bias is not None)
        if fit is None:
            return
        made, shift = in_float64(fit.weight.mT, "cpu"), in_float64(fit.offset, "cpu")
    moved = torch.zeros_like(places)
    moved[kept] = made.reshape(moved[kept].shape)
    delta = torch.zeros_like(weight)
    delta.narrow(tie.dim, tie.start, length).copy_(moved.reshape(consumed.shape).movedim(0, tie.dim))
    yield tie.tensor, delta
    if bias is not None:
        yield bias.name, bias.sign * shift


def _fit_of_rows(
    inputs: Tensor, odd: Tensor, kept: Tensor, removed: Tensor, columns: Tensor, *, bias: bool
) -> Fit | None:
    """The fit of what removed units put out through their `columns`, `[removed, out]`, by kept ones; None if it does not help."""
    kind, device = torch.promote_types(inputs.dtype, torch.float32), inputs.device
    with full_precision():
        residuals = inputs[:, to_device(removed, device)].to(kind) @ to_device(columns.to(kind), device)
    start = torch.zeros(columns.shape[1], len(kept), dtype=kind, device=device)
    offset = torch.zeros_like(start[:, 0]) if bias else None
    fit = refit_residuals(inputs[:, to_device(kept, device)], residuals, start, offset, odd)
    return fit if fit is not None and bool(fit.improves) else None


def with_deltas(
    model: nn.Module, surgery: Surgery, deltas: Mapping[str, Tensor], host: nn.Module | None = None
) -> Surgery:
    """The surgery with `deltas`, of the old shapes and bases, added to the tensors before they are changed."""
    changes = {change.name: change for change in surgery.changes}
    host = model if host is None else host
    for name, delta in deltas.items():
        tensor = model.get_parameter(name)
        change = changes.get(name) or TensorChange(tensor, name, {}, tensor.detach())
        value = in_float64(host.get_parameter(name).detach(), "cpu") + delta.reshape(tensor.shape)
        for dim, basis in change.bases.items():
            value = along(value, basis.values, dim)
        for dim, index_map in change.axes.items():
            value = index_map.apply(value, dim)
        changes[name] = replace(change, value=to_device(value.to(tensor.dtype), tensor.device))
    return replace(surgery, changes=tuple(changes.values()))
