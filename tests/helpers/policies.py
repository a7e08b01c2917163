"""Policies whose proposals are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import PolicyContext, Proposal


class Fixed:
    """Proposes given sizes, and records the statistics of every event."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.seen: list[dict[str, WidthStatistics]] = []

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        known = context.statistics
        self.seen.append(dict(known))
        return {
            name: Proposal(size, "fixed")
            for name, size in self.sizes.items()
            if name in known and known[name].size != size
        }


class InTurn:
    """Proposes the next sizes at every event, then nothing more."""

    def __init__(self, *sizes: Mapping[str, int]) -> None:
        self.left = list(sizes)

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        sizes = self.left.pop(0) if self.left else {}
        return {name: Proposal(size, "next") for name, size in sizes.items() if context.graph.sizes[name] != size}


class Walk:
    """Proposes one set of sizes after the other, by the present sizes: a pure function."""

    def __init__(self, *sizes: Sequence[int]) -> None:
        self.sizes = [tuple(each) for each in sizes]

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        sizes = context.graph.sizes
        now = tuple(sizes.values())
        place = self.sizes.index(now) + 1 if now in self.sizes else 0
        following = dict(zip(sizes, self.sizes[place % len(self.sizes)], strict=True))
        return {name: Proposal(size, "next") for name, size in following.items() if size != sizes[name]}


class ShrinkThenGrow:
    """Every width one unit smaller at one event and two larger at the next, by its size: a pure function."""

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        return {
            name: Proposal(width.size - 1 if width.size > 15 else width.size + 2, "")
            for name, width in context.statistics.items()
            if width.size > 15 or width.growable
        }


class FixedRanks(Fixed):
    """Proposes given sizes of widths, and of ranks of layers that are whole."""

    lowrank = True


class Chains:
    """Halves the rank of every layer that is whole, and grows those of chains by one: they become whole again in the end."""

    lowrank = True

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        ranks = [width for width in context.graph.resizable if width.rank_of is not None]
        sizes = {width.name: width.size + 1 if width.ties else max(1, width.size // 2) for width in ranks}
        return {name: Proposal(size, "to and fro") for name, size in sizes.items()}
