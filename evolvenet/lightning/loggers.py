"""What an event sends to the trainer's loggers: numbers to all of them, spectra and a drawing to those that show such."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from importlib import import_module
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
    """A histogram of each spectrum, and the drawing if widths changed."""
    for name, found in _spectra(event).items():
        logger.experiment.add_histogram(f"evolve/spectrum/{name}", found, step)
    figure = network_figure(history) if event.changes else None
    if figure is not None:
        logger.experiment.add_figure("evolve/network", figure, step)


def _to_wandb(logger: Any, event: Event, history: History, step: int) -> None:
    """A histogram of each spectrum, and the drawing as an image if widths changed."""
    wandb = import_module("wandb")
    shown = {f"evolve/spectrum/{name}": wandb.Histogram(found) for name, found in _spectra(event).items()}
    figure = network_figure(history) if event.changes else None
    if figure is not None:
        shown["evolve/network"] = wandb.Image(_pixels(figure))
    if shown:
        logger.log_metrics(shown, step)


def _to_mlflow(logger: Any, event: Event, history: History, step: int) -> None:
    """The spectra as a file of JSON, since MLflow has no histograms, and the drawing as an image if widths changed."""
    place = f"step_{step:08}"
    if event.spectra:
        found = {name: values.round(3).tolist() for name, values in _spectra(event).items()}
        logger.experiment.log_dict(logger.run_id, found, f"evolve/spectra/{place}.json")
    figure = network_figure(history) if event.changes else None
    if figure is not None:
        logger.experiment.log_figure(logger.run_id, figure, f"evolve/network/{place}.png")


def _spectra(event: Event) -> dict[str, np.ndarray[Any, Any]]:
    """{width: log10 of each unit's energy as a multiple of their mean}."""
    return {
        name: np.array([math.log10(max(energy, LEAST)) for energy in energies])
        for name, energies in event.spectra.items()
    }


def _pixels(figure: Any) -> np.ndarray[Any, Any]:
    """A drawing as `[height, width, 3]`, 0 … 255."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=figure.dpi)
    width, height = figure.canvas.get_width_height()
    return np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)[..., :3]


WRITERS: dict[str, Callable[[Any, Event, History, int], None]] = {
    "TensorBoardLogger": _to_tensorboard,
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
}
"""{class of a logger, by name, since its package may not be installed: what it is sent besides numbers}.

Others get the numbers. A function of (logger, event, history, optimizer step) under the name of a logger's class adds one.
"""
