"""How newborn units start: able to learn, and without changing what the network computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from evolvenet.errors import ResizeError
from evolvenet.graph import FOLLOWS, PRODUCES, Tie, Width, WidthGraph
from evolvenet.index_map import IndexMap
from evolvenet.spectrum import matricize
from evolvenet.surgery import Surgery, TensorChange, compile_surgery

Initialiser = Callable[[Tensor, int, torch.Generator | None], Tensor]
"""(rows `[n, d]` float64, count, generator) → directions of the newborns, `[count, d]`, each of norm 1."""

RANK_TOLERANCE = 1e-12
"""Squared singular values below this share of the largest count as rounding, not as part of the row space."""

FRESH_NORM = 3**-0.5
"""Mean norm of a row that PyTorch's own initialisation makes; for a layer whose rows are all 0."""


def orthogonal(rows: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random directions orthogonal to the rows and to each other, as long as there are any; then random ones.

    Args:
        rows: `[n, d]` float64, the existing units.
        count: number of newborns.
        generator: where the random numbers come from, a CPU generator; None for PyTorch's global one.

    Returns:
        `[count, d]` float64, each of norm 1.

    >>> made = orthogonal(torch.eye(2, 4, dtype=torch.float64), 2)
    >>> bool((made[:, :2].abs() < 1e-12).all()), round(float(made[0] @ made[1]), 6) + 0.0
    (True, 0.0)
    """
    drawn = torch.randn(count, rows.shape[1], dtype=torch.float64, generator=generator)
    rank, project = _projection(rows)
    free = min(count, rows.shape[1] - rank)
    if free > 0:
        part = drawn[:free].T
        for _ in range(3):  # once leaves the Gram matrix's rounding behind
            part = part - project(part)
        drawn = torch.cat([torch.linalg.qr(part).Q.T, drawn[free:]])
    return drawn / drawn.norm(dim=1, keepdim=True)


def _projection(rows: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """The rank of `rows`, and the projection of columns `[d, k]` onto their span.

    By the smaller Gram matrix, twice as fast as QR and SVD of wide rows; and by its Cholesky factor where that shows
    full rank, a small part of what `eigh` takes: a layer of 4096 x 4096 would hold a run up for a minute.
    """
    count, length = rows.shape
    gram = rows @ rows.T if count < length else rows.T @ rows
    least = RANK_TOLERANCE * gram.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
    shifted = gram - least * torch.eye(len(gram), dtype=gram.dtype)
    if int(torch.linalg.cholesky_ex(shifted).info) == 0:
        if count >= length:
            return length, lambda part: part
        factor = torch.linalg.cholesky(gram)
        return count, lambda part: rows.T @ torch.cholesky_solve(rows @ part, factor)
    values, vectors = torch.linalg.eigh(gram)
    alive = vectors[:, values > RANK_TOLERANCE * values[-1].clamp_min(torch.finfo(torch.float64).tiny)]
    if count >= length:
        return alive.shape[1], lambda part: alive @ (alive.T @ part)
    basis = torch.linalg.qr(rows.T @ alive).Q
    return alive.shape[1], lambda part: basis @ (basis.T @ part)


METHODS: dict[str, Initialiser] = {"orthogonal": orthogonal}
"""How newborn rows are drawn, by name."""


def plan_growth(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    method: str = "orthogonal",
    generator: torch.Generator | None = None,
) -> Surgery:
    """Add units that nobody reads yet, so that the network computes what it did. Nothing is changed yet.

    Newborns come last. Their rows in every producer follow the method, with the mean norm of the existing rows; what
    is added to them (biases, running means) is 0, what scales them (norm weights, running variances) the mean magnitude
    of the survivors, depthwise kernels are random of the mean norm; the columns that read them are 0 and get a
    gradient at once. A weight that both makes and reads the units counts as a reader: zeros.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}, each at least the present size.
        method: one of `METHODS`.
        generator: where the random numbers come from, a CPU generator; None for PyTorch's global one.

    Returns:
        The changes, for `apply_surgery`.

    Raises:
        ResizeError: for an unknown method, an unknown or frozen width, a size that it cannot take, or a width
            of which an op mixes the units.
        SpectrumError: for NaN or infinite weights.

    >>> from evolvenet.trace import trace
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> surgery = plan_growth(model, trace(model, torch.zeros(1, 4)), {"0": 3})
    >>> values = {change.name: change.value for change in surgery.changes}
    >>> values["0.weight"].shape, values["2.weight"][:, 2].tolist()
    (torch.Size([3, 4]), [0.0, 0.0])
    """
    if method not in METHODS:
        raise ResizeError(f"Grow: expected a method out of {', '.join(sorted(METHODS))}, got {method!r}.")
    maps: dict[str, IndexMap] = {}
    for asked, size in sizes.items():
        width = graph.widths[asked]
        _check(width, size)
        if size > width.size:
            maps[width.name] = IndexMap.grow(width.size, size - width.size)
    surgery = compile_surgery(model, graph, maps)
    changes = {change.name: change for change in surgery.changes}
    for name, index_map in maps.items():
        for tie in graph.widths[name].ties:
            changes[tie.tensor] = _start(changes[tie.tensor], tie, index_map, METHODS[method], generator)
    return replace(surgery, changes=tuple(changes.values()))


def _check(width: Width, size: int) -> None:
    """Refuse what would not keep the function."""
    if size < width.size:
        raise ResizeError(
            f"Grow: width {width.name!r} has {width.size} units, expected a new size of {width.size} or more, "
            f"got {size}. To remove units, use prune."
        )
    if width.frozen is None and width.mixed is not None and size > width.size:
        raise ResizeError(
            f"Grow: width {width.name!r} cannot grow from {width.size} to {size} units without changing the function, "
            f"because {width.mixed} mixes its units. resize with IndexMap.grow adds them all the same, as zeros."
        )


def _start(
    change: TensorChange, tie: Tie, index_map: IndexMap, draw: Initialiser, generator: torch.Generator | None
) -> TensorChange:
    """The change with the newborn entries of one tie filled in; where a newborn is read they stay 0."""
    units = change.tensor.detach().narrow(tie.dim, tie.start, index_map.size * tie.repeat)
    count = len(index_map.newborns)
    if tie.role == PRODUCES and units.dim() > 1:
        fresh = _newborn_rows(units, tie, count, draw, generator, FRESH_NORM)
    elif tie.role == FOLLOWS and units.dim() > 1:
        fresh = _newborn_rows(units, tie, count, _random, generator, 0.0)
    elif tie.role == FOLLOWS and not _is_added(tie.tensor):
        fresh = units.abs().mean().expand(count * tie.repeat)
    else:
        return change
    for dim, other in change.axes.items():
        if dim != tie.dim:
            fresh = other.apply(fresh, dim)
    value = change.value.clone()
    first = change.axes[tie.dim].indices.index(tie.start) + index_map.size * tie.repeat
    value.narrow(tie.dim, first, count * tie.repeat).copy_(fresh)
    return replace(change, value=value)


def _newborn_rows(
    units: Tensor, tie: Tie, count: int, draw: Initialiser, generator: torch.Generator | None, fallback: float
) -> Tensor:
    """Newborn entries to go beside `units`, with the mean norm of a unit, or `fallback` if that is 0."""
    rows = matricize(units, tie.dim, tie.tensor).to("cpu", torch.float64)
    rows = rows.reshape(len(rows) // tie.repeat, -1)
    norm = float(rows.norm(dim=1).mean()) or fallback
    fresh = norm * draw(rows, count, generator)
    others = [length for dim, length in enumerate(units.shape) if dim != tie.dim]
    return fresh.reshape(count * tie.repeat, *others).movedim(0, tie.dim)


def _random(rows: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random directions of norm 1."""
    drawn = torch.randn(count, rows.shape[1], dtype=torch.float64, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


def _is_added(tensor: str) -> bool:
    """Whether a vector is added to the units (a newborn's entry is 0) rather than scaling them."""
    name = tensor.rpartition(".")[2]
    return "bias" in name or name == "running_mean"
