"""What an event sends to the trainer's loggers: numbers to all of them, spectra and a drawing to those that show such."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from evolvenet.engine.distributed import process_group
from evolvenet.engine.history import Event, History
from evolvenet.engine.reporting import network_figure
from evolvenet.engine.run_checks import warn

LEAST = 1e-8
"""The least energy in a histogram, whose scale is logarithmic."""


def log_event(trainer: Trainer, event: Event, history: History) -> None:
    """An event's widths, ranks and energies to every logger, and what is in `WRITERS` to those of that type.

    Args:
        trainer: whose loggers they are.
        event: that has just happened.
        history: with it.
    """
    values: dict[str, float] = {"evolve/parameters": event.parameters, "evolve/macs": event.macs}
    tables = {"size": event.sizes, "effective_rank": event.effective_rank, "kept_energy": event.kept_energy}
    for kind, table in tables.items():
        values |= {f"evolve/{kind}/{name}": float(value) for name, value in table.items()}
    if event.measured_change is not None:
        values["evolve/measured_change"] = event.measured_change
    for logger in trainer.loggers:
        writer = next((WRITERS[cls.__name__] for cls in type(logger).__mro__ if cls.__name__ in WRITERS), None)
        try:
            logger.log_metrics(values, step=trainer.global_step)
            if writer is not None and process_group().rank == 0:
                writer(logger, event, history, trainer.global_step)
        except Exception as problem:  # noqa: BLE001  some refuse names that modules may have; the run goes on
            warn(
                f"The event at step {event.step} is not in the {type(logger).__name__}: {type(problem).__name__}: {problem}"
            )


def _to_tensorboard(logger: Any, event: Event, history: History, step: int) -> None:
    """A histogram of each spectrum, log10 of the energies as multiples of their mean, and the drawing if widths changed."""
    for name, energies in event.spectra.items():
        found = np.array([math.log10(max(energy, LEAST)) for energy in energies])
        logger.experiment.add_histogram(f"evolve/spectrum/{name}", found, step)
    figure = network_figure(history) if event.changes else None
    if figure is not None:
        logger.experiment.add_figure("evolve/network", figure, step)


WRITERS: Mapping[str, Callable[[Any, Event, History, int], None]] = {"TensorBoardLogger": _to_tensorboard}
"""{class of a logger, by name, since its package may not be installed: what it is sent besides numbers}."""
