"""The initializers of new units, by name: each gives directions for the rows, kernels and columns of an expanded model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from evolvenet.errors import concerning
from evolvenet.graph.width_graph import CONSUMES, FOLLOWS, PRODUCES, Tie, Width
from evolvenet.growth.expanded_model import Growth, expanded
from evolvenet.growth.gradmax import maximize_fan_out_gradient
from evolvenet.growth.tiny import Bottleneck, measure_bottleneck
from evolvenet.linalg.pivoted_cholesky import pivots
from evolvenet.measurement.activation_moments import collect

Method = Callable[[Growth], dict[Tie, Tensor]]
"""Growth → {tie: directions of norm 1 (or 0) of the new units' rows, kernels and columns}; zeros for ties left out."""

RANK_TOLERANCE = 1e-12
"""Squared singular values below this share of the largest count as rounding, not as part of the row space."""

CANDIDATES = 4
"""Random rows compared for each new unit beyond the orthogonal complement of the present rows."""


def orthogonal(rows: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random directions orthogonal to the rows and to each other, as long as there are any; then random ones.

    Args:
        rows: `[n, d]` float64 or complex128, the existing units.
        count: number of new units.
        generator: where the random numbers come from, a CPU generator; None for PyTorch's global one.

    Returns:
        `[count, d]` of the type of the rows, each of norm 1.

    >>> made = orthogonal(torch.eye(2, 4, dtype=torch.float64), 2)
    >>> bool((made[:, :2].abs() < 1e-12).all()), round(float(made[0] @ made[1]), 6) + 0.0
    (True, 0.0)
    """
    drawn = torch.randn(count, rows.shape[1], dtype=rows.dtype, device=rows.device, generator=generator)
    rank, project = _projection(rows)
    free = min(count, rows.shape[1] - rank)
    if free > 0:
        part = drawn[:free].mH
        for _ in range(3):  # once leaves the Gram matrix's rounding behind
            part = part - project(part)
        drawn = torch.cat([torch.linalg.qr(part).Q.mH, drawn[free:]])
    return drawn / drawn.norm(dim=1, keepdim=True)


def _projection(rows: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """The rank of `rows`, and the projection of columns `[d, k]` onto their span.

    By the smaller Gram matrix, twice as fast as QR and SVD of wide rows; and by its Cholesky factor where that shows
    full rank, in a small part of the time of `eigh`, which takes a minute for a layer of 4096 x 4096.
    """
    count, length = rows.shape
    gram = rows @ rows.mH if count < length else rows.mH @ rows
    least = RANK_TOLERANCE * gram.diagonal().real.sum().clamp_min(torch.finfo(torch.float64).tiny)
    shifted = gram - least * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if int(torch.linalg.cholesky_ex(shifted).info) == 0:
        if count >= length:
            return length, lambda part: part
        factor = torch.linalg.cholesky(gram)
        return count, lambda part: rows.mH @ torch.cholesky_solve(rows @ part, factor)
    values, vectors = torch.linalg.eigh(gram)
    alive = vectors[:, values > RANK_TOLERANCE * values[-1].clamp_min(torch.finfo(torch.float64).tiny)]
    if count >= length:
        return alive.shape[1], lambda part: alive @ (alive.mH @ part)
    basis = torch.linalg.qr(rows.mH @ alive).Q
    return alive.shape[1], lambda part: basis @ (basis.mH @ part)


def init_orthogonal(growth: Growth) -> dict[Tie, Tensor]:
    """Rows orthogonal to all others, with a fan-out of 0; the default, without data.

    Where the rows of a producer already span everything, the others are random; with batches, they are those of
    `CANDIDATES` random ones each whose activations the existing units and the new units chosen before predict worst, as
    NORTH* does (Maile, Rachelson, Luga and Wilson, "When, where, and how to add new neurons to ANNs", AutoML 2022).
    Kernels of depthwise convolutions are random.
    """
    start = _initial_directions(growth)
    return start if growth.inputs is None else start | _least_predicted(growth, start)


def init_paired(growth: Growth) -> dict[Tie, Tensor]:
    """New units in equal pairs, with random fan-outs of opposite signs: rows (V, V), columns (Z, −Z).

    Together they add nothing, but unlike with a fan-out of 0 their rows have a gradient at once, of opposite signs.
    From Chen, Goodfellow and Shlens, "Net2Net: accelerating learning via knowledge transfer", ICLR 2016, with the
    signs of gromo. Rows are those of "orthogonal"; the last of an odd number has a fan-out of 0. Consumers that are also
    producers (tied embeddings), or are all 0, get zeros; a width without any other consumer starts as "orthogonal", because
    two units with equal rows and columns would stay equal.
    """
    halves = {}
    for width in growth.widths:
        count = growth.count(width)
        halves[width.name] = -(-count // 2) if _plain_consumers(growth, width) else count
    half = growth.of(halves)
    start = init_orthogonal(half)
    found: dict[Tie, Tensor] = {}
    for width in growth.widths:
        consumers = _plain_consumers(growth, width)
        unit = torch.arange(growth.count(width), device="cpu")
        replica = unit // 2 if consumers else unit
        found |= {tie: start[tie][replica] for tie in width.ties if tie in start}
        alone = unit == unit[-1] if int(unit[-1]) % 2 == 0 else torch.zeros_like(unit, dtype=torch.bool)
        sign = torch.where(alone, 0.0, 1.0 - 2.0 * (unit % 2)).double()[:, None]
        for tie in consumers:
            found[tie] = sign * _random(half, width, tie)[replica]
    return found


def init_gradmax(growth: Growth) -> dict[Tie, Tensor]:
    """Rows that maximize the gradient of the fan-out, which is 0; needs batches and a loss.

    Evci, van Merriënboer, Unterthiner and Vladymyrov, "GradMax: growing neural networks using gradient information",
    ICLR 2022, the other way round: there the fan-in is 0 and the fan-out a singular vector of the gradient. A unit with
    a fan-in of 0 is 0, and ReLU passes no gradient at 0: under ReLU, and batch norm with ReLU, the published order
    leaves all gradients 0. Both problems have the same singular values; here the fan-out is 0 and the fan-in is computed,
    through all ops in between (see `maximize_fan_out_gradient`). Rows without a gradient are those of "orthogonal".
    """
    start = _initial_directions(growth)
    return start | maximize_fan_out_gradient(growth, start, Bottleneck(), "gradmax")


def init_tiny(growth: Growth) -> dict[Tie, Tensor]:
    """Rows for the part of the gradient that no update of the present weights follows; needs batches and a loss.

    Verbockhaven, Rudkiewicz, Charpiat and Chevallier, "Growing tiny networks: spotting expressivity bottlenecks and
    fixing them optimally", TMLR 2024: the leading singular vectors of S^−½·N, S the second moments of the producers'
    inputs and N their product with the desired change of the consumers' outputs that no update of the present weights
    achieves (see `measure_bottleneck`). The fan-out of the paper is that of one gradient step from 0, so it starts as 0,
    which keeps the function. Activations and norms are not taken for the identity (see `maximize_fan_out_gradient`).
    """
    start = _initial_directions(growth)
    return start | maximize_fan_out_gradient(growth, start, measure_bottleneck(growth, "tiny"), "tiny")


def init_random(growth: Growth) -> dict[Tie, Tensor]:
    """Random rows and random fan-outs: changes the function, for comparison only."""
    found: dict[Tie, Tensor] = {}
    for width in growth.widths:
        for tie in width.ties:
            if (
                not growth.is_copied(tie)
                and len(growth.graph.shapes[tie.tensor]) > 1
                and not (tie.role == FOLLOWS and growth.is_vector(tie))
            ):
                found[tie] = _random(growth, width, tie)
    return found


METHODS: dict[str, Method] = {
    "orthogonal": init_orthogonal,
    "paired": init_paired,
    "gradmax": init_gradmax,
    "tiny": init_tiny,
    "random": init_random,
}
"""The initializers by name."""


def _initial_directions(growth: Growth) -> dict[Tie, Tensor]:
    """Orthogonal rows for the producers, random kernels, nothing for the consumers."""
    found: dict[Tie, Tensor] = {}
    for width in growth.widths:
        for tie in width.ties:
            if len(growth.graph.shapes[tie.tensor]) < 2 or tie.role == CONSUMES or growth.is_copied(tie):
                continue
            if tie.role == FOLLOWS and growth.is_vector(tie):
                continue
            with concerning(width.name):
                if tie.role == PRODUCES:
                    found[tie] = orthogonal(growth.unit_entries(tie, width), growth.count(width), growth.generator)
                else:
                    found[tie] = _random(growth, width, tie)
    return found


def _random(growth: Growth, width: Width, tie: Tie) -> Tensor:
    """Random directions `[count, places]` of norm 1 for one tie."""
    present = growth.unit_entries(tie, width)
    drawn = torch.randn(
        growth.count(width), present.shape[1], dtype=present.dtype, device="cpu", generator=growth.generator
    )
    return drawn / drawn.norm(dim=1, keepdim=True)


def _least_predicted(growth: Growth, start: dict[Tie, Tensor]) -> dict[Tie, Tensor]:
    """For widths with more new units than orthogonal rows: random rows whose activations are predicted worst (NORTH*)."""
    free = {width.name: _free_directions(growth, width) for width in growth.widths}
    short = [width for width in growth.widths if free[width.name] < growth.count(width)]
    counts = {w.name: free[w.name] + CANDIDATES * (growth.count(w) - free[w.name]) for w in short}
    if not counts:
        return {}
    pool = growth.of(counts)
    tried = _initial_directions(pool)
    with expanded(pool, tried):
        statistics = collect(pool.model, pool.surgery.graph, pool.inputs or ())
    found: dict[Tie, Tensor] = {}
    for width in short:
        room, consumers = free[width.name], pool.surgery.graph.widths[width.name].consumers
        shares = [
            unpredicted_covariance(statistics[tie].covariance, width.size + room)
            for tie in consumers
            if tie in statistics
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
    rows = [growth.unit_entries(tie, width) for tie in growth.matrices(width, PRODUCES)]
    room = min((part.shape[1] - _projection(part)[0] for part in rows), default=growth.count(width))
    return min(room, growth.count(width))


def unpredicted_covariance(covariance: Tensor, known: int) -> Tensor:
    """Covariance of the residuals of the other units, predicted linearly from the first `known`; of units of variance 1.

    Args:
        covariance: `[n, n]` float64.
        known: how many units come first.

    Returns:
        `[n − known, n − known]`; zeros for a unit without variance.

    >>> x = torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    >>> unpredicted_covariance(x.T @ x, 1).round(decimals=6).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    there, across, new = covariance[:known, :known], covariance[:known, known:], covariance[known:, known:]
    least = RANK_TOLERANCE * there.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
    # Cholesky, not eigh: 3072 units of a transformer's hidden layer would take ten times as long.
    factor, failed = torch.linalg.cholesky_ex(there + least * torch.eye(known, dtype=there.dtype, device=there.device))
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
    """The consumers whose weight is used in no other way, so that columns Z and −Z of two equal units cancel.

    A width with entries that are copied from present units (masks) has none: those of the two would differ.
    Excluded are weights that are producers too (tied embeddings), weights of which another axis consumes too (a transposed
    use), and weights of norm 0.
    """
    if any(growth.is_copied(tie) for tie in width.ties):
        return []
    consuming = {(tie.tensor, tie.dim) for other in growth.graph.widths.values() for tie in other.consumers}
    return [
        tie
        for tie in growth.matrices(width, CONSUMES)
        if not growth.graph.is_shared(tie.tensor)
        and not any(tensor == tie.tensor and dim != tie.dim for tensor, dim in consuming)
        and not isinstance(growth.model.get_submodule(tie.module), (nn.Embedding, nn.EmbeddingBag))
        and growth.norm(tie, width) > 0
    ]
