"""What an event leaves in the history beside the sizes: spectra, and how far the outputs moved against what was predicted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evolvenet.engine.distributed import ProcessGroup
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.output_error import first_batches, output_error, outputs_on
from evolvenet.measurement.width_statistics import WidthStatistics, ranks_and_energies

log = logging.getLogger("evolvenet")

POINTS = 24
"""Units of each width whose energies are kept of an event, evenly spaced from the first to the last."""
SAMPLES = 64
"""Samples on which the change of the outputs is measured."""


def recorded(statistics: Mapping[str, WidthStatistics], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What was measured at an event, as fields of its `Event`.

    Args:
        statistics: from before the event's changes.
        sizes: after them.
    """
    ranks, kept = ranks_and_energies(statistics, sizes)
    spectra = {name: relative_energies(each.energies) for name, each in statistics.items()}
    return {"effective_rank": ranks, "kept_energy": kept, "spectra": spectra}


def relative_energies(energies: Sequence[float]) -> list[float]:
    """Energies of at most `POINTS` units as multiples of the mean, which is 1 over their number, with three digits.

    >>> relative_energies([0.5, 0.3, 0.2])
    [1.5, 0.9, 0.6]
    >>> len(relative_energies([0.01] * 100))
    24
    """
    count = len(energies)
    places = range(count) if count <= POINTS else [round(k * (count - 1) / (POINTS - 1)) for k in range(POINTS)]
    return [float(f"{energies[place] * count:.3g}") for place in places]


def predicted_change(statistics: Mapping[str, WidthStatistics], sizes: Mapping[str, int]) -> float:
    """How far a prune is predicted to move outputs: the energies of the removed units, added up over the widths.

    An energy is what a unit adds to the outputs of its consumers, as a share of their variance, beyond what the kept units
    predict. The sum takes each width's share as if it reached the network's outputs whole and by itself.

    Args:
        statistics: from before the prune.
        sizes: after it.

    >>> width = WidthStatistics("a", 3, (1.0, 0.5, 0.1), 9, True, energies=(0.7, 0.25, 0.05))
    >>> predicted_change({"a": width}, {"a": 1}), predicted_change({"a": width}, {"a": 4})
    (0.3, 0.0)
    """
    return float(sum(sum(each.energies[sizes.get(name, each.size) :]) for name, each in statistics.items()))


@dataclass(frozen=True, eq=False)
class OutputChange:
    """The outputs of a model before an event's changes, and how far they are off after it, in eval mode.

    It is for the record alone: where the outputs cannot be compared it is None, and with several processes it is not measured,
    since a forward pass of one of them may wait for the others.

    Args:
        batches: of the first `SAMPLES` samples.
        outputs: on them, before; None where they are not known.
    """

    batches: Sequence[Any]
    outputs: Sequence[Tensor] | None

    @classmethod
    def of(cls, group: ProcessGroup, model: nn.Module, batches: Sequence[Any], graph: WidthGraph) -> OutputChange:
        """Run the model before the changes."""
        try:
            first = first_batches(batches, SAMPLES) if group.size == 1 else []
            return cls(first, outputs_on(model, first, graph) if first else None)
        except Exception as problem:
            log.debug("how far the outputs move is not measured at this event", exc_info=problem)
            return cls((), None)

    def compared(
        self, model: nn.Module, graph: WidthGraph, statistics: Mapping[str, WidthStatistics]
    ) -> dict[str, float | None]:
        """The predicted and the measured change of the outputs, as fields of an `Event`.

        Args:
            model: after the changes.
            graph: its widths.
            statistics: from before them.
        """
        return {
            "predicted_change": predicted_change(statistics, graph.sizes),
            "measured_change": self.after(model, graph),
        }

    def after(self, model: nn.Module, graph: WidthGraph) -> float | None:
        """Σ‖change‖² over the variance of the outputs before; None where it is not known."""
        if self.outputs is None:
            return None
        try:
            return output_error(self.outputs, outputs_on(model, self.batches, graph))
        except Exception as problem:
            log.debug("how far the outputs have moved at this event is not known", exc_info=problem)
            return None
