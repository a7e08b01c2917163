"""Every width is tried, up and down, on shadows of the model before it is offered.

A trial resizes, runs the model again under labels and compares: the outputs must have their old shapes, and what is tied
to what must be what the graph says, since a slice at a hard-coded place can pass by its shapes alone. Widths that fail
are tried again with each of the `remedies`; what then still fails is frozen, with what its trial raised and where.
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
from evolvenet.tracing.coupled_dims import HEAD, REMEDIES, SLICE, Proposal, patches, pieces_of_one_split, structure
from evolvenet.tracing.grouping import Built, build_graph
from evolvenet.tracing.labels import Ledger

Item = TypeVar("Item")
PACKAGE = Path(__file__).parents[1]
"""The folder of all of EvolveNet's own code."""


@dataclass(frozen=True)
class Rerun:
    """How to run a shadowed model again.

    Args:
        labels: under labels, for all that a trace finds.
        shapes: for the shapes of its outputs alone, several times as quick.
    """

    labels: Callable[[nn.Module], Ledger]
    shapes: Callable[[nn.Module], list[tuple[int, ...]]]


def prove(model: nn.Module, ledger: Ledger, device: str | None, runs: Sequence[Rerun]) -> WidthGraph:
    """The graph of a traced model in which every width that is not frozen has survived its trials.

    Args:
        model: the traced model.
        ledger: what its run has shown.
        device: where the shadows live, "meta" or None for copies.
        runs: what runs the shadowed model under labels, the quickest way first. The last one, which runs all of it, has
            the last word: if it fails where the others did not, all is proved anew with it alone.
    """
    for careful in (False, True):
        proof = Proof(model, ledger, device, runs[0], runs[-1], careful)
        built, at_once, failed = _mended(proof)
        names = [width.name for width in built.graph.resizable]
        # All of them together, up and down, under labels: this is what proves them, whatever was looked at before.
        if at_once or proof.whole(built, names) is None:
            return built.graph
        if not failed:
            break
    if len(runs) > 1:
        return prove(model, ledger, device, runs[-1:])
    return _frozen(built.graph, proof.failures(built, names))


def _mended(proof: Proof) -> tuple[Built, bool, bool]:
    """The graph after trials and remedies, with what nothing helps frozen.

    Returns:
        The graph, whether all of it survived at once, and whether any width failed.
    """
    built = proof.build([])
    accepted = pieces_of_one_split(built, proof.ledger)
    built = proof.build(accepted) if accepted else built
    names = [width.name for width in built.graph.resizable]
    if proof.whole(built, names) is None:
        return built, True, False
    failed = proof.failures(built, names)
    reasons = {built.anchors[name]: reason for name, reason in failed.items()}
    for remedy in REMEDIES:
        if not reasons:
            break
        names = [name for name, anchor in built.anchors.items() if anchor in reasons]
        helped = proof.accept(accepted, remedy(built, proof.ledger, names))
        if helped:
            accepted += helped
            built = proof.build(accepted)
            for proposal in helped:
                for anchor in proposal.anchors:
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
class Proof:
    """Trials of one model.

    Args:
        model: the model, replaced by shadows in every trial.
        ledger: what its run has shown.
        device: where its shadows live.
        rerun: how to run it again, the quickest way.
        all_of_it: how to run all of it again, the parts too that run in train mode alone.
        careful: whether every part of a search is run under labels, not for its shapes alone.
    """

    model: nn.Module
    ledger: Ledger
    device: str | None
    rerun: Rerun
    all_of_it: Rerun
    careful: bool = True
    trials: int = field(default=0)

    def build(self, accepted: Sequence[Proposal]) -> Built:
        """The graph with the units that the proposals join, and the attributes that follow."""
        edges: list[tuple[Tensor, Tensor]] = [p.edges for p in accepted if len(p.edges[0])]
        built = build_graph(self.model, replace(self.ledger, edges=[*self.ledger.edges, *edges]))
        kinds = {min(p.anchors): p.kind for p in accepted}
        widths = {
            name: replace(width, patches=patches(self.model, width, kinds[built.anchors[name]]))
            if built.anchors[name] in kinds
            else width
            for name, width in built.graph.widths.items()
        }
        joined = frozenset(name for name, a in built.anchors.items() if kinds.get(a) in (SLICE, HEAD))
        return replace(built, graph=replace(built.graph, widths=Widths(widths)), joined=joined)

    def accept(self, accepted: Sequence[Proposal], proposals: Sequence[Proposal]) -> list[Proposal]:
        """The proposals that work."""

        def attempt(chosen: Sequence[Proposal], thorough: bool) -> str | None:
            built = self.build([*accepted, *chosen])
            anchors = {min(p.anchors) for p in chosen}
            names = [name for name, anchor in built.anchors.items() if anchor in anchors]
            if any(built.graph.widths[name].frozen for name in names):
                return "joins what cannot be joined"
            return self.trial(built, names, thorough=thorough)

        failed = self._sieve(_classes(proposals, lambda proposal: (proposal.key, proposal.kind)), attempt)
        return [proposal for k, proposal in enumerate(proposals) if k not in failed]

    def whole(self, built: Built, names: Sequence[str]) -> str | None:
        """All widths together, up and down, and once in everything that the model runs; None if all is well."""
        everything = replace(self, rerun=self.all_of_it)
        return everything.trial(built, names, (0,)) or self.trial(built, names, (1,))

    def failures(self, built: Built, names: Sequence[str]) -> dict[str, str]:
        """Names of the widths that fail, with the reason; alike widths are tried together."""
        if self.trial(built, names) is None:
            return {}
        classes = _classes(names, lambda name: structure(built.graph.widths[name]))
        failed = self._sieve(classes, lambda chosen, thorough: self.trial(built, chosen, thorough=thorough))
        # Something is wrong: where no shape shows it, the ties do.
        failed = failed or _search(classes, lambda chosen: self.trial(built, chosen))
        return {names[k]: reason for k, reason in failed.items()}

    def _sieve(
        self, classes: Sequence[Sequence[tuple[int, Item]]], trial: Callable[[Sequence[Item], bool], str | None]
    ) -> dict[int, str]:
        """Numbers of the items that fail: by shapes alone first, which is quick; then what is left, under labels."""
        failed = _search(classes, lambda chosen: trial(chosen, False))
        if not self.careful:
            return failed
        left = [kept for members in classes if (kept := [entry for entry in members if entry[0] not in failed])]
        return {**failed, **_search(left, lambda chosen: trial(chosen, True))}

    def trial(
        self, built: Built, names: Sequence[str], turns: Sequence[int] = (0, 1), thorough: bool = True
    ) -> str | None:
        """Every second one a step down while the others go a step up, then the reverse; None if all is well.

        One that is not thorough looks at the shapes alone.
        """
        if not names:
            return None
        graph = built.graph
        for turn in turns:
            maps = {name: _nudge(graph, name, (k + turn) % 2 == 0) for k, name in enumerate(names)}
            self.trials += 1
            reason = _failure(self, graph, maps, built.joined, thorough)
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
    """Numbers of the items that fail, by bisection: first over classes, then within a class that fails.

    A class of which the first member fails as well is given up whole: its members are alike. Whether all that passed
    in parts also passes together is for the caller to try; parts that only fail together are added one by one.
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


def _nudge(graph: WidthGraph, name: str, down: bool) -> IndexMap:
    width = graph.widths[name]
    if not down or width.size - 1 < max(width.smallest, 2):
        # A size-1 axis carries no labels, so a trial that ends there could not be compared.
        return IndexMap.grow(width.size, 1)
    return IndexMap.keep([unit for unit in range(width.size) if unit != width.size // 2], width.size)


def _failure(
    proof: Proof, graph: WidthGraph, maps: dict[str, IndexMap], joined: frozenset[str], thorough: bool
) -> str | None:
    try:
        with isolated(proof.model, shadows=True, device=proof.device):
            surgery = compile_surgery(proof.model, graph, maps)
            install(proof.model, surgery)
            again = proof.rerun.labels(proof.model) if thorough else proof.rerun.shapes(proof.model)
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything on a shape it does not expect
        return f"a trial raised {type(error).__name__}: {_first_line(error)}{_source_line(error)}"
    outputs = again.outputs if isinstance(again, Ledger) else again
    if outputs != proof.ledger.outputs:
        return f"a trial changed the output's shape from {proof.ledger.outputs} to {outputs}"
    if not isinstance(again, Ledger):
        return None
    predicted = _predicted(surgery.graph, again)
    place = _disagreement(predicted, again) or _torn_heads(surgery.graph, predicted, again, joined)
    if place is not None:
        return f"a trial tied its units differently on {place}"
    part = _partly_treated(surgery.graph, predicted, again)
    return f"in a trial {part}" if part else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _source_line(error: Exception) -> str:
    """The line of the model's code that raised: the innermost one outside torch and this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if "torch" not in file.parts and PACKAGE not in file.parents:
            return f" at {'/'.join(file.parts[-2:])}:{frame.lineno}: {frame.line}"
    return ""


def _disagreement(predicted: np.ndarray, again: Ledger) -> str | None:
    """Where the re-traced ties differ from what the graph predicts, or None.

    What the graph holds for one unit may be several in the re-trace (units were joined on purpose), never the reverse.
    """
    known = predicted[:, 0] >= 0
    found, units = again.components()[: len(predicted)][known], predicted[known]
    if not len(found):
        return None
    code = units[:, 0] * (units[:, 1].max() + 1) + units[:, 1]
    owner = np.full(found.max() + 1, -1)
    # Backwards, so that the first one that shows a component owns it.
    owner[found[::-1]] = code[::-1]
    wrong = np.flatnonzero(known)[owner[found] != code]
    if not len(wrong):
        return None
    axis = next(axis for axis in again.axes if axis.start <= wrong[0] < axis.start + axis.size)
    return f"axis {axis.dim} of {axis.tensor}"


def _torn_heads(graph: WidthGraph, predicted: np.ndarray, again: Ledger, joined: frozenset[str]) -> str | None:
    """Where the re-traced code sees rows × columns that cut through joined units, or None.

    Joined units are whole rows or whole columns of what the code treats as heads × places; if they are no longer, the
    boundaries of the heads have shifted, which no shape shows.
    """
    numbers = {k for k, name in enumerate(graph.widths) if name in joined}
    for ids in again.grids.values():
        grid = predicted[ids.numpy()]
        if int(ids.min()) < 0 or len(np.unique(grid[..., 0])) > 1 or int(grid[0, 0, 0]) not in numbers:
            continue
        units = grid[..., 1]
        if not ((units == units[:1]).all() or (units == units[:, :1]).all()):
            return "heads whose boundaries have moved"
    return None


def _partly_treated(graph: WidthGraph, predicted: np.ndarray, again: Ledger) -> str | None:
    """What the re-traced code did to some units of a width and not to the others, or None.

    A cut at a number in the code, `h[:, :8].tanh()`, ties nothing and may fit by its shape, but falls between other
    units than before.
    """
    sizes = [0 if width.frozen is not None else width.size for width in graph.widths.values()]
    for ids, reason in again.treated.items():
        units = np.unique(predicted[np.frombuffer(ids, np.int64)], axis=0)
        numbers, counts = np.unique(units[units[:, 0] >= 0, 0], return_counts=True)
        if any(count < sizes[number] for number, count in zip(numbers, counts, strict=True)):
            return reason
    return None


def _predicted(graph: WidthGraph, again: Ledger) -> np.ndarray:
    """(number of the width, unit) that the graph foresees for every id of a re-trace, −1 where none; `[units, 2]`."""
    found = np.full((again.units, 2), -1)
    numbers = {name: k for k, name in enumerate(graph.widths)}
    for axis in again.axes:
        at = axis.start
        for part in graph.layouts.get(axis.tensor, {}).get(axis.dim, ()):
            if part.width is not None:
                found[at : at + part.length, 0] = numbers[part.width]
                found[at : at + part.length, 1] = np.repeat(np.arange(part.length // part.repeat), part.repeat)
            at += part.length
    return found
