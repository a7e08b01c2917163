"""What one trace has found that another trace of the same network need not find again.

A run traces a network alone and then the training step that calls it; a file without a record is read by the widths with whole
heads and with places of heads. Most of the time of each is a search for the numbers and ties that let its heads go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from evolvenet.graph.coverage import OTHER_ORDER, TRIAL
from evolvenet.graph.width_graph import Tie, Width, WidthGraph
from evolvenet.tracing.grouping import GroupedWidths
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.verification import RAISED, Change, Grouping

Place = tuple[str, int, int]
"""Tensor, axis and first place of a tie."""
Failures = dict[frozenset[Change], str | None]
"""What trials for shapes have changed → why they failed, None for those that passed."""


class LabelRun(NamedTuple):
    """What a run with labels treats otherwise than a first one, see `run_for_labels`."""

    given: frozenset[str] = frozenset()
    keeps_heads: bool = False
    tied_layers: bool = False


class Choice(NamedTuple):
    """What a graph was found by: the run with labels, and whether places of all heads were tried last."""

    run: LabelRun = LabelRun()
    places_last: bool = False


@dataclass(frozen=True)
class Findings:
    """What a trace has found.

    Args:
        surroundings: of the runs: device of the shadows, modes, autocast, gradients. Elsewhere a trial may end otherwise.
        heads: as of `trace`.
        failures: {modes: trials}.
        choice: what the graph was found by.
        resizable: places of the widths that can be resized.
        frozen: places of the others.
        labels: {run: ties}, of exactly these inputs.
        grouped: {run: {ties of fixes: widths}}, of exactly these inputs.
    """

    surroundings: tuple[object, ...]
    heads: bool | None
    failures: Mapping[tuple[bool, ...], Failures]
    choice: Choice
    resizable: frozenset[Place]
    frozen: frozenset[Place]
    labels: Mapping[LabelRun, LabelGraph] = field(default_factory=dict[LabelRun, LabelGraph])
    grouped: Mapping[LabelRun, dict[Grouping, GroupedWidths]] = field(
        default_factory=dict[LabelRun, dict[Grouping, GroupedWidths]]
    )

    def in_step(self, path: str = "") -> Findings:
        """What of it holds for a model with this network at a path, whose step calls it with the same inputs.

        A trial that raised in the network's own code raises there again. One that passed may fail by what the step does with
        the network, and outputs whose shape has changed may be none that the step uses: both are tried anew.
        """
        prefix = f"{path}." if path else ""
        ties: dict[tuple[Tie, ...], tuple[Tie, ...]] = {}

        def moved(change: Change) -> Change:
            own, patches, index_map = change
            if own not in ties:
                ties[own] = tuple(replace(tie, tensor=prefix + tie.tensor) for tie in own)
            below = tuple((prefix + module if module else path, name) for module, name in patches)
            return ties[own], below, index_map

        failures = {
            modes: {
                frozenset(map(moved, key)): reason for key, reason in found.items() if (reason or "").startswith(RAISED)
            }
            for modes, found in self.failures.items()
        }
        run = self.choice.run
        return Findings(
            self.surroundings,
            self.heads,
            failures,
            self.choice._replace(run=run._replace(given=frozenset(prefix + name for name in run.given))),
            _below(prefix, self.resizable),
            _below(prefix, self.frozen),
        )

    def agree(self, graph: WidthGraph) -> bool:
        """Whether another choice would find no more: all places that could be resized can, and no others failed a trial."""
        failed = [width for width in graph.widths.values() if (width.frozen or "").startswith((TRIAL, OTHER_ORDER))]
        return self.resizable <= places_of(graph.resizable) and places_of(failed) <= self.frozen


def places_of(widths: Iterable[Width]) -> frozenset[Place]:
    """The places of widths."""
    return frozenset((tie.tensor, tie.dim, tie.start) for width in widths for tie in width.ties)


def _below(prefix: str, places: frozenset[Place]) -> frozenset[Place]:
    return frozenset((prefix + tensor, dim, start) for tensor, dim, start in places)
