"""What one trace has found that another trace of the same model on the same inputs need not find again.

A file without a record is read by the widths with whole heads and with places of heads. Most of the time of each trace is a
search for the numbers and ties that let its heads go, by many trials that are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from evolvenet.tracing.grouping import GroupedWidths
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.verification import Change, Grouping

Failures = dict[frozenset[Change], str | None]
"""What trials for shapes have changed → why they failed, None for those that passed."""


@dataclass(frozen=True)
class LabelRun:
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
    """What a trace has found, of exactly these inputs and outputs.

    A training step that calls the model is no such trace: it may return what the model alone has as outputs, call another
    method, or hold the model under other names, and another graph is the best one then.

    Args:
        surroundings: of the runs: device of the shadows, modes, autocast, gradients. Elsewhere a trial may end otherwise.
        failures: {modes: trials}.
        labels: {run: ties}.
        grouped: {run: {ties of fixes: widths}}.
    """

    surroundings: tuple[object, ...]
    failures: Mapping[tuple[bool, ...], Failures]
    labels: Mapping[LabelRun, LabelGraph]
    grouped: Mapping[LabelRun, dict[Grouping, GroupedWidths]]
