"""What `experiments.bench.gpu` measures: a fit without the callback, and one with it, each step and event timed to its end."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import evolvenet
from evolvenet.policies.base import PolicyContext
from experiments.bench.gpu_networks import Repeated, Subject, Training

CUT = 0.9
"""The share of its units that each width keeps in the event with a change."""
EVERY = 16
"""Optimizer steps after which an event comes due, and the most batches that it measures on."""
EPOCH = 1000
"""Batches of an epoch; the fits end long before."""
PLAIN, AFTER = 14, 6
"""Steps without the callback, and after the last event."""
WARM_UP = 4
"""First steps of a fit that do not count."""


@dataclass
class Laps:
    """Times and peaks of memory, by what was done.

    Args:
        device: on which everything runs.
        seconds: {what: seconds of each time}; the device has finished its work at both ends.
        peaks: {what: the most bytes allocated each time}; 0 where the device does not count them.
    """

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, list[int]] = field(default_factory=dict)

    def now(self) -> float:
        """Seconds on a clock, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start_peak(self) -> None:
        """Count the peak of memory from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def add(self, what: str, seconds: float) -> None:
        """Add a time, and the peak since `start_peak`."""
        self.seconds.setdefault(what, []).append(seconds)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        self.peaks.setdefault(what, []).append(peak)
        self.start_peak()

    def rename(self, what: str, to: str) -> None:
        """What was measured so far is kept by another name."""
        for table in (self.seconds, self.peaks):
            table[to] = table.pop(what)  # type: ignore[assignment]


class Steps(Callback):
    """Times whole steps, from the start of one to the start of the next; the first callback of a trainer.

    The first `WARM_UP` steps are left out. `kind` says what the present one counts as.
    """

    def __init__(self, laps: Laps, most: int | None) -> None:
        self.laps, self.most, self.kind, self._began = laps, most, "", 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """One step is over, and the next begins."""
        now = self.laps.now()
        if batch_idx > WARM_UP and self.kind:
            self.laps.add(self.kind, now - self._began)
        self.laps.start_peak()
        self.restart("step")

    def restart(self, kind: str) -> None:
        """Measure from now on, as a step of this kind."""
        self.kind, self._began = kind, self.laps.now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the fit after `most` steps."""
        if self.most is not None and batch_idx + 1 >= self.most:
            trainer.should_stop = True


class TwoEvents:
    """A policy that measures and changes nothing at the first event, and cuts all widths at the second."""

    def __init__(self) -> None:
        self.events = 0

    def propose(self, context: PolicyContext) -> Mapping[str, evolvenet.Proposal]:
        """Every width that was measured keeps the share `CUT` of its units."""
        self.events += 1
        found: dict[str, evolvenet.Proposal] = {}
        for name, measured in context.statistics.items():
            size = max(context.graph.widths[name].smallest, int(CUT * measured.size))
            if self.events == 2 and size < measured.size:
                found[name] = evolvenet.Proposal(size, f"{CUT:.0%} of the units")
        return found


class TimedEvolution(evolvenet.WidthEvolution):
    """`WidthEvolution` with its trace and its events timed; ends the fit some steps after the second event."""

    laps: Laps
    steps: Steps
    _steps_since_event = 0

    @property
    def _events(self) -> int:
        return len(self.history.events) if self.history else 0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        evolver, events = self.evolver, len(self.history.events) if self.history else 0
        self.laps.start_peak()
        began = self.laps.now()
        yield
        seconds, after = self.laps.now() - began, self.history.events if self.history else []
        if evolver is None and self.evolver is not None:
            self.laps.add("trace", seconds)
        elif len(after) > events:
            self.laps.add("event with a change" if after[-1].changes else "event without a change", seconds)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """As the callback's."""
        events = self._events
        with self._timed():
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._steps_since_event += 1
        if self._events > events:
            self._steps_since_event = 0
            self.steps.restart("step after an event")
        elif self._timer.recording:
            self.steps.kind = "step while recording"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """As the callback's."""
        with self._timed():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (self._events >= 2 and self._steps_since_event >= AFTER) or self._untraceable:
            trainer.should_stop = True


@dataclass(frozen=True)
class Variant:
    """How a network is trained.

    Args:
        precision: of Lightning's trainer.
        compiled: whether `torch.compile` compiles the network.
    """

    precision: str = "32-true"
    compiled: bool = False


VARIANTS = {
    "float32": Variant(),
    "bf16-mixed": Variant("bf16-mixed"),
    "float32, torch.compile": Variant(compiled=True),
}


def measure(subject: Subject, variant: Variant, device: torch.device, backend: str = "inductor") -> dict[str, Any]:
    """Train without the callback and with it.

    Args:
        subject: the network and its data.
        variant: how it is trained.
        device: "cuda" or "cpu".
        backend: of `torch.compile`, where the variant compiles.

    Returns:
        {"seconds": …, "peaks": …, "events": …} and what is known about the widths, as plain data.
    """
    torch.manual_seed(0)
    module = Training(subject, backend if variant.compiled else None)
    loader = Repeated.loader(subject, device, EPOCH)
    laps = Laps(device)
    try:
        plain = Steps(laps, PLAIN)
        _trainer(device, variant, plain).fit(module, loader)
        laps.rename("step", "step without the callback")
        steps = Steps(laps, None)
        evolution = TimedEvolution(policy=TwoEvents(), every_n_steps=EVERY, stop=1.0)
        evolution.laps, evolution.steps = laps, steps
        _trainer(device, variant, steps, evolution).fit(module, loader)
        return {"seconds": laps.seconds, "peaks": laps.peaks, **_about(evolution)}
    finally:
        del module, loader
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _trainer(device: torch.device, variant: Variant, *callbacks: Callback) -> Trainer:
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return Trainer(
        accelerator=accelerator, devices=1, precision=variant.precision, callbacks=list(callbacks), max_epochs=1,  # type: ignore[arg-type]
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def _about(evolution: TimedEvolution) -> dict[str, Any]:
    """What the events did, and which widths the graph has."""
    evolver = evolution.evolver
    if evolver is None:
        return {"events": [], "widths": 0, "frozen": {}, "coverage": 0.0, "batches": 0}
    events = [
        {
            "step": event.step,
            "changes": len(event.changes),
            "before": event.parameters_before,
            "after": event.parameters,
            "skipped": event.skipped,
        }
        for event in evolver.history.events
    ]
    graph = evolver.graph
    return {
        "events": events,
        "widths": len(graph.resizable),
        "frozen": dict(graph.reasons),
        "coverage": graph.coverage,
        "batches": evolver.calibration_batches,
    }
