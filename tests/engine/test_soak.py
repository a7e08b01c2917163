"""20,000 steps with 400 events: what an event leaves behind does not add up."""

from __future__ import annotations

import gc
import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from evolvenet import Evolver, IndexMap, Proposal, Tie, Width, WidthGraph
from evolvenet.measurement.width_spectra import WidthStatistics
from evolvenet.surgery.resize_model import Surgery

STEPS, EVENTS, EARLY = 20_000, 400, 40
EVERY = STEPS // EVENTS
WIDE, NARROW = 12, 6
COUNTED = (Tensor, Width, WidthGraph, Tie, Surgery, IndexMap, RemovableHandle)
OF_RECORD = 16
"""Python objects that the record may keep of an event; a graph for each event would be dozens more."""
MEMORY = 16 * 2**20
"""Bytes that 18,000 steps may add to the process: one network's activations kept for each step would be twice that."""
SLOWER, SLOWER_EVENT = 1.5, 5.0
"""How much longer a step and an event may take in the end. An event has fewer chances than a step to run undisturbed by
other work; one that grew with the events before it would take ten times as long."""


class Breathes:
    """A width is wide after one event and narrow after the next."""

    def propose(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> dict[str, Proposal]:
        return {name: Proposal(WIDE + NARROW - each.size, "breathes") for name, each in measures.items()}


@dataclass(frozen=True)
class Held:
    """What is alive at one moment."""

    counts: Mapping[str, int]
    entries: int
    objects: int
    memory: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        alive = gc.get_objects()
        of_kind = {kind.__name__: [each for each in alive if issubclass(type(each), kind)] for kind in COUNTED}
        counts = {name: len(found) for name, found in of_kind.items()}
        # Lazy parameters that another test has left have no size.
        sized = [tensor for tensor in of_kind["Tensor"] if not is_lazy(tensor)]
        return cls(counts, sum(tensor.numel() for tensor in sized), len(alive), _resident())


def _resident() -> int:
    """Bytes of memory that this process holds, or where that is not told, the most it has held."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Run:
    """A small network in a plain loop, with the seconds of every step by phase, the steps between two events."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, WIDE), nn.ReLU(), nn.Linear(WIDE, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, foreach=False)
        self.evolver = Evolver(self.model, self.optimizer, Breathes(), torch.zeros(1, 4))
        self.batches = torch.randn(EVERY, 32, 4)
        self.phases: list[float] = []

    def until(self, events: int) -> Held:
        """Run to an event; what is held is seen at the same width each time."""
        while len(self.phases) < events:
            self.phases.append(median(self._step(batch) for batch in self.batches))
            self.evolver.step()
        return Held.now()

    def _step(self, batch: Tensor) -> float:
        began = time.perf_counter()
        self.evolver.observe(batch)
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - began


def _slower(seconds: Sequence[float]) -> float:
    """The last tenth over the first: the quickest of each, since other work makes a run slower, never faster."""
    tenth = len(seconds) // 10
    return min(seconds[-tenth:]) / min(seconds[:tenth])


def test_a_long_run_stays_as_small_and_as_fast_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest keeps what is logged, by whomever; how much that is depends on the tests before.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    run = Run()
    early, late = run.until(EARLY), run.until(EVENTS)
    events = run.evolver.history.events
    assert [event.sizes["0"] for event in events] == [NARROW, WIDE] * (EVENTS // 2)
    assert late.counts == early.counts
    assert late.entries == early.entries
    assert late.objects - early.objects < OF_RECORD * (EVENTS - EARLY)
    assert late.memory - early.memory < MEMORY
    for width in (0, 1):
        assert _slower(run.phases[width::2]) < SLOWER
        assert _slower([event.seconds for event in events[width::2]]) < SLOWER_EVENT
