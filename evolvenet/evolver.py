"""`Evolver`: the engine for any training loop. Observe batches, and step now and then."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from evolvenet.compensate import QUICK, compensate
from evolvenet.cost import macs, parameters
from evolvenet.errors import EvolveNetError, TraceError
from evolvenet.grow import plan_growth
from evolvenet.inputs import first_samples
from evolvenet.measure import measure
from evolvenet.policy import Measure, Policy, Proposal
from evolvenet.prune import plan_prune
from evolvenet.record import Event, History, WidthChange
from evolvenet.resize import as_list, commit
from evolvenet.statistics import Statistics, collect
from evolvenet.surgery import Surgery
from evolvenet.trace import trace

_NEVER = 1_000_000
PLACES = 2
"""Fewest places (samples × positions) seen for each unit: fewer span fewer directions than there are units, and the
rest would look as if they carried nothing. A width that saw fewer is left as it is."""

log = logging.getLogger("evolvenet")


class Evolver:
    """Changes a model's widths while it trains, in any loop.

    Call `observe` with the model's inputs on some training batches and `step` between two optimizer steps, never between
    a forward and its backward pass.

    Args:
        model: the model; it keeps its parameters' identity throughout.
        optimizer: the optimizer that holds them, or several; None for none.
        policy: proposes sizes from spectra, for example `Threshold`.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        calibration_batches: how many of the last observed batches an event measures on.
        seed: of the newborns' random directions; they do not draw from the global generator.

    Raises:
        TraceError: if the model does not run on the example inputs, or nothing in it can be resized.

    >>> from evolvenet import Threshold
    >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> evolver = Evolver(model, optimizer, Threshold(prune=0.01, grow=0.9), torch.zeros(1, 4))
    >>> evolver.observe(torch.randn(256, 4))
    >>> event = evolver.step()
    >>> event.sizes["0"] < 64
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        policy: Policy,
        example_inputs: Any,
        calibration_batches: int = 4,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.optimizers = as_list(optimizer)
        self.policy = policy
        self.example_inputs = first_samples(example_inputs, 2)
        self.graph = trace(model, self.example_inputs)
        if not self.graph.resizable:
            reasons = "; ".join(f"{width.name}: {width.frozen}" for width in self.graph.widths.values())
            raise TraceError(
                f"Expected a model with at least one resizable width, got a {type(model).__name__} without any ({reasons}). "
                "A width is what lies between two layers: a single layer from input to output has none."
            )
        self.history = History(self._snapshot(0, (), parameters(model), 0.0))
        self._inputs = len(example_inputs) if isinstance(example_inputs, (tuple, list)) else None
        self._batches: deque[Any] = deque(maxlen=calibration_batches)
        self._observed = 0
        self._events = 0
        self._changed: dict[str, tuple[int, int]] = {}
        self._seed = seed

    def observe(self, batch: Any) -> None:
        """Remember a batch to measure on. Nothing is computed until `step`.

        Args:
            batch: the model's inputs, as `example_inputs`; of a longer tuple (inputs, targets) the first are taken.
        """
        if isinstance(batch, (tuple, list)) and not isinstance(self.example_inputs, dict):
            batch = tuple(batch[: self._inputs or 1])
        self._batches.append(batch)
        self._observed += 1

    def step(self, at: int | None = None) -> Event:
        """Measure, let the policy decide, and change the widths; on a problem nothing changes and training goes on.

        Args:
            at: the optimizer step to write into the record; by default the number of batches observed.

        Returns:
            What happened; `event.skipped` says why nothing did, if it should have.
        """
        started = time.perf_counter()
        before = parameters(self.model)
        moment = self._observed if at is None else at
        self._events += 1
        skipped, changes = None, []
        try:
            self._evolve(changes)
        except (EvolveNetError, RuntimeError) as problem:
            # Each change is all or nothing, so the run can go on with whatever widths it has now.
            skipped = str(problem)
            log.warning("step %d: widths are left as they are: %s", moment, problem)
        for change in changes:
            log.info("step %d: %s %d → %d: %s", moment, change.width, change.before, change.after, change.reason)
        event = self._snapshot(moment, tuple(changes), before, time.perf_counter() - started, skipped)
        self.history.events.append(event)
        return event

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model, as plain data."""
        return {
            "history": self.history.to_dict(),
            "observed": self._observed,
            "events": self._events,
            "changed": {name: list(entry) for name, entry in self._changed.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was called. The model must already have the widths of that moment."""
        self.history = History.from_dict(state["history"])
        self._observed, self._events = state["observed"], state["events"]
        self._changed = {name: (entry[0], entry[1]) for name, entry in state["changed"].items()}

    def _evolve(self, changes: list[WidthChange]) -> None:
        """One event: prune first, so that growth is paid for, then grow. What is done is added to `changes`."""
        self._check_finite()
        if not self._batches:
            raise TraceError("Expected at least one observed batch to measure on, got none. Call observe(batch) first.")
        statistics = collect(self.model, self.graph, list(self._batches))
        proposals = self.policy.propose(self._measures(statistics), self.graph)
        sizes = self.graph.sizes
        down = {name: proposal for name, proposal in proposals.items() if proposal.size < sizes[name]}
        up = {name: proposal for name, proposal in proposals.items() if proposal.size > sizes[name]}
        if down:
            surgery = plan_prune(self.model, self.graph, _sizes(down), statistics)
            surgery = compensate(self.model, self.graph, surgery, list(self._batches), QUICK)
            changes.extend(self._commit(surgery, down))
        if up:
            generator = torch.Generator().manual_seed(self._seed + self._events)
            surgery = plan_growth(self.model, self.graph, _sizes(up), generator=generator)
            changes.extend(self._commit(surgery, up))

    def _commit(self, surgery: Surgery, proposals: Mapping[str, Proposal]) -> list[WidthChange]:
        before = self.graph.sizes
        self.graph = commit(self.model, surgery, self.optimizers)
        after = self.graph.sizes
        self._changed.update({name: (self._events, after[name] - before[name]) for name in proposals})
        return [WidthChange(name, before[name], after[name], each.reason) for name, each in proposals.items()]

    def _measures(self, statistics: Statistics) -> dict[str, Measure]:
        found, few = {}, {}
        for name, spectrum in measure(self.model, self.graph, statistics).items():
            width = self.graph.widths[name]
            seen = [statistics.count(tie) for tie in width.consumers if tie in statistics]
            if seen and max(seen) < PLACES * width.size:
                few[name] = max(seen)
                continue
            event, last = self._changed.get(name, (-_NEVER, 0))
            # Without a row of its own a newborn would stay dead, and where units mix it would change the function.
            growable = width.mixed is None and bool(width.producers)
            idle = self._events - event
            found[name] = Measure(name, width.size, width.step, tuple(spectrum.tolist()), idle, growable, last)
        if few and not found:
            raise TraceError(
                f"Expected at least {PLACES} places (samples × positions) a unit to measure on, got "
                + "; ".join(f"{count} for the {self.graph.widths[name].size} of {name}" for name, count in few.items())
                + ". Observe more or larger batches, or raise calibration_batches."
            )
        return found

    def _check_finite(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise EvolveNetError(
                    f"Expected finite weights, got NaN or infinite values in {name}. Widths are left alone until they are "
                    "finite again; if they stay so, lower the learning rate or clip the gradients."
                )

    def _snapshot(
        self, at: int, changes: tuple[WidthChange, ...], before: int, seconds: float, skipped: str | None = None
    ) -> Event:
        if changes or not hasattr(self, "_macs"):
            self._macs = macs(self.model, self.example_inputs)
        count = parameters(self.model)
        return Event(at, changes, dict(self.graph.sizes), before, count, self._macs, seconds, skipped)


def _sizes(proposals: Mapping[str, Proposal]) -> dict[str, int]:
    return {name: proposal.size for name, proposal in proposals.items()}
