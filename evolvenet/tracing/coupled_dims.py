"""Candidate fixes for widths that fail their trial alone: units to tie together and attributes to update.

Code such as `x.view(b, t, self.num_heads, self.head_dim)` has sizes in Python numbers, which have no labels. But the view
lays the units out as a grid of heads × places in a head, so two kinds of fix are possible: tying the units of one place
in all heads ("slice") or those of one head ("head"), and updating attributes whose name and value are those of a size. A
fix is accepted only after its trial has passed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evolvenet.graph.coverage import OTHER_ORDER, tensor_in_other_order
from evolvenet.graph.naming import holder_of
from evolvenet.graph.width_graph import Width
from evolvenet.tracing.connected import connected
from evolvenet.tracing.grouping import GroupedWidths
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.numbers_of_widths import HEAD, PLAIN, SLICE


@dataclass(frozen=True)
class CandidateFix:
    """One candidate fix for one or several failing widths.

    Args:
        anchors: of the widths that it fixes.
        kind: "plain", "slice" or "head": which attribute names may be updated, see `ATTRIBUTE_NAMES`.
        edges: two equally long tensors of ids that are tied element by element.
        key: equal for fixes of the same structure, which are tried together.
        numbers: keys of the attributes to update, see `number_key`; None for those with the names of its kind.
        counts: numbers of heads beside that of the units, where each has several.
    """

    anchors: tuple[int, ...]
    kind: str
    edges: tuple[Tensor, Tensor]
    key: object
    numbers: frozenset[str] | None = None
    counts: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Grid:
    """The units of a failing width as heads × places: `ids[h, d]` is one id of place d in head h."""

    width: Width
    anchor: int
    ids: Tensor


FixStrategy = Callable[[GroupedWidths, LabelGraph, Sequence[str]], list[CandidateFix]]
FixRounds = Sequence[Sequence[FixStrategy]]
"""Strategies in the order in which they are tried: all of a round with names of sizes, then with any numbers."""


def update_attributes(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Update the attributes that hold the number of units; no units are tied."""
    grids = {grid.width.name for grid in _grids(built, label_graph, failed)}
    rest = [name for name in failed if name not in grids]
    return [CandidateFix((built.anchors[n],), PLAIN, _no_edges(), structure(built.graph.widths[n])) for n in rest]


def pieces_of_one_split(built: GroupedWidths, label_graph: LabelGraph) -> list[CandidateFix]:
    """Tie corresponding units of equal pieces that the code splits a tensor into, if each piece is a width of its own.

    `chunk(3)` and `split(n)` split at other indices as soon as one piece has another size than the rest, so these fixes
    are applied without a trial of the untied widths.
    """
    return _tied_pieces(built, label_graph.grids.values())


def pieces_of_given_sizes(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie corresponding units of equal pieces of `split((c, c))`, where one number is the size of several pieces."""
    anchors = {built.anchors[name] for name in failed}
    return [fix for fix in _tied_pieces(built, label_graph.sized_pieces.values()) if set(fix.anchors) <= anchors]


def _tied_pieces(built: GroupedWidths, grids: Iterable[Tensor]) -> list[CandidateFix]:
    names = {members: name for name, members in built.members.items()}
    found: dict[tuple[int, ...], CandidateFix] = {}
    for ids in grids:
        rows = [names.get(tuple(dict.fromkeys(row))) for row in built.component[ids.numpy()].tolist()]
        widths = [built.graph.widths[row] for row in dict.fromkeys(rows) if row is not None]
        if None in rows or len(widths) < 2 or all(width.frozen for width in widths):
            continue
        anchors = tuple(built.anchors[width.name] for width in widths)
        if len({width.size for width in widths}) == 1 and not any(set(anchors) & set(taken) for taken in found):
            found[anchors] = CandidateFix(anchors, PLAIN, _tie_columns(ids), (len(rows), widths[0].size))
    return list(found.values())


def shuffled_grids(built: GroupedWidths, label_graph: LabelGraph) -> dict[str, str]:
    """{width: reason} of widths whose units the code has laid out as a grid and goes through in another order later.

    With the units of a row or column tied, the order may be the same everywhere, as in `nn.ChannelShuffle`.
    """
    frozen = {name: width.frozen for name, width in built.graph.widths.items() if width.frozen is not None}
    stuck = [name for name, reason in frozen.items() if reason.startswith(OTHER_ORDER)]
    return {grid.width.name: frozen[grid.width.name] for grid in _grids(built, label_graph, stuck)}


def slices(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one place in all heads."""
    return [
        CandidateFix((grid.anchor,), SLICE, _tie_columns(grid.ids), structure(grid.width))
        for grid in _grids(built, label_graph, failed)
    ]


def slices_of_one_module(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one place in all heads of queries, keys and values, which have the same head size."""
    return _by_module(built, label_graph, failed, SLICE)


def heads_of_one_module(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one head of queries, keys and values, which have the same number of heads.

    Heads of queries that share a key and value head are tied to it already, as they are multiplied with its keys.
    """
    return _by_module(built, label_graph, failed, HEAD)


def places_with_values(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the places of a head of values to those of queries and keys, or to pairs of these that an embedding turns.

    Where the code has one number for the places of all: for one head of keys and values, which cannot go, or where places are
    asked for. Any pairing is valid: the places of values are in no order.
    """
    grids = {grid.width.name: grid for grid in _grids(built, label_graph, failed)}
    widths = [built.graph.widths[name] for name in failed]
    found = []
    for turned in (width for width in widths if width.mixed is not None):
        modules = {path for tie in turned.producers for path in (tie.module, holder_of(tie.module))}
        beside = [w for w in widths if w is not turned and w.mixed is None and _enclosing_module(w) in modules]
        views = [grids[w.name].ids if w.name in grids else _ids(built, w.name)[None] for w in beside]
        views = [view.reshape(-1, turned.size) for view in views if view.shape[1] % turned.size == 0]
        if not views or len(views) < len(beside):
            continue
        firsts = [_ids(built, turned.name), *(view[0] for view in views)]
        edges = _tie_all([_tie_columns(view) for view in views], firsts)
        anchors = (built.anchors[turned.name], *(built.anchors[width.name] for width in beside))
        found.append(CandidateFix(anchors, SLICE, edges, structure(turned)))
    return found


def slices_with_stream(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one place in all heads to as many channels of a residual stream that is as wide as all heads."""
    grids = _grids(built, label_graph, failed)
    plain = [name for name in failed if name not in {grid.width.name for grid in grids}]
    found = []
    for size, rows in sorted({(grid.ids.numel(), len(grid.ids)) for grid in grids}):
        chosen = [grid for grid in grids if grid.ids.numel() == size and len(grid.ids) == rows]
        streams = [name for name in plain if built.graph.widths[name].size == size]
        if not streams:
            continue
        # Any pairing of channels with slices is valid; neighbours stay contiguous in every weight.
        views = [_ids(built, name).view(-1, rows).T for name in streams] + [grid.ids for grid in chosen]
        anchors = [built.anchors[name] for name in streams] + [grid.anchor for grid in chosen]
        found.append(
            CandidateFix(tuple(anchors), SLICE, _tie_all([_tie_columns(v) for v in views], [v[0] for v in views]), size)
        )
    return found


def heads_with_stream(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one head, and as many channels of a residual stream that is as wide as all heads together.

    For code that gives the values the shape of the stream where norms or decays of each head have tied its places (RetNet).
    """
    heads = _heads(built, label_graph, failed)
    found = []
    for rows, places in sorted({(len(ids), ids.shape[1]) for ids in heads.values()}):
        chosen = [name for name, ids in heads.items() if ids.shape == (rows, places)]
        streams = [name for name in failed if name not in heads and built.graph.widths[name].size == rows * places]
        if not streams:
            continue
        # Any pairing of channels with heads is valid; neighbours stay contiguous in every weight.
        views = [_ids(built, name).view(rows, -1).T for name in streams] + [heads[name].T for name in chosen]
        edges = _tie_all([_tie_columns(view) for view in views], [view[0] for view in views])
        found.append(CandidateFix(tuple(built.anchors[name] for name in (*streams, *chosen)), HEAD, edges, rows))
    return found


def heads_of_grids(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one head, of which places may belong to different widths.

    A rotary embedding turns some places of a head and lets others pass (Phi, GPT-NeoX); queries, keys and values of a head
    may lie beside each other in one weight. Of the grids of a module, those with as many rows as the largest count.
    """
    return _of_grids(built, label_graph, failed, HEAD)


def groups_of_grids(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one group, where the code lays them out as groups × heads × places.

    In one weight, the heads of queries of a group may lie before its key and value (Falcon's new decoder).
    """
    return _of_grids(built, label_graph, failed, HEAD, in_groups=True)


def slices_of_grids(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie the units of one place in all heads, of queries, keys and values alike, that may belong to different widths.

    They may lie beside each other in one weight, whose number of heads stays because slopes depend on it (BLOOM). Of the grids
    of a module, those of the shape of the largest count.
    """
    return _of_grids(built, label_graph, failed, SLICE)


def places_in_proportion(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[CandidateFix]:
    """Tie pairs of places that an embedding turns to those places of the same head that go with them.

    Code that turns a part of each head (Phi, GPT-NeoX) has one number for all places of a head and one for those that turn.
    Both stay in proportion if a unit has as many pairs as any other one, and as many of the places that are not turned: where
    16 of 64 places turn, 8 units of one pair and 6 other places.
    """
    return _of_grids(built, label_graph, failed, SLICE, in_proportion=True)


def _of_grids(
    built: GroupedWidths,
    label_graph: LabelGraph,
    failed: Sequence[str],
    kind: str,
    *,
    in_proportion: bool = False,
    in_groups: bool = False,
) -> list[CandidateFix]:
    by_module: dict[str, list[Tensor]] = defaultdict(list)
    blocks = label_graph.blocks.values() if in_groups else ()
    for ids in (*blocks, *label_graph.grids.values()):
        tensor = label_graph.tensor_of(ids)
        if tensor is not None and min(ids.shape) > 1 and bool((ids >= 0).all()):
            by_module[holder_of(tensor.rpartition(".")[0])].append(ids)
    _, first = np.unique(built.component, return_index=True)
    found = []
    for module, grids in by_module.items():
        largest = max(grids, key=lambda ids: ids.numel()).shape
        if kind == HEAD:
            views = [ids.T for ids in grids if len(ids) == largest[0]]
        else:
            views = [ids for ids in grids if ids.shape == largest]
        units = {int(unit) for view in views for unit in np.unique(built.component[view.numpy()])}
        stuck = [name for name in failed if units & set(built.members[name])]
        together = _proportional(built, views) if in_proportion else torch.arange(views[0].shape[1])
        if stuck and together is not None:
            firsts = [*(view[0] for view in views), views[0][0, together]]
            edges = _tie_all([_tie_columns(view) for view in views], firsts)
            anchors = (min(int(first[unit]) for unit in units), *(built.anchors[name] for name in stuck))
            key = (largest[0], tuple(view.shape for view in views), module.rpartition(".")[2])
            counts = frozenset(len(ids) for ids in grids if in_groups and len(ids) % largest[0] == 0)
            found.append(CandidateFix(anchors, kind, edges, key, counts=counts))
    return found


def _proportional(built: GroupedWidths, views: Sequence[Tensor]) -> Tensor | None:
    """For each place of a head the first one of its unit, if pairs of places and others are units in proportion; else None."""
    count = views[0].shape[1]
    ties: list[tuple[Tensor, Tensor]] = []
    for view in views:
        _, first, place = np.unique(built.component[view[0].numpy()], return_index=True, return_inverse=True)
        ties.append((torch.arange(count), torch.from_numpy(first[place])))
    parts = connected(count, ties)
    by_size: dict[int, list[np.ndarray]] = defaultdict(list)
    for part in dict.fromkeys(parts.tolist()):
        places = np.flatnonzero(parts == part)
        by_size[len(places)].append(places)
    units = math.gcd(*(len(found) for found in by_size.values()))
    if len(by_size) < 2 or units < 2:
        return None
    together = np.empty(count, np.int64)
    for found in by_size.values():
        for number, places in enumerate(found):
            together[places] = number // (len(found) // units)
    _, first = np.unique(together, return_index=True)
    return torch.from_numpy(first[together])


PLACES_FIRST: FixRounds = (
    (
        *(update_attributes, pieces_of_given_sizes, slices_with_stream, slices, slices_of_one_module),
        *(heads_of_one_module, heads_with_stream, heads_of_grids, groups_of_grids),
    ),
)
"""In the order in which they are tried. A residual stream that fails and is as wide as all heads together most likely has
to have their size, and trying that first saves many trials; of the others the finest come first."""
HEADS_FIRST: FixRounds = (
    (update_attributes, pieces_of_given_sizes, heads_of_one_module, heads_of_grids, groups_of_grids),
    (slices_with_stream, slices, slices_of_one_module, heads_with_stream),
)
PLACES_ALONE: FixRounds = (
    (update_attributes, pieces_of_given_sizes, slices, slices_of_one_module),
    (slices_with_stream, places_with_values, places_in_proportion),
    (slices_of_grids, heads_of_one_module, heads_with_stream, heads_of_grids, groups_of_grids),
)
"""Heads go only where their places cannot."""
PLACES_LAST: FixRounds = ((slices_of_grids, places_with_values, places_in_proportion),)
"""Places of all heads, and of all layers where these share a rotary embedding, are tried only where whole heads cannot go."""


def _grids(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> list[Grid]:
    """The grids of the failing widths that the model's code has laid out as one, with each unit once."""
    by_first: dict[int, list[Tensor]] = defaultdict(list)
    for ids in label_graph.grids.values():
        if bool((ids >= 0).all()) and min(ids.shape) > 1:
            by_first[int(built.component[int(ids[0, 0])])].append(ids)
    found = []
    for name in failed:
        members = np.asarray(built.members[name])
        for ids in by_first[int(members[0])]:
            if np.array_equal(built.component[ids.reshape(-1).numpy()], members):
                found.append(Grid(built.graph.widths[name], built.anchors[name], ids))
                break
    return found


def _heads(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str]) -> dict[str, Tensor]:
    """{width: its units as heads × places} of failing widths that the code lays out so, also where ties make a head one unit."""
    found = {grid.width.name: grid.ids for grid in _grids(built, label_graph, failed)}
    names = {built.members[name]: name for name in failed if name not in found}
    for ids in label_graph.grids.values():
        units = built.component[ids.numpy()]
        name = names.get(tuple(units[:, 0].tolist()))
        if name is not None and (units == units[:, :1]).all():
            found.setdefault(name, ids)
    return found


def _by_module(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str], kind: str) -> list[CandidateFix]:
    by_module: dict[tuple[str, int], list[Grid]] = defaultdict(list)
    heads = _heads(built, label_graph, failed)
    tied = [Grid(built.graph.widths[name], built.anchors[name], ids) for name, ids in heads.items()]
    for grid in tied if kind == HEAD else _grids(built, label_graph, failed):
        by_module[_enclosing_module(grid.width), len(grid.ids)].append(grid)
    gridded = {grid.width.name for grids in by_module.values() for grid in grids}
    others = [built.graph.widths[name] for name in failed if name not in gridded]
    found = []
    for (module, rows), grids in by_module.items():
        views = [grid.ids.T if kind == HEAD else grid.ids for grid in grids]
        if len({view.shape[1] for view in views}) > 1:
            continue
        # Widths whose units are whole heads by now: rotary embeddings have tied the places of each.
        whole = [w for w in others if kind == HEAD and w.size == rows and _enclosing_module(w) == module]
        firsts = [*(view[0] for view in views), *(_ids(built, width.name) for width in whole)]
        edges = _tie_all([_tie_columns(view) for view in views], firsts)
        key = (rows, tuple(structure(width) for width in (*(grid.width for grid in grids), *whole)))
        anchors = (*(grid.anchor for grid in grids), *(built.anchors[width.name] for width in whole))
        found.append(CandidateFix(anchors, kind, edges, key))
    return found


def _enclosing_module(width: Width) -> str:
    """Path of the module that holds a width's projections: its first producer if it is a fused one, else the parent."""
    first = (width.producers or width.ties)[0].module
    # In another order on its axis, units may stand after others in a weight that is no fused one.
    shuffled = tensor_in_other_order(width.frozen)
    in_order = shuffled is None or (bool(width.producers) and shuffled.rpartition(".")[0] != first)
    fused = in_order and any(tie.module == first and tie.start for tie in width.ties)
    return first if fused else holder_of(first)


def _tie_columns(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Edges that tie each column of `[rows, columns]` together."""
    return ids.reshape(-1), ids[:1].expand_as(ids).reshape(-1)


def _tie_all(edges: Sequence[tuple[Tensor, Tensor]], firsts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All edges, and those that tie the equally long `firsts` to each other."""
    across = [(row, firsts[0]) for row in firsts[1:]]
    ones, twos = zip(*edges, *across, strict=True)
    return torch.cat(ones), torch.cat(twos)


def _no_edges() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)


def _ids(built: GroupedWidths, name: str) -> Tensor:
    """One id of every unit of a width, in order."""
    _, first = np.unique(built.component, return_index=True)
    return torch.from_numpy(first[list(built.members[name])])


def structure(width: Width) -> tuple[object, ...]:
    """The size and ties of a width without module paths: widths of equal structure pass or fail trials alike."""
    ties = {(".".join(tie.tensor.split(".")[-2:]), tie.dim, tie.role, tie.repeat) for tie in width.ties}
    return width.size, tuple(sorted(ties))
