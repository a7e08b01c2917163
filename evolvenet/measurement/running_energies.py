"""Averages of the energies of widths over the last part of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

TIME = 0.05
"""Time constant of the averages, as a share of the run."""

WEIGHT = 0.5
"""Weight of the newest energies where the share of the run that is done is not known."""

_LEAST = 1e-12


@dataclass(frozen=True)
class RunningEnergies:
    """Of every width, the average of its units' energies over the last events.

    The energies of an event vary with its batches and with the last steps of training. A policy that removes what falls below a
    threshold once would remove the more, the more events there are; the average over a span of the run depends little on how many
    events lie in it. It is an exponential average of the logarithms, with the time constant `TIME`.

    Args:
        known: {width: (share of the run that was done, energies, descending)}.

    >>> first = RunningEnergies().updated({"0": [4.0, 1.0]}, progress=0.50)
    >>> [round(energy, 3) for energy in first.updated({"0": [1.0, 0.5]}, progress=0.55).known["0"][1]]
    [1.665, 0.645]
    """

    known: Mapping[str, tuple[float, tuple[float, ...]]] = field(default_factory=dict)

    def updated(self, energies: Mapping[str, Sequence[float]], progress: float) -> RunningEnergies:
        """The averages after an event.

        Args:
            energies: {width: energies of its units, descending}.
            progress: share of the run that is done, 0 … 1; where it is that of the last event, it is not known.
        """
        found = dict(self.known)
        for name, new in energies.items():
            found[name] = (progress, self._average(name, tuple(new), progress))
        return RunningEnergies(found)

    def adopted(self, averages: Mapping[str, tuple[float, ...]], progress: float) -> RunningEnergies:
        """With averages that another process has updated."""
        return RunningEnergies({**self.known, **{name: (progress, each) for name, each in averages.items()}})

    def _average(self, name: str, new: tuple[float, ...], progress: float) -> tuple[float, ...]:
        before, old = self.known.get(name, (progress, ()))
        weight = 1 - math.exp(-(progress - before) / TIME) if progress > before else WEIGHT
        # The units of a width that was pruned are the first ones of before; of those of one that grew no more is known.
        common = min(len(old), len(new))
        past = torch.tensor(old[:common], device="cpu").double().clamp_min(_LEAST).log()
        now = torch.tensor(new, device="cpu").double().clamp_min(_LEAST).log()
        now[:common] += (1 - weight) * (past - now[:common])
        return tuple(now.exp().cummin(0).values.tolist())

    def state_dict(self) -> dict[str, list[object]]:
        """Plain data for a checkpoint."""
        return {name: [progress, list(energies)] for name, (progress, energies) in self.known.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Sequence[object]]) -> RunningEnergies:
        """The averages that `state_dict` returned."""
        return cls({name: (progress, tuple(energies)) for name, (progress, energies) in state.items()})  # type: ignore[misc]
