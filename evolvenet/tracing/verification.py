"""Verification of a traced graph: every width is resized in trials on shadows of the model, and frozen if one fails.

A trial shrinks some widths by one unit, grows others by a few and runs the model again. It fails if the model raises, if an
output has another shape than before, or if units are tied in another way than the graph predicts: a slice at a
hard-coded index may change which units it selects without changing a shape. For widths that fail, the candidate fixes
of `coupled_dims` are tried in turn; widths that none of them fixes are frozen, with the failure as reason.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

from torch import Tensor, nn

from evolvenet.errors import is_out_of_memory
from evolvenet.execution.isolation import isolated
from evolvenet.graph.coverage import TRIAL
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import Tie, Width, WidthGraph, Widths
from evolvenet.surgery.numbers import numbers_in
from evolvenet.surgery.resize_model import compile_surgery, install
from evolvenet.tracing.bisection import Item, bisect, classes_of
from evolvenet.tracing.coupled_dims import (
    PLACES_FIRST,
    CandidateFix,
    FixRounds,
    pieces_of_one_split,
    shuffled_grids,
    structure,
)
from evolvenet.tracing.grouping import GroupedWidths, build_graph
from evolvenet.tracing.groups import groups_without_width, numbers_of_one_key
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.numbers_of_widths import (
    HEAD,
    SLICE,
    attributes_to_update,
    fewest_passing,
    is_known,
    number_key,
    possible_keys,
)
from evolvenet.tracing.predicted_ties import difference
from evolvenet.tracing.reasons import first_line, frozen_for, source_line

MOST_NUMBERS = 8
"""So many numbers of other names than those of sizes are tried for a width, in up to 46 trials of which most fail early."""
MOST_TRIALS = 400
"""After so many different trials of a model, which may take a minute, no more numbers of other names are tried."""
Edges = tuple[Tensor, Tensor]
"""Two equally long tensors of ids that are tied element by element."""
Grouping = tuple[tuple[bytes, bytes], ...]
"""What is in the edges of fixes."""
Change = tuple[tuple[Tie, ...], tuple[tuple[str, str], ...], IndexMap]
"""What a trial changes for one width: the ties of its units, the numbers that follow it, and the map of its units."""


@dataclass(frozen=True)
class Rerun:
    """Functions that run a resized model again.

    Args:
        labels: with labels; returns the ties of its units.
        shapes: without labels; returns the shapes of its outputs, several times as fast.
        failures: of the trials without labels so far, by what was changed in the model; None for one that passed.
        known: of those of an earlier trace. One counts as a trial of this trace where it is asked for.
    """

    labels: Callable[[nn.Module], LabelGraph]
    shapes: Callable[[nn.Module], list[tuple[int, ...]]]
    failures: dict[frozenset[Change], str | None] = field(default_factory=dict)
    known: Mapping[frozenset[Change], str | None] = field(default_factory=dict[frozenset[Change], "str | None"])


def verify(
    model: nn.Module,
    label_graph: LabelGraph,
    device: str | None,
    runs: Sequence[Rerun],
    rounds: FixRounds = PLACES_FIRST,
    grouped: dict[Grouping, GroupedWidths] | None = None,
) -> WidthGraph:
    """The graph of a traced model in which every width that is not frozen has passed its trials.

    Args:
        model: the traced model.
        label_graph: the ties of its units.
        device: of the shadows, "meta" or None for copies.
        runs: how to run the model again, the fastest way first. The last one runs everything; if it fails where the
            others passed, the verification is repeated with it alone.
        rounds: of strategies for fixes, in the order in which they are tried.
        grouped: what earlier verifications with these ties have grouped; extended here.
    """
    grouped = {} if grouped is None else grouped
    for search_with_labels in (False, True):
        verification = Verification(model, label_graph, device, runs[0], runs[-1], search_with_labels, grouped=grouped)
        built, passed, failed = _with_fixes(verification, rounds)
        names = [width.name for width in built.graph.resizable]
        # Whatever was tried before, all widths together, resized both ways and run with labels, must pass.
        if passed or verification.try_all(built, names) is None:
            return built.graph
        if not failed:
            break
    if len(runs) > 1:
        return verify(model, label_graph, device, runs[-1:], rounds, grouped)
    return frozen_for(built.graph, verification.failures(built, names))


def _with_fixes(verification: Verification, rounds: FixRounds) -> tuple[GroupedWidths, bool, bool]:
    """The graph after trials with and without candidate fixes; widths that fail all of them are frozen.

    Returns:
        The graph, whether all its widths have passed together, and whether any width failed.
    """
    built = verification.build([])
    groups = groups_without_width(built, verification.label_graph)
    accepted = [*pieces_of_one_split(built, verification.label_graph), *groups]
    built = verification.build(accepted) if accepted else built
    names = [width.name for width in built.graph.resizable]
    shuffled = shuffled_grids(built, verification.label_graph)
    if not shuffled and verification.try_all(built, names) is None:
        return (*verification.needed(accepted, names), False) if groups else (built, True, False)
    failed = verification.failures(built, names)
    reasons = {built.anchors[name]: reason for name, reason in (*failed.items(), *shuffled.items())}
    searches = (Verification.accept, Verification.with_any_numbers)
    for search, strategy in (pair for strategies in rounds for pair in product(searches, strategies)):
        if not reasons:
            break
        names = [name for name, anchor in built.anchors.items() if anchor in reasons]
        candidates = strategy(built, verification.label_graph, names)
        working = search(verification, accepted, candidates)
        if working:
            accepted += working
            built = verification.build(accepted)
            for fix in working:
                for anchor in fix.anchors:
                    reasons.pop(anchor, None)
    passed = False
    if accepted:
        names = [width.name for width in built.graph.resizable if built.anchors[width.name] not in reasons]
        built, passed = verification.needed(accepted, names)
    graph = frozen_for(built.graph, {name: reasons[a] for name, a in built.anchors.items() if a in reasons})
    return replace(built, graph=graph), passed, bool(failed)


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
        unneeded: keys of numbers that have the value and name of a size and are none, see `number_key`.
        grouped: the widths for the ties of fixes so far.
        numbers: what `attributes_to_update` has found for the widths of fixes so far.
        numbers_in: the function of that name, for each module once: a configuration has a hundred, in every module.
    """

    model: nn.Module
    label_graph: LabelGraph
    device: str | None
    rerun: Rerun
    full_rerun: Rerun
    search_with_labels: bool = True
    unneeded: frozenset[str] = frozenset()
    grouped: dict[Grouping, GroupedWidths] = field(default_factory=dict)
    numbers: dict[Any, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    numbers_in: Callable[[nn.Module], Sequence[tuple[str, int]]] = field(
        default_factory=lambda: cache(lambda module: tuple(numbers_in(module)))
    )

    def build(self, accepted: Sequence[CandidateFix]) -> GroupedWidths:
        """The graph with the units tied and the attributes updated as the accepted fixes say."""
        built = self._grouped([fix.edges for fix in accepted if len(fix.edges[0])])
        fixes = {min(fix.anchors): fix for fix in accepted}
        own, widths = numbers_of_one_key(self.model, built, self.label_graph), {}
        for name, width in built.graph.widths.items():
            fix = fixes.get(built.anchors[name])
            numbers = dict.fromkeys((*own.get(name, ()), *(() if fix is None else self._patches(width, fix))))
            widths[name] = replace(width, patches=tuple(numbers)) if numbers else width
        joined = frozenset(name for name, a in built.anchors.items() if a in fixes and fixes[a].kind in (SLICE, HEAD))
        return replace(built, graph=replace(built.graph, widths=Widths(widths)), joined=joined)

    def _grouped(self, edges: list[Edges]) -> GroupedWidths:
        """The graph with these units tied. It is kept: most trials differ in attributes alone."""
        key = tuple((one.numpy().tobytes(), two.numpy().tobytes()) for one, two in edges)
        if key not in self.grouped:
            tied = replace(self.label_graph, edges=[*self.label_graph.edges, *edges])
            self.grouped[key] = build_graph(self.model, tied)
        return self.grouped[key]

    def _patches(self, width: Width, fix: CandidateFix) -> tuple[tuple[str, str], ...]:
        # The same for a width of the same tensors, whatever else is tied.
        how = (fix.kind, fix.numbers, fix.counts)
        key = (width.ties, width.size, *how)
        if key not in self.numbers:
            self.numbers[key] = attributes_to_update(self.model, width, *how, self.numbers_in)
        return tuple(
            (path, name)
            for path, name in self.numbers[key]
            if number_key(self.model.get_submodule(path), name) not in self.unneeded
        )

    def accept(self, accepted: Sequence[CandidateFix], candidates: Sequence[CandidateFix]) -> list[CandidateFix]:
        """The candidates that pass their trial, on top of the fixes accepted before."""
        failed = self._failing(
            classes_of(candidates, lambda fix: (fix.key, fix.kind, fix.numbers)),
            lambda chosen, with_labels: self.attempt(accepted, chosen, with_labels),
        )
        return [fix for k, fix in enumerate(candidates) if k not in failed]

    def attempt(
        self, accepted: Sequence[CandidateFix], chosen: Sequence[CandidateFix], with_labels: bool
    ) -> str | None:
        """The failure of the widths of chosen fixes, on top of those accepted before, or None."""
        built = self.build([*accepted, *chosen])
        anchors = {min(fix.anchors) for fix in chosen}
        names = [name for name, anchor in built.anchors.items() if anchor in anchors]
        if any(built.graph.widths[name].frozen for name in names):
            return "ties units that cannot be tied"
        return self.trial(built, names, with_labels=with_labels)

    def with_any_numbers(
        self, accepted: Sequence[CandidateFix], candidates: Sequence[CandidateFix]
    ) -> list[CandidateFix]:
        """The candidates that pass with other numbers than those with the names of sizes, each with the fewest that do.

        Of each structure one candidate is searched, and the others take the same numbers. Those with the most parameters
        come first, until the model has had `MOST_TRIALS`.
        """
        found: list[CandidateFix] = []
        before = self.build(accepted)
        sizes = {before.anchors[name]: width.parameters for name, width in before.graph.widths.items()}
        classes = classes_of(candidates, lambda fix: (fix.key, fix.kind))
        # A width that an accepted fix has tied to another one has no anchor of its own any more.
        for members in sorted(classes, key=lambda each: -sum(sizes.get(a, 0) for _, fix in each for a in fix.anchors)):
            if len(self.rerun.failures) >= MOST_TRIALS:
                break
            first = members[0][1]
            built = self.build([*accepted, first])
            width = next((w for n, w in built.graph.widths.items() if built.anchors[n] == min(first.anchors)), None)
            if width is None or width.frozen is not None:
                continue
            keys = possible_keys(self.model, width, first.counts)[:MOST_NUMBERS]
            if set(self._patches(width, replace(first, numbers=frozenset(keys)))) <= set(width.patches):
                continue

            def failure(chosen: frozenset[str], first: CandidateFix = first) -> str | None:
                fix = replace(first, numbers=chosen)
                return self.attempt(accepted, [fix], False) or self.attempt(accepted, [fix], True)

            numbers = fewest_passing(keys, failure)
            if numbers is not None:
                found += [replace(fix, numbers=numbers) for _, fix in members]
        return self.accept(accepted, found)

    def needed(self, accepted: Sequence[CandidateFix], names: Sequence[str]) -> tuple[GroupedWidths, bool]:
        """The graph without numbers that its widths do not need, and whether all have passed together without them."""
        patches = {patch for width in self.build(accepted).graph.widths.values() for patch in width.patches}
        modules = [(self.model.get_submodule(path), name) for path, name in patches]
        own = numbers_of_one_key(self.model, self.build(accepted), self.label_graph).values()
        fixed = {number_key(self.model.get_submodule(path), name) for each in own for path, name in each}
        used = sorted({number_key(module, name) for module, name in modules if not is_known(module)} - fixed)
        for trial in (lambda built: self.trial(built, names, (1,), False), lambda built: self.try_all(built, names)):
            self.unneeded = frozenset()
            for key in used:
                self.unneeded |= {key}
                if trial(self.build(accepted)) is not None:
                    self.unneeded -= {key}
            # Shapes tell most of them in a fraction of the time.
            if self.unneeded and self.try_all(self.build(accepted), names) is None:
                return self.build(accepted), True
            if not self.unneeded:
                break
        self.unneeded = frozenset()
        return self.build(accepted), False

    def try_all(self, built: GroupedWidths, names: Sequence[str]) -> str | None:
        """All widths resized together, both ways, one of them in the full run; the failure, or None."""
        everything = replace(self, rerun=self.full_rerun)
        return everything.trial(built, names, (0,)) or self.trial(built, names, (1,))

    def failures(self, built: GroupedWidths, names: Sequence[str]) -> dict[str, str]:
        """{width that fails: reason}; widths of equal structure are tried together."""
        if self.trial(built, names) is None:
            return {}
        classes = classes_of(names, lambda name: structure(built.graph.widths[name]))
        failed = self._failing(classes, lambda chosen, with_labels: self.trial(built, chosen, with_labels=with_labels))
        # All together they fail: if not by a shape, then by their ties.
        failed = failed or bisect(classes, lambda chosen: self.trial(built, chosen))
        return {names[k]: reason for k, reason in failed.items()}

    def _failing(
        self, classes: Sequence[Sequence[tuple[int, Item]]], trial: Callable[[Sequence[Item], bool], str | None]
    ) -> dict[int, str]:
        """{number of an item that fails: reason}: by a search without labels, then one with labels among the others."""
        failed = bisect(classes, lambda chosen: trial(chosen, False))
        if not self.search_with_labels:
            return failed
        left = [kept for members in classes if (kept := [entry for entry in members if entry[0] not in failed])]
        return {**failed, **bisect(left, lambda chosen: trial(chosen, True))}

    def trial(
        self, built: GroupedWidths, names: Sequence[str], phases: Sequence[int] = (0, 1), with_labels: bool = True
    ) -> str | None:
        """Shrink every second width and grow the others, by unequal amounts, then the reverse; the failure, or None.

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
            maps = {name: _step(graph, name, k, (k + phase) % 2 == 0) for k, name in enumerate(names)}
            reason = self.failure(built.graph, maps, with_labels=with_labels, joined=built.joined)
            if reason is not None:
                return reason
        return None

    def failure(
        self,
        graph: WidthGraph,
        maps: Mapping[str, IndexMap],
        *,
        with_labels: bool = False,
        joined: frozenset[str] = frozenset(),
    ) -> str | None:
        """The failure of one trial, or None. One without labels that was run before is not run again.

        Args:
            graph: the graph.
            maps: of the widths to resize.
            with_labels: whether ties are compared too, not only the shapes of the outputs.
            joined: names of the widths whose units are tied by a fix.
        """
        key = frozenset((graph.widths[name].ties, graph.widths[name].patches, map_) for name, map_ in maps.items())
        if with_labels:
            return _trial_failure(self, graph, maps, joined, with_labels)
        failures, known = self.rerun.failures, self.rerun.known
        if key not in failures:
            failures[key] = known[key] if key in known else _trial_failure(self, graph, maps, joined, with_labels)
        return failures[key]


def _step(graph: WidthGraph, name: str, number: int, down: bool) -> IndexMap:
    """One unit less, or two more (one more for every second pair): two widths of a fixed sum change such that it changes.

    Where sizes must be multiples of a number, as many times that number.
    """
    width = graph.widths[name]
    each, middle = width.multiple, width.size // 2
    if not down or width.size - each < max(width.smallest, 2):
        # An axis of size 1 has no labels, so the ties of a width of that size could not be compared.
        return IndexMap.grow(width.size, (2 - number // 2 % 2) * each)
    kept = IndexMap.keep([unit for unit in range(width.size) if not middle <= unit < middle + each], width.size)
    return kept.turned(width.parts)


def _trial_failure(
    verification: Verification,
    graph: WidthGraph,
    maps: Mapping[str, IndexMap],
    joined: frozenset[str],
    with_labels: bool,
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
    except Exception as error:
        # The model's own code may raise anything on a shape it does not expect.
        if is_out_of_memory(error):
            raise
        line = source_line(traceback.extract_tb(error.__traceback__))
        return f"{TRIAL}raised {type(error).__name__}: {first_line(error)}{line}"
    outputs = rerun.output_shapes if isinstance(rerun, LabelGraph) else rerun
    if outputs != verification.label_graph.output_shapes:
        return f"a trial changed the output's shape from {verification.label_graph.output_shapes} to {outputs}"
    if not isinstance(rerun, LabelGraph):
        return None
    return difference(surgery.graph, rerun, joined)
