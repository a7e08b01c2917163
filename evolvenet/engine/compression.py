"""What a compression tried and what it did: plain data, printed as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lowrank.report import Factorization
from evolvenet.measurement.output_error import OutputMeasure
from evolvenet.pruning.distillation import Polish
from evolvenet.pruning.distillation_losses import UNITS as MEASURED

if TYPE_CHECKING:
    from rich.table import Table

UNITS = {"params": "parameters", "macs": "multiply-accumulates", "bytes": "bytes", "latency": "of latency"}
"""{kind of cost: what it is counted in}."""


def amount(kind: str, cost: float) -> str:
    """A cost as text; its unit is `UNITS[kind]`.

    >>> amount("params", 1234.0), amount("latency", 0.00123)
    ('1,234', '1.23 ms')
    """
    return f"{1000 * cost:.3g} ms" if kind == "latency" else f"{cost:,.0f}"


@dataclass(frozen=True)
class Attempt:
    """One way to reach the cost, as it was measured.

    Args:
        name: which: "widths", "widths and ranks", "ranks", or "widths to …, then ranks".
        cost: of the network with it; None if it failed.
        error: Σ‖y′ − y‖² / Σ‖y − mean‖² of the network's outputs on samples that nothing was fitted on; of all samples where
            there is a single batch. Where the loss is "kl" their divergence, nats. None if it failed or did not reach the cost.
        reason: why it did not come into question; None if it did.
    """

    name: str
    cost: float | None
    error: float | None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Compression:
    """What a compression did; printed, a table of its attempts.

    Args:
        kind: of the cost: "params", "macs", "bytes" or "latency".
        limit: of the cost.
        before: cost of the network before.
        after: its cost now.
        attempts: all that were tried, the chosen one among them.
        chosen: the attempt with the least error.
        sizes: {width: (size before, size now)} of those that were cut.
        layers: what became of each layer that could have been factorized; None where ranks were not in question.
        graph: the widths and ranks of the network as it is now.
        polished: what the steps of gradient descent at the end have done; None where there were none.
        loss: what errors are, see `compress`.
    """

    kind: str
    limit: float
    before: float
    after: float
    attempts: tuple[Attempt, ...]
    chosen: Attempt
    sizes: Mapping[str, tuple[int, int]]
    layers: Factorization | None
    graph: WidthGraph = field(repr=False)
    polished: Polish | None = None
    loss: OutputMeasure = "outputs"

    @property
    def error(self) -> float:
        """Relative squared error of the network's outputs before `polished`, or their divergence, see `Attempt`."""
        assert self.chosen.error is not None
        return self.chosen.error

    def _rows(self) -> list[tuple[str, str, str]]:
        rows: list[tuple[str, str, str]] = []
        for each in self.attempts:
            cost = "" if each.cost is None else amount(self.kind, each.cost)
            error = each.reason or "" if each.error is None else f"{each.error:.2g}"
            rows.append((f"{each.name}{' (chosen)' if each is self.chosen else ''}", cost, error))
        return rows

    def _caption(self) -> str:
        before, after = amount(self.kind, self.before), amount(self.kind, self.after)
        end = "" if self.polished is None else f"\n{self.polished}"
        name, unit = MEASURED[self.loss]
        return f"{before} → {after} {UNITS[self.kind]}, {name} {self.error:.2g}{unit}{end}"

    def __str__(self) -> str:
        """The attempts, one line each, and what was reached."""
        return "\n".join([*(" | ".join(row) for row in self._rows()), self._caption()])

    def __rich__(self) -> Table:
        """The table that rich prints."""
        # rich takes long to import, and is needed only here.
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=self._caption(), caption_justify="left")
        table.add_column("attempt")
        table.add_column(UNITS[self.kind].removeprefix("of "), justify="right", no_wrap=True)
        table.add_column(MEASURED[self.loss][0])
        for row, each in zip(self._rows(), self.attempts, strict=True):
            table.add_row(*row, style="bold" if each is self.chosen else "dim" if each.error is None else "")
        return table
