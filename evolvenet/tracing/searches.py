"""Searches for the widths that can be resized, by several runs with labels and rounds of fixes, of which the best one counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from evolvenet.execution.isolation import isolated
from evolvenet.graph.block_kinds import ATTENTION
from evolvenet.graph.coverage import OTHER_ORDER, TRIAL
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.tracing.coupled_dims import HEADS_FIRST, PLACES_ALONE, PLACES_FIRST, PLACES_LAST, FixRounds
from evolvenet.tracing.findings import Choice, Failures, Findings, LabelRun
from evolvenet.tracing.grouping import GroupedWidths
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.least_sizes import with_least_sizes
from evolvenet.tracing.recurrent_layers import frozen_layers
from evolvenet.tracing.retraces import other_runs, runs_with_heads
from evolvenet.tracing.verification import Grouping, Rerun, Verification, verify

RunLabels = Callable[..., LabelGraph]
"""Of the model by position, and of the modes and the fields of a `LabelRun` by name."""


@dataclass
class Searches:
    """Verified graphs of one model. No trial for shapes is run twice, and no ties are grouped twice.

    Args:
        model: the model.
        surroundings: of its runs, see `Findings`.
        heads: as of `trace`.
        labels: {run: ties} of the runs so far; extended here.
        run: with labels.
        shapes: runs it without labels.
        known: what an earlier trace of the same model on the same inputs has found.
    """

    model: nn.Module
    surroundings: tuple[str | None, tuple[bool, ...], bool, bool]
    heads: bool | None
    labels: dict[LabelRun, LabelGraph]
    run: RunLabels
    shapes: Callable[..., list[tuple[int, ...]]]
    known: Findings | None = None

    def __post_init__(self) -> None:
        self._device, self._modes, _, self._gradients = self.surroundings
        self._first: FixRounds = {None: PLACES_FIRST, True: HEADS_FIRST, False: PLACES_ALONE}[self.heads]
        same = self.known if self.known is not None and self.known.surroundings == self.surroundings else None
        self._known = defaultdict[tuple[bool, ...], Failures](dict, same.failures if same else {})
        self._failures = defaultdict[tuple[bool, ...], Failures](dict)
        self._graphs: dict[Choice, WidthGraph] = {}
        self._grouped = defaultdict[LabelRun, dict[Grouping, GroupedWidths]](dict, same.grouped if same else {})

    def best(self) -> tuple[WidthGraph, Findings]:
        """The best graph, and what another trace need not find again."""
        graph = self._searched()
        everything = self._rerun(self._modes, self.run)
        labels = self._labels(LabelRun())
        graph = with_least_sizes(Verification(self.model, labels, self._device, everything, everything), graph)
        failures = {modes: self._known[modes] | self._failures[modes] for modes in (*self._known, *self._failures)}
        return graph, Findings(self.surroundings, failures, self.labels, self._grouped)

    def _searched(self) -> WidthGraph:
        """The graph with most parameters in widths that can be resized.

        First of the labels as they are; with layers of an LSTM tied to each other, where units of each by itself may not go;
        with tensors that all heads share kept as they are, where more of the model may be resized then; the same with heads that
        can be told after the product of queries and keys, where tensors have an entry for each (decays, slopes). Where whole ones
        cannot go either, places of all heads are tried.
        """
        plain = Choice()
        graphs = {plain: self._verified(plain)}
        tied = bool(frozen_layers(graphs[plain], self._labels(plain.run)))
        if tied:
            whole = Choice(LabelRun(tied_layers=True))
            graphs[whole] = self._verified(whole)
        weight = _parameters_in_heads if self._first is HEADS_FIRST else _resizable_parameters
        own = max(graphs, key=lambda choice: weight(graphs[choice]))
        tie = own.run.tied_layers
        runs = other_runs(graphs[own], self._labels(own.run), self._first is HEADS_FIRST)
        others = [LabelRun(*run, tied_layers=tie) for run in runs]
        if self._first is not PLACES_ALONE and any(self._labels(run).one_key for run in others if not run.keeps_heads):
            # Beside the run with places of heads, which may hold more of the model.
            given = runs_with_heads(graphs[own], others[0].given)
            others = list(dict.fromkeys((*others, *(LabelRun(*run, tied_layers=tie) for run in given))))
        for run in others:
            graphs[Choice(run)] = self._verified(Choice(run))
        best = max(graphs, key=lambda choice: weight(graphs[choice]))
        if any(_may_have_places(width) for width in graphs[best].widths.values()):
            last = Choice(LabelRun(tied_layers=tied), places_last=True)
            graphs[last] = self._verified(last)
            best = max(best, last, key=lambda choice: weight(graphs[choice]))
        return graphs[best]

    def _verified(self, choice: Choice) -> WidthGraph:
        if choice not in self._graphs:
            self._graphs[choice] = self._newly_verified(choice)
        return self._graphs[choice]

    def _newly_verified(self, choice: Choice) -> WidthGraph:
        labels = self._labels(choice.run)
        again = partial(self.run, **vars(choice.run))
        needed = dict.fromkeys((needed_modes(labels), self._modes))
        runs = [self._rerun(modes, again) for modes in needed]
        rounds = (*self._first, *PLACES_LAST) if choice.places_last else self._first
        return verify(self.model, labels, self._device, runs, rounds, self._grouped[choice.run])

    def _labels(self, run: LabelRun) -> LabelGraph:
        if run not in self.labels:
            with isolated(self.model, shadows=True, device=self._device, gradients=self._gradients):
                labels = self.run(self.model, modes=self._modes, **vars(run))
            labels.differentiates = self._gradients
            self.labels[run] = labels
        return self.labels[run]

    def _rerun(self, modes: tuple[bool, ...], run: RunLabels) -> Rerun:
        return Rerun(
            partial(run, modes=modes), partial(self.shapes, modes=modes), self._failures[modes], self._known[modes]
        )


def needed_modes(label_graph: LabelGraph) -> tuple[bool, ...]:
    """The modes that a trial must run: train mode only if it uses parameters that eval mode does not."""
    return (False, True) if label_graph.modes_with_new_tensors[1:] == [True] else (False,)


def _may_have_places(width: Width) -> bool:
    """Whether a width is frozen for a reason for which places of all heads may still change together."""
    reason = width.frozen or ""
    return reason.startswith(OTHER_ORDER) or (width.mixed is not None and reason.startswith(TRIAL))


def _parameters_in_heads(graph: WidthGraph) -> tuple[int, int]:
    """Parameters of resizable widths; first those without places of queries and keys, which are multiplied with each other."""
    places = sum(width.parameters for width in graph.resizable if width.kind == ATTENTION and width.mixed is not None)
    return _resizable_parameters(graph) - places, _resizable_parameters(graph)


def _resizable_parameters(graph: WidthGraph) -> int:
    return sum(width.parameters for width in graph.resizable)
