"""How steps towards the outputs of another network are taken: how many, at which rate, on how many samples each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evolvenet.errors import DistillationError
from evolvenet.measurement.output_error import OutputMeasure
from evolvenet.pruning.distillation_losses import UNITS
from evolvenet.pruning.distillation_samples import Augment


@dataclass(frozen=True)
class Descent:
    """How steps are taken, see `polish`.

    Args:
        steps: for each rate that is tried.
        rate: the largest one; None for the one that trials choose.
        size: samples a step.
        augment: changes the inputs.
        features: names or patterns of modules.
        seed: of the order of the samples.
        loss: of the outputs.

    Raises:
        DistillationError: for numbers out of range, or another loss.
    """

    steps: int
    rate: float | None = None
    size: int = 64
    augment: Augment | None = None
    features: tuple[str, ...] = ()
    seed: int = 0
    loss: OutputMeasure = "outputs"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.size < 1 or not (self.rate is None or 0 < self.rate < math.inf):
            raise DistillationError(
                "Polish: expected steps of 0 or more, a batch size of 1 or more and a finite rate above 0 or None, got "
                f"steps={self.steps}, batch_size={self.size}, rate={self.rate}."
            )
        if self.loss not in UNITS:
            raise DistillationError(f'Polish: expected loss to be "outputs" or "kl", got {self.loss!r}.')
