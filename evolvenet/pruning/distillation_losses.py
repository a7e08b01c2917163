"""What steps towards the outputs of another network make less: their squared error, or the divergence of what they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolvenet.errors import DistillationError
from evolvenet.linalg.host_transfers import values_of
from evolvenet.measurement.output_error import OutputMeasure, divergences, real

UNITS = {"outputs": ("output error", ""), "kl": ("divergence", " nats")}
"""{loss: (its name, its unit)}."""


@dataclass(frozen=True)
class OutputDistance:
    """How far outputs are from those to reach.

    Args:
        kind: "outputs" for the squared error of all numbers over their variance. "kl" for KL(p ‖ q) of the probabilities p and
            q that a softmax over the last axis makes of the outputs to reach and of those that are there: the mean over all
            other axes, of several outputs the sum.
        scale: what the squared error of one number is divided by.
    """

    kind: OutputMeasure
    scale: float = 1.0

    @classmethod
    def of(cls, kind: OutputMeasure, targets: Sequence[Sequence[Tensor]]) -> OutputDistance:
        """The distance from some outputs to reach.

        Args:
            kind: of the distance.
            targets: for each batch, its tensors.

        Raises:
            DistillationError: for "kl" and outputs that have no axis of classes.
        """
        if kind == "outputs":
            return cls(kind, _variance(targets))
        shapes = [tuple(tensor.shape) for tensor in targets[0]]
        if any(len(shape) < 2 or shape[-1] < 2 for shape in shapes):
            raise DistillationError(
                f'Expected logits for loss="kl", [samples, …, classes] with two classes or more, got outputs of the '
                f'shapes {shapes}. Name the logits by outputs=, or take loss="outputs".'
            )
        return cls(kind)

    def loss(self, found: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Of one minibatch, to be differentiated: in 32 bits at least, as squares and sums of 16 bits would overflow."""
        each = [total / count for total, count in self._sums(found, targets, _wide)]
        return sum(each[1:], each[0])

    def add(self, sums: list[tuple[Tensor, float]], found: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Add a batch, in float64, to sums that begin empty and that `mean` takes."""
        fresh = self._sums(found, targets, real)
        before = sums or [(torch.zeros_like(one), 0.0) for one, _ in fresh]
        sums[:] = [(one + more, count + n) for (one, count), (more, n) in zip(before, fresh, strict=True)]

    @staticmethod
    def mean(sums: Sequence[tuple[Tensor, float]]) -> float:
        """The distance over all batches."""
        totals = values_of([total for total, _ in sums])
        return sum(total / count for total, (_, count) in zip(totals, sums, strict=True))

    def _sums(
        self, found: Sequence[Tensor], targets: Sequence[Tensor], wide: Callable[[Tensor], Tensor]
    ) -> list[tuple[Tensor, float]]:
        pairs = [(wide(one), wide(two)) for one, two in zip(found, targets, strict=True)]
        if self.kind == "outputs":
            apart = [(one - two).square().sum() for one, two in pairs]
            return [(sum(apart[1:], apart[0]), self.scale * sum(two.numel() for _, two in pairs))]
        each = [(one.log_softmax(-1), two.log_softmax(-1)) for one, two in pairs]
        return [(divergences(two, one).sum(), two.numel() / two.shape[-1]) for one, two in each]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _variance(targets: Sequence[Sequence[Tensor]]) -> float:
    """Of one number of the outputs to reach; its mean square if they are all the same, 1 if that is 0."""
    tensors = [real(tensor) for found in targets for tensor in found]
    rows = [tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1, 1) for tensor in tensors]
    apart, energy = (
        sum(values_of([(row - middle).square().sum() for row, middle in zip(rows, middles, strict=True)]))
        for middles in ([row.mean(0) for row in rows], [row.new_zeros(()) for row in rows])
    )
    return (apart or energy) / sum(row.numel() for row in rows) or 1.0
