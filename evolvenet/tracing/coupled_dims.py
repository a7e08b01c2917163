"""Candidate fixes for widths that fail their trial alone: units to tie together and attributes to update.

Code such as `x.view(b, t, self.num_heads, self.head_dim)` has sizes in Python numbers, which have no labels. But the view
lays the units out as a grid of heads × places in a head, so two kinds of fix are possible: tying the units of one place
in all heads ("slice") or those of one head ("head"), and updating attributes whose name and value are those of a size. A
fix is accepted only after its trial has passed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from evolvenet.graph.width_graph import Width
from evolvenet.tracing.grouping import GroupedWidths
from evolvenet.tracing.labels import LabelGraph

PLAIN, SLICE, HEAD = "plain", "slice", "head"

_SIZES = """hidden_dim hidden_size hidden_channels embed_dim embedding_dim emb_dim d_model dim dims inner_dim all_head_size
split_size nf nx channels num_channels in_channels out_channels in_features out_features num_features features n_embd
d_inner intermediate_size ssm_state_size time_step_rank conv_dim mlp_dim width attn_dim normalized_shape qkv_dim kdim vdim
in_chs out_chs mid_chs expand_chs num_1x1_c latent_dim inplanes planes inner_size feature_dim n_state n_units output_size
input_size num_hiddens shape unflattened_size"""
_HEAD_SIZES = """head_dim attention_head_size key_value_proj_dim d_kv dim_head head_size dim_per_head d_head key_dim val_dim
head_width"""
_HEAD_COUNTS = "num_heads n_heads num_attention_heads nhead heads n_head num_key_value_heads"
ATTRIBUTE_NAMES: Mapping[str, frozenset[str]] = {
    PLAIN: frozenset(_SIZES.split()),
    SLICE: frozenset(_SIZES.split() + _HEAD_SIZES.split()),
    HEAD: frozenset(_SIZES.split() + _HEAD_COUNTS.split()),
}
"""Attribute names that hold the size of a width, by the kind of fix."""
SHAPES = frozenset({"shape", "unflattened_size"})
"""Those of which the first number is the size and the others are places: channels × rows × columns."""


@dataclass(frozen=True)
class CandidateFix:
    """One candidate fix for one or several failing widths.

    Args:
        anchors: of the widths that it fixes.
        kind: "plain", "slice" or "head": which attribute names may be updated, see `ATTRIBUTE_NAMES`.
        edges: two equally long tensors of ids that are tied element by element.
        key: equal for fixes of the same structure, which are tried together.
    """

    anchors: tuple[int, ...]
    kind: str
    edges: tuple[Tensor, Tensor]
    key: object


@dataclass(frozen=True)
class Grid:
    """The units of a failing width as heads × places: `ids[h, d]` is one id of place d in head h."""

    width: Width
    anchor: int
    ids: Tensor


FixStrategy = Callable[[GroupedWidths, LabelGraph, Sequence[str]], list[CandidateFix]]


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
    names = {members: name for name, members in built.members.items()}
    found: dict[tuple[int, ...], CandidateFix] = {}
    for ids in label_graph.grids.values():
        rows = [names.get(tuple(dict.fromkeys(row))) for row in built.component[ids.numpy()].tolist()]
        widths = [built.graph.widths[row] for row in dict.fromkeys(rows) if row is not None]
        if None in rows or len(widths) < 2 or all(width.frozen for width in widths):
            continue
        anchors = tuple(built.anchors[width.name] for width in widths)
        if len({width.size for width in widths}) == 1 and not any(set(anchors) & set(taken) for taken in found):
            found[anchors] = CandidateFix(anchors, PLAIN, _tie_columns(ids), (len(rows), widths[0].size))
    return list(found.values())


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
    """Tie the units of one head of queries, keys and values, which have the same number of heads."""
    return _by_module(built, label_graph, failed, HEAD)


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


FIX_STRATEGIES: tuple[FixStrategy, ...] = (
    update_attributes,
    slices_with_stream,
    slices,
    slices_of_one_module,
    heads_of_one_module,
)
"""In the order in which they are tried. A residual stream that fails and is as wide as all heads together most likely has
to have their size, and trying that first saves many trials; of the others the finest come first."""


def attributes_to_update(model: nn.Module, width: Width, kind: str) -> tuple[tuple[str, str], ...]:
    """(module path, attribute) of all attributes with a width's size as value and a name of a size, on or above its modules.

    `nn.Unflatten`, which has no parameters, is searched beside them.
    """
    totals: dict[tuple[str, int], int] = defaultdict(int)
    for tie in width.ties:
        totals[tie.tensor, tie.dim] += tie.repeat * width.size
    values = {width.size} | {total * k for total in totals.values() for k in (1, 2, 3, 4)}
    above = dict.fromkeys(path for tie in width.ties for path in _ancestors(tie.module))
    beside = {
        ".".join(filter(None, (path, name)))
        for path in above
        for name, child in model.get_submodule(path).named_children()
        if isinstance(child, nn.Unflatten)
    }
    paths = [*above, *sorted(beside)]
    others = {path: _other_lengths(model, path, totals) for path in paths}
    return tuple(
        (path, name)
        for path in paths
        for name, value in vars(model.get_submodule(path)).items()
        if name in ATTRIBUTE_NAMES[kind] and size_in(name, value) in values - others[path] and size_in(name, value) > 1
    )


def size_in(name: str, value: object) -> int:
    """The size in an attribute's value, `8` or `(8, 1, 1)`, of a shape also `(8, 4, 4)`; 0 if it is anything else.

    >>> size_in("dim", 8), size_in("dim", (8, 4, 4)), size_in("unflattened_size", (8, 4, 4))
    (8, 0, 8)
    """
    if type(value) is int:
        return value
    longer = [entry for entry in value if entry != 1] if isinstance(value, tuple) else []
    single = len(longer) == 1 or (longer and name in SHAPES)
    return longer[0] if single and type(longer[0]) is int else 0


def _other_lengths(model: nn.Module, path: str, totals: Mapping[tuple[str, int], int]) -> set[int]:
    """Lengths of a module's axes that the width does not fill, except those of axes that it does fill."""
    filled, other = set(), set()
    for name, tensor in model.get_submodule(path).named_parameters(path, recurse=False):
        for dim, length in enumerate(tensor.shape):
            (filled if totals.get((name, dim)) == length else other).add(length)
    return other - filled


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


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


def _by_module(built: GroupedWidths, label_graph: LabelGraph, failed: Sequence[str], kind: str) -> list[CandidateFix]:
    by_module: dict[tuple[str, int], list[Grid]] = defaultdict(list)
    for grid in _grids(built, label_graph, failed):
        by_module[_enclosing_module(grid.width), len(grid.ids)].append(grid)
    found = []
    for (_, rows), grids in by_module.items():
        views = [grid.ids.T if kind == HEAD else grid.ids for grid in grids]
        if len({view.shape[1] for view in views}) > 1:
            continue
        edges = _tie_all([_tie_columns(view) for view in views], [view[0] for view in views])
        key = (rows, tuple(structure(grid.width) for grid in grids))
        found.append(CandidateFix(tuple(grid.anchor for grid in grids), kind, edges, key))
    return found


def _enclosing_module(width: Width) -> str:
    """Path of the module that holds a width's projections: its first producer if it is a fused one, else the parent."""
    first = (width.producers or width.ties)[0].module
    return first if any(tie.module == first and tie.start for tie in width.ties) else first.rpartition(".")[0]


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
