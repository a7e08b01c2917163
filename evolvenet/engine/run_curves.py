"""The metrics and the duration of a run, kept for its report."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from evolvenet.linalg.host_transfers import values_of

OWN = "evolve/"
"""What names of metrics begin with that the history has anyway."""


class RunCurves:
    """Metrics over the steps of a run, and its seconds. Tensors stay on their device until the curves are read.

    >>> curves = RunCurves()
    >>> curves.add(5, {"loss": 0.5, "evolve/macs": 8})
    >>> curves.add(10, {"loss": 0.25})
    >>> curves.read()
    {'loss': [(5, 0.5), (10, 0.25)]}
    """

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[int, Any]]] = {}
        self._before = 0.0
        self._began: float | None = None

    def begin(self) -> None:
        """The run begins, or goes on."""
        self._before, self._began = self.seconds, time.perf_counter()

    def end(self) -> None:
        """The run has ended."""
        self._before, self._began = self.seconds, None

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, a resumed one in all its parts."""
        return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the values of a step; a second one for the same step counts. What is no single number is passed over."""
        for name, value in metrics.items():
            single = value.numel() == 1 if isinstance(value, Tensor) else type(value) in (int, float)
            if not single or name.startswith(OWN):
                continue
            curve = self._values.setdefault(name, [])
            if curve and curve[-1][0] == step:
                curve.pop()
            curve.append((step, value.detach() if isinstance(value, Tensor) else value))

    def read(self) -> dict[str, list[tuple[int, float]]]:
        """{metric: (step, value) pairs}, those that are finite numbers."""
        places = [(name, k) for name, curve in self._values.items() for k in range(len(curve))]
        there = [(name, k) for name, k in places if isinstance(self._values[name][k][1], Tensor)]
        moved = values_of([self._values[name][k][1] for name, k in there]) if there else []
        for (name, k), value in zip(there, moved, strict=True):
            self._values[name][k] = (self._values[name][k][0], float(value))
        found = {
            name: [(step, float(value)) for step, value in curve if math.isfinite(value)]
            for name, curve in self._values.items()
        }
        return {name: curve for name, curve in found.items() if curve}

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "metrics": {name: [list(pair) for pair in curve] for name, curve in self.read().items()},
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what `state_dict` returned; {} for a new run."""
        self._values = {
            name: [(step, value) for step, value in curve] for name, curve in state.get("metrics", {}).items()
        }
        self._before, self._began = state.get("seconds", 0.0), None
