"""What a factorization did, one line a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class RankSearch:
    """The smallest ranks within a tolerance, and what was measured to find them.

    Args:
        layer: whose rank it was; None for a share of energy common to all.
        before: metric of the model at the start.
        limit: the worst value within the tolerance.
        mode: "max" if a larger metric is better, "min" if a smaller one is.
        measured: (parameters of the layer or layers, metric), by the first.
        found: metric with the ranks that were taken; None where none was within the tolerance, and the layer stays whole.
    """

    layer: str | None
    before: float
    limit: float
    mode: str
    measured: Sequence[tuple[int, float]]
    found: float | None

    @property
    def monotone(self) -> bool:
        """Whether all measured ranks above one within the tolerance are within it, too."""
        within = [self._within(metric) for _, metric in self.measured]
        return within == sorted(within)

    def _within(self, metric: float) -> bool:
        return metric >= self.limit if self.mode == "max" else metric <= self.limit

    def __str__(self) -> str:
        """One line.

        >>> print(RankSearch("fc", 0.75, 0.74, "max", [(10, 0.2), (20, 0.745), (40, 0.73)], 0.745))
        fc: metric 0.745 (0.75 before, 0.74 at worst), 3 ranks measured; not monotone: worse again with more parameters
        """
        counted = f"{len(self.measured)} ranks measured"
        found = "no rank within the tolerance" if self.found is None else f"metric {self.found:.4g}"
        line = f"{self.layer or 'all'}: {found} ({self.before:.4g} before, {self.limit:.4g} at worst), {counted}"
        return line if self.monotone else f"{line}; not monotone: worse again with more parameters"


@dataclass(frozen=True)
class Factorization:
    """What became of all layers that came into question; printed, one line each.

    Args:
        layers: in the order of the model's modules.
        seconds: of a forward pass on the first batch before and after, measured; None where the budget was no latency.
        searches: for ranks within a tolerance.
        evaluations: of the metric, for all of these.
    """

    layers: tuple[LayerReport, ...]
    seconds: tuple[float, float] | None = None
    searches: tuple[RankSearch, ...] = ()
    evaluations: int = 0

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
        lines = [*map(str, self.layers), f"all: {self.before:,} → {self.after:,} parameters"]
        if self.seconds is not None:
            before, after = (f"{1e3 * each:.3g} ms" for each in self.seconds)
            lines.append(f"forward pass: {before} → {after}")
        return "\n".join([*lines, *map(str, self.searches)])
