"""Rows of new units that maximize the gradient of their fan-out, by orthogonal iteration on the expanded model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evolvenet.graph.width_graph import CONSUMES, PRODUCES, Tie, Width
from evolvenet.growth.expanded_model import Entries, Growth, NewUnitSlice, expanded, finite
from evolvenet.growth.tiny import Bottleneck, Corrections, Scale, subtract_updates

STEPS = 10
"""Iterations, two passes over the batches each."""

NEGLIGIBLE = 1e-8
"""Share of the largest gradient below which a new unit's is rounding."""

GAIN_TOLERANCE = 1e-6
"""Relative difference below which two gains count as equal."""


def maximize_fan_out_gradient(growth: Growth, start: Entries, bottleneck: Bottleneck, method: str) -> dict[Tie, Tensor]:
    """Orthogonal rows that maximize the squared gradient of the new units' fan-out, which itself is 0.

    Orthogonal iteration (Golub and Van Loan, "Matrix Computations", section 8.2) on the bilinear form in fan-in and
    fan-out that approximates the loss to first order. One pass over the batches gives the gradient of the fan-out; a second
    one, after a tiny step of the fan-out along it, the gradient of the rows. Nothing is assumed of what lies between,
    so norms, activations, pooling, several producers and consumers are allowed; where all is linear, the result is
    the leading singular vectors. All widths are searched at once: with a fan-out of 0 they do not affect each other.

    Args:
        growth: the expansion, with batches and a loss.
        start: initial directions of every tie of weights and kernels. New units beyond the number of places, and those
            without a gradient, keep them.
        bottleneck: the metric of rows, and the updates of the present columns to be subtracted from the gradient.
        method: its name, for error messages.

    Returns:
        {producer's tie: `[count, places]`, each row of norm 1}.

    Raises:
        ResizeError, SpectrumError: for batches or a loss that cannot be used, or NaN in them.
    """
    pairs = growth.pairs(method)
    rows = {tie: start[tie] for width in growth.widths for tie in growth.matrices(width, PRODUCES)}
    if not rows:
        return {}
    found = _BestRows(start, rows)
    with (
        expanded(growth, start) as shadows,
        subtract_updates(growth, bottleneck.updates) as corrections,
    ):
        network = _ExpandedNetwork(growth, shadows, corrections, pairs)
        for step in range(STEPS + 1):
            fan_out = network.gradients(CONSUMES, rows, {})
            gains = {width.name: _gain(growth, width, rows, fan_out, bottleneck) for width in growth.widths}
            if step > 0:
                found.compare(growth, rows, gains)
            if step < STEPS:
                fan_in = network.gradients(PRODUCES, rows, _unit(growth, fan_out))
                rows = {
                    tie: _next_rows(rows[tie], fan_in[tie], gains[width.name], bottleneck.scales.get(tie, Scale()))
                    for width in growth.widths
                    for tie in growth.matrices(width, PRODUCES)
                }
    return found.rows


class _BestRows:
    """The rows with the largest gain so far: with an activation in between, it need not rise in every step."""

    def __init__(self, start: Entries, rows: Entries) -> None:
        self.start, self.rows = start, dict(rows)
        self.highest: dict[str, float] = {}

    def compare(self, growth: Growth, rows: Entries, gains: Mapping[str, Tensor]) -> None:
        """Take the rows of every width whose total gain is the largest so far; rows are orthogonal, so totals compare."""
        for width in growth.widths:
            gain = gains[width.name]
            total, highest = float(gain.sum()), self.highest.get(width.name, 0.0)
            # The total is the same for every basis of a space; the last basis is the nearest to the singular vectors.
            if total > 0 and total >= (1 - GAIN_TOLERANCE) * highest:
                self.highest[width.name] = max(total, highest)
                has_gain = (gain > NEGLIGIBLE**2 * gain.max())[:, None]
                for tie in growth.matrices(width, PRODUCES):
                    self.rows[tie] = torch.where(has_gain, rows[tie], self.start[tie])


def _gain(growth: Growth, width: Width, rows: Entries, fan_out: Entries, bottleneck: Bottleneck) -> Tensor:
    """Squared norm of the gradient of each new unit's fan-out for a row of length 1, `[count]`."""
    gain = sum(
        (fan_out[tie].abs().square().sum(1) for tie in growth.matrices(width, CONSUMES)), torch.zeros((), device="cpu")
    )
    length = sum(
        (bottleneck.scales.get(tie, Scale()).energy(rows[tie]) for tie in growth.matrices(width, PRODUCES)),
        torch.zeros((), device="cpu"),
    )
    return (gain / length.clamp_min(torch.finfo(torch.float64).tiny)).expand(growth.count(width))


def _unit(growth: Growth, fan_out: Entries) -> dict[Tie, Tensor]:
    """Fan-outs of norm 1 over all consumers of a new unit together; those without a gradient stay 0."""
    found: dict[Tie, Tensor] = {}
    for width in growth.widths:
        ties = growth.matrices(width, CONSUMES)
        if ties:
            whole = torch.cat([fan_out[tie] for tie in ties], dim=1).norm(dim=1, keepdim=True)
            found |= {tie: fan_out[tie] / whole.clamp_min(torch.finfo(torch.float64).tiny) for tie in ties}
    return found


def _next_rows(rows: Tensor, fan_in: Tensor, gain: Tensor, scale: Scale) -> Tensor:
    """The next rows `[count, places]`: their gradients, orthonormalized in the order of descending gain."""
    count = min(rows.shape)
    has_gradient = fan_in.norm(dim=1) > NEGLIGIBLE * fan_in.norm(dim=1).max()
    # A new unit that is 0 for all inputs (ReLU) need not be with the opposite sign.
    directions = torch.where(has_gradient[:, None], scale.gradients(fan_in), -scale.coordinates(rows))[:count]
    order = torch.where(has_gradient, gain, -1.0)[:count].argsort(descending=True, stable=True)
    basis, size = torch.linalg.qr(directions[order].mH)
    following = rows.clone()
    following[order] = scale.rows((basis * torch.where(size.diagonal().real < 0, -1.0, 1.0)).mH)
    return following / following.norm(dim=1, keepdim=True)


class _ExpandedNetwork:
    """Gradients of the expanded model on the batches."""

    def __init__(
        self,
        growth: Growth,
        shadows: Mapping[str, Tensor],
        corrections: Corrections,
        pairs: tuple[tuple[object, object], ...],
    ) -> None:
        self.growth, self.shadows, self.corrections, self.pairs = growth, shadows, corrections, pairs
        self.slots: dict[Tie, NewUnitSlice] = {}
        self.sizes: dict[Tie, float] = {}
        for width in growth.widths:
            consumers = growth.matrices(width, CONSUMES)
            norms = {tie: growth.norm(tie, width) for tie in (*growth.matrices(width, PRODUCES), *consumers)}
            largest = max((norms[tie] for tie in consumers), default=0.0) or 1.0
            for tie, norm in norms.items():
                self.slots[tie] = growth.slot(tie, width)
                tiny = torch.finfo(shadows[tie.tensor].dtype).eps ** 0.5
                self.sizes[tie] = tiny * largest if tie in consumers else norm
        for tie in self.slots:
            shadows[tie.tensor].requires_grad_()

    def gradients(self, role: str, rows: Entries, columns: Entries) -> dict[Tie, Tensor]:
        """Gradients of the new units' entries in the ties of one role, `[count, places]` each, over all batches.

        Args:
            role: "produces" or "consumes".
            rows: directions of the producers' new unit rows.
            columns: directions of the consumers' new unit columns; 0 where there are none.
        """
        with torch.no_grad():
            for tie, slot in self.slots.items():
                entries = {**rows, **columns}.get(tie)
                slot.put(self.shadows[tie.tensor], None if entries is None else self.sizes[tie] * entries)
        ties = [tie for tie in self.slots if tie.role == role]
        names = list(dict.fromkeys(tie.tensor for tie in ties))
        total: dict[Tie, Tensor] = {}
        for inputs, targets in self.pairs if ties else ():
            value = self.growth.value(inputs, targets) + self.corrections.total()
            made = torch.autograd.grad(value, [self.shadows[name] for name in names], allow_unused=True)
            for tie in ties:
                gradient = made[names.index(tie.tensor)]
                # None for tensors that did not take part in this pass.
                gradient = torch.zeros_like(self.shadows[tie.tensor]) if gradient is None else gradient
                total[tie] = total.get(tie, 0) + finite(self.slots[tie].take(gradient), tie.tensor)
        return total
