"""What a factorization did, one line a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evolvenet.lowrank.base import Ranks


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        name: its path.
        kind: of its factors; None if it stays whole.
        ranks: of its factors, in the order of execution.
        before: parameters of its weight.
        after: parameters of its factors, or of the whole weight.
        error: relative squared error, Σ‖ŷ − y‖² / Σ‖y − mean‖² of the layer's outputs where they were measured (about 0 in
            place of the mean for a layer without an offset), else that of its weight; 0 for a whole layer. At the end of a
            residual block y is what makes the sum equal to the original one, errors of the shortcut included: where these
            are larger than the branch, the error is near 1.
        reason: why it stays whole.
    """

    name: str
    kind: str | None
    ranks: Ranks
    before: int
    after: int
    error: float = 0.0
    reason: str | None = None

    def __str__(self) -> str:
        """One line.

        >>> print(LayerReport("fc", "svd", (2,), 100, 40, 1e-9))
        fc: svd of rank 2, 100 → 40 parameters, error 1e-09
        """
        if self.kind is None:
            return f"{self.name}: whole, {self.before:,} parameters; {self.reason}"
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.name}: {self.kind} of rank {ranks}, {self.before:,} → {self.after:,} parameters, error {self.error:.2g}"


@dataclass(frozen=True)
class Factorization:
    """What became of all layers that came into question; printed, one line each.

    Args:
        layers: in the order of the model's modules.
    """

    layers: tuple[LayerReport, ...]

    @property
    def before(self) -> int:
        """Parameters of the layers' weights before."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Parameters of the layers' weights and factors after."""
        return sum(layer.after for layer in self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The report of the layer of a name."""
        return next(layer for layer in self.layers if layer.name == name)

    def __iter__(self) -> Iterator[LayerReport]:
        """All layers."""
        return iter(self.layers)

    def __str__(self) -> str:
        """One line a layer, and the sums."""
        lines = [str(layer) for layer in self.layers]
        return "\n".join([*lines, f"all: {self.before:,} → {self.after:,} parameters"])
