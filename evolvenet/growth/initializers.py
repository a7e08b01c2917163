"""How new units start: the methods by name, and what each gives to the tensors of a widened model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from evolvenet.graph.width_graph import CONSUMES, PRODUCES, Tie, Width
from evolvenet.growth.expanded_model import Growth, trial
from evolvenet.growth.gradmax import maximize_fan_out_gradient
from evolvenet.growth.tiny import Bottleneck, demand
from evolvenet.linalg.pivoted_cholesky import pivots
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.selection import is_unshared

Method = Callable[[Growth], dict[Tie, Tensor]]
"""What grows → directions of norm 1 (or 0) for the new units' rows, kernels and columns; ties left out get zeros."""

RANK_TOLERANCE = 1e-12
"""Squared singular values below this share of the largest count as rounding, not as part of the row space."""

CANDIDATES = 4
"""Random rows tried for each new unit that the row space has no room for."""


def orthogonal(rows: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random directions orthogonal to the rows and to each other, as long as there are any; then random ones.

    Args:
        rows: `[n, d]` float64, the existing units.
        count: number of new units.
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


def init_orthogonal(growth: Growth) -> dict[Tie, Tensor]:
    """Rows orthogonal to all others, read by nobody yet; the default, without data.

    Where the rows of a producer already span everything, the others are random; with batches, they are those of
    `CANDIDATES` random ones each whose activations the existing units and the new units chosen before predict worst, as
    NORTH* does (Maile, Rachelson, Luga and Wilson, "When, where, and how to add new neurons to ANNs", AutoML 2022).
    Kernels of depthwise convolutions are random.
    """
    start = _initial_directions(growth)
    return start if growth.inputs is None else start | _least_predicted(growth, start)


def init_paired(growth: Growth) -> dict[Tie, Tensor]:
    """New units in pairs that are alike, with random fan-outs of opposite signs: (V, V) and (Z, −Z).

    Together they add nothing, but unlike with a fan-out of 0 their rows learn at once; the first step tells the two apart.
    From Chen, Goodfellow and Shlens, "Net2Net: accelerating learning via knowledge transfer", ICLR 2016, with the
    signs of gromo. Rows are those of "orthogonal"; the last of an odd number has a fan-out of 0. Readers that also make
    units (tied embeddings), or are all 0, get zeros; a width without any other reader starts as "orthogonal", because replicas
    that are read alike would stay alike.
    """
    halves = {}
    for width in growth.widths:
        count = growth.count(width)
        halves[width.name] = -(-count // 2) if _plain_consumers(growth, width) else count
    half = growth.of(halves)
    start = init_orthogonal(half)
    found: dict[Tie, Tensor] = {}
    for width in growth.widths:
        readers = _plain_consumers(growth, width)
        unit = torch.arange(growth.count(width))
        replica = unit // 2 if readers else unit
        found |= {tie: start[tie][replica] for tie in width.ties if tie in start}
        alone = unit == unit[-1] if int(unit[-1]) % 2 == 0 else torch.zeros_like(unit, dtype=torch.bool)
        sign = torch.where(alone, 0.0, 1.0 - 2.0 * (unit % 2)).double()[:, None]
        for tie in readers:
            found[tie] = sign * _random(half, width, tie)[replica]
    return found


def init_gradmax(growth: Growth) -> dict[Tie, Tensor]:
    """Rows for which the gradient of the fan-out, which is 0, is as large as it can be; needs batches and a loss.

    Evci, van Merriënboer, Unterthiner and Vladymyrov, "GradMax: growing neural networks using gradient information",
    ICLR 2022, the other way round: there the fan-in is 0 and the fan-out a singular vector of the gradient. A unit with
    a fan-in of 0 answers 0, and ReLU passes no gradient at 0: under ReLU, and batch norm with ReLU, literal GradMax
    never learns. The two problems have the same singular values; here the fan-out is 0 and the fan-in found, through
    what really lies between (see `maximize_fan_out_gradient`). Rows that get no gradient are those of "orthogonal".
    """
    start = _initial_directions(growth)
    return start | maximize_fan_out_gradient(growth, start, Bottleneck(), "gradmax")


def init_tiny(growth: Growth) -> dict[Tie, Tensor]:
    """Rows of the best new units for what the present units cannot do by themselves; needs batches and a loss.

    Verbockhaven, Rudkiewicz, Charpiat and Chevallier, "Growing tiny networks: spotting expressivity bottlenecks and
    fixing them optimally", TMLR 2024: the leading singular vectors of S^−½·N, S the second moments of the producers'
    inputs and N their product with the desired change of the readers' outputs that no update of the present weights
    makes (see `demand`). The fan-out of the paper is what one gradient step makes of a fan-out of 0, which keeps the
    function, so it starts as 0. Activations and norms are not taken for the identity (see `maximize_fan_out_gradient`).
    """
    start = _initial_directions(growth)
    return start | maximize_fan_out_gradient(growth, start, demand(growth, "tiny"), "tiny")


def init_random(growth: Growth) -> dict[Tie, Tensor]:
    """Random rows and random fan-outs: changes what the network computes, for comparison only."""
    found: dict[Tie, Tensor] = {}
    for width in growth.widths:
        for tie in width.ties:
            if len(growth.graph.shapes[tie.tensor]) > 1:
                found[tie] = _random(growth, width, tie)
    return found


METHODS: dict[str, Method] = {
    "orthogonal": init_orthogonal,
    "paired": init_paired,
    "gradmax": init_gradmax,
    "tiny": init_tiny,
    "random": init_random,
}
"""How new units start, by name."""


def _initial_directions(growth: Growth) -> dict[Tie, Tensor]:
    """Orthogonal rows for the producers, random kernels, nothing for the readers."""
    found: dict[Tie, Tensor] = {}
    for width in growth.widths:
        for tie in width.ties:
            if len(growth.graph.shapes[tie.tensor]) < 2 or tie.role == CONSUMES:
                continue
            if tie.role == PRODUCES:
                found[tie] = orthogonal(growth.units(tie, width), growth.count(width), growth.generator)
            else:
                found[tie] = _random(growth, width, tie)
    return found


def _random(growth: Growth, width: Width, tie: Tie) -> Tensor:
    """Random directions `[count, places]` of norm 1 for one tie."""
    places = growth.units(tie, width).shape[1]
    drawn = torch.randn(growth.count(width), places, dtype=torch.float64, generator=growth.generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


def _least_predicted(growth: Growth, start: dict[Tie, Tensor]) -> dict[Tie, Tensor]:
    """Other entries for the widths whose row space is full: what their activations add to those that are there."""
    free = {width.name: _free_directions(growth, width) for width in growth.widths}
    short = [width for width in growth.widths if free[width.name] < growth.count(width)]
    counts = {w.name: free[w.name] + CANDIDATES * (growth.count(w) - free[w.name]) for w in short}
    if not counts:
        return {}
    pool = growth.of(counts)
    tried = _initial_directions(pool)
    with trial(pool, tried):
        statistics = collect(pool.model, pool.surgery.graph, pool.inputs or ())
    found: dict[Tie, Tensor] = {}
    for width in short:
        room, reads = free[width.name], pool.surgery.graph.widths[width.name].consumers
        shares = [
            unpredicted_covariance(statistics[tie].covariance, width.size + room) for tie in reads if tie in statistics
        ]
        if shares:
            added = _pick_candidates(torch.stack(shares).mean(0), growth.count(width) - room)
            chosen = [*range(room), *(room + row for row in added)]
            found |= {tie: tried[tie][chosen] for tie in width.ties if tie in tried}
    return found


def _pick_candidates(share: Tensor, count: int) -> list[int]:
    """Those of the candidates that add most to what comes before them."""
    taken = pivots(share, count)
    # Where nothing adds anything any more, one is as good as another.
    return taken + [row for row in range(len(share)) if row not in taken][: count - len(taken)]


def _free_directions(growth: Growth, width: Width) -> int:
    """How many of a width's new units can be orthogonal to the rows of every producer."""
    rows = [growth.units(tie, width) for tie in growth.matrices(width, PRODUCES)]
    room = min((part.shape[1] - _projection(part)[0] for part in rows), default=growth.count(width))
    return min(room, growth.count(width))


def unpredicted_covariance(covariance: Tensor, known: int) -> Tensor:
    """What linear prediction from the first `known` units leaves of the others, each scaled to a variance of 1.

    Args:
        covariance: `[n, n]` float64.
        known: how many units come first.

    Returns:
        `[n − known, n − known]`, a covariance; a unit that never varies has zeros.

    >>> x = torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    >>> unpredicted_covariance(x.T @ x, 1).round(decimals=6).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    there, across, new = covariance[:known, :known], covariance[:known, known:], covariance[known:, known:]
    least = RANK_TOLERANCE * there.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
    # Cholesky, not eigh: 3072 units of a transformer's hidden layer would take ten times as long.
    factor, failed = torch.linalg.cholesky_ex(there + least * torch.eye(known, dtype=there.dtype))
    if failed:
        values, vectors = torch.linalg.eigh(there)
        alive = values > least
        half = (vectors[:, alive] / values[alive].sqrt()).T @ across
    else:
        half = torch.linalg.solve_triangular(factor, across, upper=False)
    deviation = new.diagonal().sqrt()
    inverse = torch.where(deviation > 0, 1 / deviation, 0)
    return inverse[:, None] * (new - half.T @ half) * inverse


def _plain_consumers(growth: Growth, width: Width) -> list[Tie]:
    """The readers that do nothing but read the units: what they read of one replica, they can take off the other.

    A weight that makes units as well, a tied embedding, is also a maker; a transposed use of the same weight shows in
    that another axis of it reads, too.
    """
    reading = {(tie.tensor, tie.dim) for other in growth.graph.widths.values() for tie in other.consumers}
    return [
        tie
        for tie in growth.matrices(width, CONSUMES)
        if is_unshared(growth.graph, tie.tensor)
        and not any(tensor == tie.tensor and dim != tie.dim for tensor, dim in reading)
        and not isinstance(growth.model.get_submodule(tie.module), (nn.Embedding, nn.EmbeddingBag))
        and growth.norm(tie, width) > 0
    ]
