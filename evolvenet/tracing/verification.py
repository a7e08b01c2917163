"""Verification of a traced graph: every width is resized in trials on shadows of the model, and frozen if one fails.

A trial shrinks some widths by one unit, grows others by one and runs the model again. It fails if the model raises, if an
output has another shape than before, or if units are tied in another way than the graph predicts: a slice at a
hard-coded index may change which units it selects without changing a shape. For widths that fail, the candidate fixes
of `coupled_dims` are tried in turn; widths that none of them fixes are frozen, with the failure as reason.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from evolvenet.execution.isolation import isolated
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph, Widths
from evolvenet.surgery.resize_model import compile_surgery, install
from evolvenet.tracing.coupled_dims import (
    FIX_STRATEGIES,
    HEAD,
    SLICE,
    CandidateFix,
    attributes_to_update,
    pieces_of_one_split,
    structure,
)
from evolvenet.tracing.grouping import GroupedWidths, build_graph
from evolvenet.tracing.labels import LabelGraph

Item = TypeVar("Item")
PACKAGE = Path(__file__).parents[1]
"""The folder of EvolveNet's own code."""


@dataclass(frozen=True)
class Rerun:
    """Functions that run a resized model again.

    Args:
        labels: with labels; returns the ties of its units.
        shapes: without labels; returns the shapes of its outputs, several times as fast.
    """

    labels: Callable[[nn.Module], LabelGraph]
    shapes: Callable[[nn.Module], list[tuple[int, ...]]]


def verify(model: nn.Module, label_graph: LabelGraph, device: str | None, runs: Sequence[Rerun]) -> WidthGraph:
    """The graph of a traced model in which every width that is not frozen has passed its trials.

    Args:
        model: the traced model.
        label_graph: the ties of its units.
        device: of the shadows, "meta" or None for copies.
        runs: how to run the model again, the fastest way first. The last one runs everything; if it fails where the
            others passed, the verification is repeated with it alone.
    """
    for search_with_labels in (False, True):
        verification = Verification(model, label_graph, device, runs[0], runs[-1], search_with_labels)
        built, at_once, failed = _with_fixes(verification)
        names = [width.name for width in built.graph.resizable]
        # Whatever was tried before, all widths together, resized both ways and run with labels, must pass.
        if at_once or verification.try_all(built, names) is None:
            return built.graph
        if not failed:
            break
    if len(runs) > 1:
        return verify(model, label_graph, device, runs[-1:])
    return _frozen(built.graph, verification.failures(built, names))


def _with_fixes(verification: Verification) -> tuple[GroupedWidths, bool, bool]:
    """The graph after trials with and without candidate fixes; widths that fail all of them are frozen.

    Returns:
        The graph, whether it passed without any fix, and whether any width failed.
    """
    built = verification.build([])
    accepted = pieces_of_one_split(built, verification.label_graph)
    built = verification.build(accepted) if accepted else built
    names = [width.name for width in built.graph.resizable]
    if verification.try_all(built, names) is None:
        return built, True, False
    failed = verification.failures(built, names)
    reasons = {built.anchors[name]: reason for name, reason in failed.items()}
    for strategy in FIX_STRATEGIES:
        if not reasons:
            break
        names = [name for name, anchor in built.anchors.items() if anchor in reasons]
        working = verification.accept(accepted, strategy(built, verification.label_graph, names))
        if working:
            accepted += working
            built = verification.build(accepted)
            for fix in working:
                for anchor in fix.anchors:
                    reasons.pop(anchor, None)
    graph = _frozen(built.graph, {name: reasons[a] for name, a in built.anchors.items() if a in reasons})
    return replace(built, graph=graph), False, bool(failed)


def _frozen(graph: WidthGraph, reasons: Mapping[str, str]) -> WidthGraph:
    widths = {
        name: replace(width, frozen=reasons[name], patches=()) if name in reasons else width
        for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths))


@dataclass
class Verification:
    """Trials of one model.

    Args:
        model: the model, replaced by shadows in every trial.
        label_graph: the ties of its units.
        device: of the shadows.
        rerun: how to run it again, the fastest way.
        full_rerun: how to run all of it again, including parts that run in train mode only.
        search_with_labels: whether the search for failing widths also uses runs with labels.
        trials: number of trials so far.
    """

    model: nn.Module
    label_graph: LabelGraph
    device: str | None
    rerun: Rerun
    full_rerun: Rerun
    search_with_labels: bool = True
    trials: int = field(default=0)

    def build(self, accepted: Sequence[CandidateFix]) -> GroupedWidths:
        """The graph with the units tied and the attributes updated as the accepted fixes say."""
        edges: list[tuple[Tensor, Tensor]] = [fix.edges for fix in accepted if len(fix.edges[0])]
        built = build_graph(self.model, replace(self.label_graph, edges=[*self.label_graph.edges, *edges]))
        kinds = {min(fix.anchors): fix.kind for fix in accepted}
        widths = {
            name: replace(width, patches=attributes_to_update(self.model, width, kinds[built.anchors[name]]))
            if built.anchors[name] in kinds
            else width
            for name, width in built.graph.widths.items()
        }
        joined = frozenset(name for name, a in built.anchors.items() if kinds.get(a) in (SLICE, HEAD))
        return replace(built, graph=replace(built.graph, widths=Widths(widths)), joined=joined)

    def accept(self, accepted: Sequence[CandidateFix], candidates: Sequence[CandidateFix]) -> list[CandidateFix]:
        """The candidates that pass their trial, on top of the fixes accepted before."""

        def attempt(chosen: Sequence[CandidateFix], with_labels: bool) -> str | None:
            built = self.build([*accepted, *chosen])
            anchors = {min(fix.anchors) for fix in chosen}
            names = [name for name, anchor in built.anchors.items() if anchor in anchors]
            if any(built.graph.widths[name].frozen for name in names):
                return "ties units that cannot be tied"
            return self.trial(built, names, with_labels=with_labels)

        failed = self._failing(_classes(candidates, lambda fix: (fix.key, fix.kind)), attempt)
        return [fix for k, fix in enumerate(candidates) if k not in failed]

    def try_all(self, built: GroupedWidths, names: Sequence[str]) -> str | None:
        """All widths resized together, both ways, one of them in the full run; the failure, or None."""
        everything = replace(self, rerun=self.full_rerun)
        return everything.trial(built, names, (0,)) or self.trial(built, names, (1,))

    def failures(self, built: GroupedWidths, names: Sequence[str]) -> dict[str, str]:
        """{width that fails: reason}; widths of equal structure are tried together."""
        if self.trial(built, names) is None:
            return {}
        classes = _classes(names, lambda name: structure(built.graph.widths[name]))
        failed = self._failing(classes, lambda chosen, with_labels: self.trial(built, chosen, with_labels=with_labels))
        # All together they fail: if not by a shape, then by their ties.
        failed = failed or _search(classes, lambda chosen: self.trial(built, chosen))
        return {names[k]: reason for k, reason in failed.items()}

    def _failing(
        self, classes: Sequence[Sequence[tuple[int, Item]]], trial: Callable[[Sequence[Item], bool], str | None]
    ) -> dict[int, str]:
        """{number of an item that fails: reason}: by a search without labels, then one with labels among the others."""
        failed = _search(classes, lambda chosen: trial(chosen, False))
        if not self.search_with_labels:
            return failed
        left = [kept for members in classes if (kept := [entry for entry in members if entry[0] not in failed])]
        return {**failed, **_search(left, lambda chosen: trial(chosen, True))}

    def trial(
        self, built: GroupedWidths, names: Sequence[str], phases: Sequence[int] = (0, 1), with_labels: bool = True
    ) -> str | None:
        """Shrink every second width and grow the others, then the reverse; the failure, or None.

        Args:
            built: the graph.
            names: of the widths to resize.
            phases: 0 shrinks the first, third, … width; 1 the second, fourth, ….
            with_labels: whether ties are compared too, not only the shapes of the outputs.
        """
        if not names:
            return None
        graph = built.graph
        for phase in phases:
            maps = {name: _one_step(graph, name, (k + phase) % 2 == 0) for k, name in enumerate(names)}
            self.trials += 1
            reason = _trial_failure(self, graph, maps, built.joined, with_labels)
            if reason is not None:
                return reason
        return None


def _classes(items: Sequence[Item], key: Callable[[Item], object]) -> list[list[tuple[int, Item]]]:
    found: dict[object, list[tuple[int, Item]]] = {}
    for number, item in enumerate(items):
        found.setdefault(key(item), []).append((number, item))
    return list(found.values())


def _search(
    classes: Sequence[Sequence[tuple[int, Item]]], trial: Callable[[Sequence[Item]], str | None]
) -> dict[int, str]:
    """{number of an item that fails: reason}, by bisection over classes, then within a class that fails.

    If the first member of a class fails alone, the whole class is taken to fail. Parts that only fail together are added
    one by one. Parts that pass may still fail together: the caller has to try that.
    """
    items = [entry for members in classes for entry in members]
    reason = trial([item for _, item in items]) if items else None
    if reason is None:
        return {}
    if len(classes) == 1:
        if len(items) == 1 or trial([items[0][1]]) is not None:
            return {number: reason for number, _ in items}
        return _search([[entry] for entry in items], trial)
    half = len(classes) // 2
    failed = {**_search(classes[:half], trial), **_search(classes[half:], trial)}
    if failed:
        return failed
    passed: list[Item] = []
    for members in classes:
        chosen = [item for _, item in members]
        reason = trial([*passed, *chosen])
        if reason is None:
            passed += chosen
        else:
            failed.update({number: reason for number, _ in members})
    return failed


def _one_step(graph: WidthGraph, name: str, down: bool) -> IndexMap:
    width = graph.widths[name]
    if not down or width.size - 1 < max(width.smallest, 2):
        # An axis of size 1 has no labels, so the ties of a width of that size could not be compared.
        return IndexMap.grow(width.size, 1)
    return IndexMap.keep([unit for unit in range(width.size) if unit != width.size // 2], width.size)


def _trial_failure(
    verification: Verification, graph: WidthGraph, maps: dict[str, IndexMap], joined: frozenset[str], with_labels: bool
) -> str | None:
    try:
        own = verification.label_graph.differentiates
        with isolated(verification.model, shadows=True, device=verification.device, gradients=own):
            surgery = compile_surgery(verification.model, graph, maps)
            install(verification.model, surgery)
            rerun = (
                verification.rerun.labels(verification.model)
                if with_labels
                else verification.rerun.shapes(verification.model)
            )
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything on a shape it does not expect
        return f"a trial raised {type(error).__name__}: {_first_line(error)}{_source_line(error)}"
    outputs = rerun.output_shapes if isinstance(rerun, LabelGraph) else rerun
    if outputs != verification.label_graph.output_shapes:
        return f"a trial changed the output's shape from {verification.label_graph.output_shapes} to {outputs}"
    if not isinstance(rerun, LabelGraph):
        return None
    predicted = _predicted(surgery.graph, rerun)
    axis = _disagreement(predicted, rerun) or _split_heads(surgery.graph, predicted, rerun, joined)
    if axis is not None:
        return f"a trial tied its units differently on {axis}"
    part = _partly_changed(surgery.graph, predicted, rerun)
    return f"in a trial {part}" if part else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _source_line(error: Exception) -> str:
    """The line of the model's code that raised: the innermost one outside torch and EvolveNet."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if "torch" not in file.parts and PACKAGE not in file.parents:
            return f" at {'/'.join(file.parts[-2:])}:{frame.lineno}: {frame.line}"
    return ""


def _disagreement(predicted: np.ndarray, rerun: LabelGraph) -> str | None:
    """The first axis on which the ties of the new run differ from those that the graph predicts, or None.

    One unit of the graph may be several in the new run, as fixes tie units that no op ties; never the reverse.
    """
    known = predicted[:, 0] >= 0
    found, units = rerun.components()[: len(predicted)][known], predicted[known]
    if not len(found):
        return None
    code = units[:, 0] * (units[:, 1].max() + 1) + units[:, 1]
    expected = np.full(found.max() + 1, -1)
    # Backwards, so that the first occurrence of a component counts.
    expected[found[::-1]] = code[::-1]
    wrong = np.flatnonzero(known)[expected[found] != code]
    if not len(wrong):
        return None
    axis = next(axis for axis in rerun.axes if axis.start <= wrong[0] < axis.start + axis.size)
    return f"axis {axis.dim} of {axis.tensor}"


def _split_heads(graph: WidthGraph, predicted: np.ndarray, rerun: LabelGraph, joined: frozenset[str]) -> str | None:
    """The failure if the new run lays units out in grids that cut through units tied by a fix, or None.

    Units tied by a fix are whole rows or whole columns of grids of heads × places. If they no longer are, the boundaries
    between heads have moved, which changes no shape.
    """
    numbers = {k for k, name in enumerate(graph.widths) if name in joined}
    for ids in rerun.grids.values():
        grid = predicted[ids.numpy()]
        if int(ids.min()) < 0 or len(np.unique(grid[..., 0])) > 1 or int(grid[0, 0, 0]) not in numbers:
            continue
        units = grid[..., 1]
        if not ((units == units[:1]).all() or (units == units[:, :1]).all()):
            return "heads whose boundaries have moved"
    return None


def _partly_changed(graph: WidthGraph, predicted: np.ndarray, rerun: LabelGraph) -> str | None:
    """The op that in the new run changes some units of a width and not the others, or None.

    A slice at a number in the code, `h[:, :8].tanh()`, ties no units and changes no shape, but selects other units.
    """
    sizes = [0 if width.frozen is not None else width.size for width in graph.widths.values()]
    for ids, reason in rerun.changed.items():
        units = np.unique(predicted[np.frombuffer(ids, np.int64)], axis=0)
        numbers, counts = np.unique(units[units[:, 0] >= 0, 0], return_counts=True)
        if any(count < sizes[number] for number, count in zip(numbers, counts, strict=True)):
            return reason
    return None


def _predicted(graph: WidthGraph, rerun: LabelGraph) -> np.ndarray:
    """(number of the width, unit) that the graph predicts for every id of the new run, −1 for none; `[units, 2]`."""
    found = np.full((rerun.units, 2), -1)
    numbers = {name: k for k, name in enumerate(graph.widths)}
    for axis in rerun.axes:
        at = axis.start
        for part in graph.layouts.get(axis.tensor, {}).get(axis.dim, ()):
            if part.width is not None:
                found[at : at + part.length, 0] = numbers[part.width]
                found[at : at + part.length, 1] = np.repeat(np.arange(part.length // part.repeat), part.repeat)
            at += part.length
    return found
