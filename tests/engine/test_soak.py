"""A long run with many events: what an event leaves behind does not add up, in memory or in work."""

from __future__ import annotations

import gc
import logging
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from evolvenet import Evolver, IndexMap, Proposal, Tie, Width, WidthGraph
from evolvenet.policies.base import PolicyContext
from evolvenet.surgery.resize_model import Surgery

EVERY = 50
"""Steps between two events."""
WIDE, NARROW = 12, 6
COUNTED = (Tensor, Width, WidthGraph, Tie, Surgery, IndexMap, RemovableHandle)
OF_RECORD = 16
"""Python objects that the record may keep of an event; a graph for each event would be dozens more."""
MEMORY = 16 * 2**20
"""Bytes that 18,000 steps may add to the process: one network's activations kept for each step would be twice that."""


class Breathes:
    """A width is wide after one event and narrow after the next."""

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        return {name: Proposal(WIDE + NARROW - each.size, "breathes") for name, each in context.statistics.items()}


@dataclass(frozen=True)
class Held:
    """What is alive after an event, and the calls of functions that the event and the steps before it took."""

    counts: Mapping[str, int]
    entries: int
    objects: int
    memory: int
    calls: tuple[int, int]

    @classmethod
    def now(cls, calls: tuple[int, int]) -> Held:
        gc.collect()
        alive = gc.get_objects()
        of_kind = {kind.__name__: [each for each in alive if issubclass(type(each), kind)] for kind in COUNTED}
        counts = {name: len(found) for name, found in of_kind.items()}
        # Lazy parameters that another test has left have no size.
        sized = [tensor for tensor in of_kind["Tensor"] if not is_lazy(tensor)]
        return cls(counts, sum(tensor.numel() for tensor in sized), len(alive), _resident(), calls)


def _resident() -> int:
    """Bytes of memory that this process holds, or where that is not told, the most it has held."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _calls(act: Callable[[], Any]) -> int:
    """How often functions, Python's and others', are called while it acts."""
    count = 0

    def profile(frame: FrameType, kind: str, argument: Any) -> None:
        nonlocal count
        count += kind in ("call", "c_call")

    # What collects garbage calls back at moments of its own.
    gc.disable()
    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


class Run:
    """A small network in a plain loop."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, WIDE), nn.ReLU(), nn.Linear(WIDE, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, foreach=False)
        self.evolver = Evolver(self.model, self.optimizer, Breathes(), torch.zeros(1, 4))
        self.batches = torch.randn(EVERY, 32, 4)
        self.events = 0

    def until(self, events: int) -> Held:
        """Run to an event; what is held is seen at the same width each time."""
        while self.events < events - 1:
            self._steps()
            self._event()
        return Held.now((_calls(self._steps), _calls(self._event)))

    def _event(self) -> None:
        self.evolver.step()
        self.events += 1

    def _steps(self) -> None:
        for batch in self.batches:
            self.evolver.observe(batch)
            self.optimizer.zero_grad()
            self.model(batch).square().mean().backward()
            self.optimizer.step()


@pytest.mark.parametrize(("early", "events"), [(10, 40), pytest.param(40, 400, marks=pytest.mark.long)])
def test_a_long_run_stays_as_small_and_as_fast_as_it_began(
    early: int, events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps what is logged, by whomever; how much that is depends on the tests before.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    run = Run()
    first, last = run.until(early), run.until(events)
    done = run.evolver.history.events
    assert [event.sizes["0"] for event in done] == [NARROW, WIDE] * (events // 2)
    assert last.counts == first.counts
    assert last.entries == first.entries
    assert last.objects - first.objects < OF_RECORD * (events - early)
    assert last.memory - first.memory < MEMORY
    assert last.calls == first.calls
