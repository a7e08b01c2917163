"""Candidate fixes for widths that fail their trial alone: units to tie together and attributes to update.

Code such as `x.view(b, t, self.num_heads, self.head_dim)` has sizes in Python numbers, which have no labels. But the view
lays the units out as a grid of heads × places in a head, so two kinds of fix are possible: tying the units of one place
in all heads ("slice") or those of one head ("head"), and updating attributes whose name and value are those of a size. A
fix is accepted only after its trial has passed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from evolvenet.graph.coverage import OTHER_ORDER
from evolvenet.graph.width_graph import Width
from evolvenet.surgery.numbers import attribute_of, numbers_in
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
"""Attribute names that hold the size of a width, by the kind of fix: those are tried first, then those of any name."""
ANY_SIZE = frozenset().union(*ATTRIBUTE_NAMES.values())
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
        numbers: keys of the attributes to update, see `number_key`; None for those with the names of its kind.
    """

    anchors: tuple[int, ...]
    kind: str
    edges: tuple[Tensor, Tensor]
    key: object
    numbers: frozenset[str] | None = None


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
    pieces_of_given_sizes,
    slices_with_stream,
    slices,
    slices_of_one_module,
    heads_of_one_module,
)
"""In the order in which they are tried. A residual stream that fails and is as wide as all heads together most likely has
to have their size, and trying that first saves many trials; of the others the finest come first."""


def attributes_to_update(
    model: nn.Module, width: Width, kind: str, keys: frozenset[str] | None = None
) -> tuple[tuple[str, str], ...]:
    """(module path, name) of the numbers that may hold a width's size, see `evolvenet.surgery.numbers`.

    They have a value of which it is a part: the number of units, or of places on an axis, or up to four times that. They
    lie on modules with tensors of the width, on those above, or on modules without tensors beside these.

    Args:
        model: the model.
        width: the width.
        kind: "plain", "slice" or "head": whose attributes of `ATTRIBUTE_NAMES` are taken.
        keys: take the numbers of these keys instead (see `number_key`), whatever they are called.
    """
    totals: dict[tuple[str, int], int] = defaultdict(int)
    for tie in width.ties:
        totals[tie.tensor, tie.dim] += tie.repeat * width.size
    values = {width.size} | {total * k for total in totals.values() for k in (1, 2, 3, 4)}
    found: list[tuple[str, str]] = []
    for path in _paths(model, width):
        module = model.get_submodule(path)
        others = _other_lengths(model, path, totals) if keys is None else set()
        for name, value in numbers_in(module):
            chosen = (
                name_of_size(module, name) in ATTRIBUTE_NAMES[kind]
                if keys is None
                else number_key(module, name) in keys
            )
            if chosen and value > 1 and value in values - others:
                found.append((path, name))
    return tuple(found)


def possible_keys(model: nn.Module, width: Width) -> list[str]:
    """Keys of all numbers that may hold a width's size, whatever they are called; those with a name of a size come first.

    The numbers of torch's layers with weights (`kernel_size`, `in_features`) are left out: which of them change is known.
    """
    everything = frozenset(
        number_key(module, name)
        for path in _paths(model, width)
        if not is_known(module := model.get_submodule(path))
        for name, _ in numbers_in(module)
    )
    found: dict[str, bool] = {}
    for path, name in attributes_to_update(model, width, PLAIN, everything):
        module = model.get_submodule(path)
        if not is_known(module):
            found[number_key(module, name)] = name_of_size(module, name) not in ANY_SIZE
    return sorted(found, key=lambda key: found[key])


def fewest_passing(keys: Sequence[str], passes: Callable[[frozenset[str]], bool]) -> frozenset[str] | None:
    """A smallest set of numbers with which a width passes its trials, None if none is found.

    All are tried at once, then each alone, each pair, and all but one. None of those that are left can be left out.

    >>> fewest_passing(["c", "splits[0]", "num_steps"], lambda keys: "c" in keys and "num_steps" not in keys)
    frozenset({'c'})
    """
    everything = frozenset(keys)
    small = [frozenset(chosen) for size in (1, 2) for chosen in combinations(keys, size)]
    fewer = [everything - {key} for key in keys]
    found = next((chosen for chosen in dict.fromkeys([everything, *small, *fewer]) if chosen and passes(chosen)), None)
    for key in keys if found is not None and len(found) > 1 else ():
        if found is not None and key in found and len(found) > 1 and passes(found - {key}):
            found -= {key}
    return found


def number_key(module: nn.Module, name: str) -> str:
    """What the same number has in common in all modules of a type.

    >>> number_key(nn.LayerNorm(8), "normalized_shape[0]")
    'LayerNorm.normalized_shape[0]'
    """
    return f"{type(module).__qualname__}.{name}"


def name_of_size(module: nn.Module, name: str) -> str:
    """The attribute of which a number is the size, "" if it is not: `8` or the 8 in `(8, 1, 1)`, of a shape in `(8, 4, 4)`.

    >>> norm = nn.LayerNorm((8, 4))
    >>> name_of_size(norm, "normalized_shape[0]"), name_of_size(norm, "normalized_shape[1]"), name_of_size(norm, "eps")
    ('', '', 'eps')
    """
    attribute = attribute_of(name)
    if name == attribute:
        return name
    value = getattr(module, attribute)
    if not isinstance(value, tuple):
        return ""
    longer = [place for place, entry in enumerate(value) if entry != 1]
    single = len(longer) == 1 or attribute in SHAPES
    return attribute if single and name == f"{attribute}[{longer[0]}]" else ""


def is_known(module: nn.Module) -> bool:
    """Whether a module is a layer of torch with weights: which of its numbers change is known by its type."""
    return type(module).__module__.startswith("torch.nn.") and _holds_tensors(module)


def _holds_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _paths(model: nn.Module, width: Width) -> list[str]:
    """Modules with tensors of a width, those above, and those without tensors beside them, with all that they hold."""
    above = dict.fromkeys(path for tie in width.ties for path in _ancestors(tie.module))
    beside = [
        ".".join(filter(None, (path, name, below)))
        for path in above
        for name, child in model.get_submodule(path).named_children()
        if not _holds_tensors(child)
        for below, _ in child.named_modules()
    ]
    return [*above, *sorted(beside)]


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
