"""`Evolver`: the engine for any training loop. Observe batches, and step now and then."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from evolvenet.cost import macs, parameters
from evolvenet.errors import EvolveNetError, TraceError
from evolvenet.inputs import first_samples
from evolvenet.measure import measure
from evolvenet.policy import Measure, Policy, Proposal
from evolvenet.prune import plan_prune
from evolvenet.grow import plan_growth
from evolvenet.record import Event, History, WidthChange
from evolvenet.resize import commit
from evolvenet.statistics import collect
from evolvenet.trace import trace

_NEVER = 1_000_000
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
        self.optimizers = _as_list(optimizer)
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
        at = self._observed if at is None else at
        self._events += 1
        skipped, changes = None, ()
        try:
            changes = self._evolve()
        except (EvolveNetError, torch.linalg.LinAlgError) as problem:
            skipped = str(problem)
            log.warning("step %d: no width was changed: %s", at, problem)
        for change in changes:
            log.info("step %d: %s %d → %d: %s", at, change.width, change.before, change.after, change.reason)
        event = self._snapshot(at, changes, before, time.perf_counter() - started, skipped)
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

    def _evolve(self) -> tuple[WidthChange, ...]:
        """One event: prune first, so that growth is paid for, then grow."""
        self._check_finite()
        if not self._batches:
            raise TraceError("Expected at least one observed batch to measure on, got none. Call observe(batch) first.")
        statistics = collect(self.model, self.graph, list(self._batches))
        proposals = self.policy.propose(self._measures(statistics), self.graph)
        sizes = self.graph.sizes
        down = {name: p.size for name, p in proposals.items() if p.size < sizes[name]}
        up = {name: p.size for name, p in proposals.items() if p.size > sizes[name]}
        if down:
            self.graph = commit(self.model, plan_prune(self.model, self.graph, down, statistics), self.optimizers)
        if up:
            generator = torch.Generator().manual_seed(self._seed + self._events)
            growth = plan_growth(self.model, self.graph, up, generator=generator)
            self.graph = commit(self.model, growth, self.optimizers)
        return self._note(proposals, sizes)

    def _note(self, proposals: dict[str, Proposal], sizes: dict[str, int]) -> tuple[WidthChange, ...]:
        now = self.graph.sizes
        changed = [name for name in proposals if now[name] != sizes[name]]
        self._changed.update({name: (self._events, now[name] - sizes[name]) for name in changed})
        return tuple(WidthChange(name, sizes[name], now[name], proposals[name].reason) for name in changed)

    def _measures(self, statistics: Any) -> dict[str, Measure]:
        found = {}
        for name, spectrum in measure(self.model, self.graph, statistics).items():
            width = self.graph.widths[name]
            event, last = self._changed.get(name, (-_NEVER, 0))
            found[name] = Measure(
                name, width.size, width.step, tuple(spectrum.tolist()), self._events - event, width.mixed is None, last
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


def _as_list(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
