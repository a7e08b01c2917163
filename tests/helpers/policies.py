"""Policies whose proposals are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evolvenet.measurement.width_spectra import WidthStatistics
from evolvenet.policies.base import Proposal


class Fixed:
    """A policy that asks for given sizes."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.seen: list[dict[str, WidthStatistics]] = []

    def propose(self, measures: Mapping[str, WidthStatistics], graph: object) -> dict[str, Proposal]:
        self.seen.append(dict(measures))
        return {name: Proposal(size, "asked for") for name, size in self.sizes.items() if measures[name].size != size}


class InTurn:
    """Asks for the next sizes at every event, then for nothing more."""

    def __init__(self, *sizes: Mapping[str, int]) -> None:
        self.left = list(sizes)

    def propose(self, measures: Mapping[str, WidthStatistics], graph: object) -> dict[str, Proposal]:
        sizes = self.left.pop(0) if self.left else {}
        return {name: Proposal(size, "asked for") for name, size in sizes.items() if measures[name].size != size}


class Walk:
    """A policy that asks for one set of sizes after the other, by the sizes that are there: a pure function."""

    def __init__(self, *sizes: Sequence[int]) -> None:
        self.sizes = [tuple(each) for each in sizes]

    def propose(self, measures: Mapping[str, WidthStatistics], graph: Any) -> dict[str, Proposal]:
        now = tuple(graph.sizes.values())
        place = self.sizes.index(now) + 1 if now in self.sizes else 0
        wanted = dict(zip(graph.sizes, self.sizes[place % len(self.sizes)], strict=True))
        return {name: Proposal(size, "next") for name, size in wanted.items() if size != graph.sizes[name]}


class ShrinkThenGrow:
    """Every width one unit down at one event and two up at the next, by its size: a pure function."""

    def propose(self, measures: Mapping[str, WidthStatistics], graph: Any) -> dict[str, Proposal]:
        return {
            name: Proposal(measure.size - 1 if measure.size > 15 else measure.size + 2, "")
            for name, measure in measures.items()
            if measure.size > 15 or measure.growable
        }
