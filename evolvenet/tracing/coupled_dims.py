"""What can be tried with widths that do not survive their trial alone: numbers in attributes, heads, partners.

Code such as `x.view(b, t, self.num_heads, self.head_dim)` holds Python numbers that labels cannot see. But it shows that
it treats the units as a grid of heads × places in a head, so units can go in slices (one place of every head) or by whole
heads; and the numbers themselves can follow, where an attribute has both the name and the value of one. Everything
proposed here is only an idea: it counts once its trial has passed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from evolvenet.graph.width_graph import Width
from evolvenet.tracing.grouping import Built
from evolvenet.tracing.labels import Ledger

PLAIN, SLICE, HEAD = "plain", "slice", "head"

_SIZES = """hidden_dim hidden_size hidden_channels embed_dim embedding_dim emb_dim d_model dim dims inner_dim all_head_size
split_size nf nx channels num_channels in_channels out_channels in_features out_features num_features features n_embd
d_inner intermediate_size ssm_state_size time_step_rank conv_dim mlp_dim width attn_dim normalized_shape qkv_dim kdim vdim
in_chs out_chs mid_chs expand_chs num_1x1_c latent_dim inplanes planes inner_size feature_dim n_state n_units output_size
input_size num_hiddens shape"""
_HEAD_SIZES = """head_dim attention_head_size key_value_proj_dim d_kv dim_head head_size dim_per_head d_head key_dim val_dim
head_width"""
_HEAD_COUNTS = "num_heads n_heads num_attention_heads nhead heads n_head num_key_value_heads"
NAMES: Mapping[str, frozenset[str]] = {
    PLAIN: frozenset(_SIZES.split()),
    SLICE: frozenset(_SIZES.split() + _HEAD_SIZES.split()),
    HEAD: frozenset(_SIZES.split() + _HEAD_COUNTS.split()),
}
"""Attribute names that hold the size of a width, by the kind of remedy. Add your own model's to the frozen sets."""


@dataclass(frozen=True)
class Proposal:
    """One idea for one or several failing widths.

    Args:
        anchors: of the widths that it would mend.
        kind: "plain", "slice" or "head": which attribute names may follow.
        edges: ids that become one unit, pairwise.
        key: equal for proposals of the same structure, which are tried together.
    """

    anchors: tuple[int, ...]
    kind: str
    edges: tuple[Tensor, Tensor]
    key: object


@dataclass(frozen=True)
class Grid:
    """A failing width's units as heads × places: `ids[h, d]` is one id of that unit."""

    width: Width
    anchor: int
    ids: Tensor


Remedy = Callable[[Built, Ledger, Sequence[str]], list[Proposal]]


def attributes_follow(built: Built, ledger: Ledger, failed: Sequence[str]) -> list[Proposal]:
    """Units may go one by one if attributes that hold their number follow."""
    grids = {grid.width.name for grid in _grids(built, ledger, failed)}
    rest = [name for name in failed if name not in grids]
    return [Proposal((built.anchors[n],), PLAIN, _none(), structure(built.graph.widths[n])) for n in rest]


def pieces_of_one_split(built: Built, ledger: Ledger) -> list[Proposal]:
    """One place goes of every equal piece that the code cuts a tensor into, where each piece is a width of its own.

    `chunk(3)` and `split(n)` cut elsewhere as soon as one piece has another size than the rest, so this needs no trial
    to show it.
    """
    names = {members: name for name, members in built.members.items()}
    found: dict[tuple[int, ...], Proposal] = {}
    for ids in ledger.grids.values():
        rows = [names.get(tuple(dict.fromkeys(row))) for row in built.component[ids.numpy()].tolist()]
        widths = [built.graph.widths[row] for row in dict.fromkeys(rows) if row is not None]
        if None in rows or len(widths) < 2 or all(width.frozen for width in widths):
            continue
        anchors = tuple(built.anchors[width.name] for width in widths)
        if len({width.size for width in widths}) == 1 and not any(set(anchors) & set(taken) for taken in found):
            found[anchors] = Proposal(anchors, PLAIN, _join_rows(ids), (len(rows), widths[0].size))
    return list(found.values())


def slices(built: Built, ledger: Ledger, failed: Sequence[str]) -> list[Proposal]:
    """One place of every head goes together."""
    return [
        Proposal((grid.anchor,), SLICE, _join_rows(grid.ids), structure(grid.width))
        for grid in _grids(built, ledger, failed)
    ]


def slices_of_one_module(built: Built, ledger: Ledger, failed: Sequence[str]) -> list[Proposal]:
    """One place of every head goes, of queries, keys and values alike: they share a head size."""
    return _by_module(built, ledger, failed, SLICE)


def heads_of_one_module(built: Built, ledger: Ledger, failed: Sequence[str]) -> list[Proposal]:
    """Whole heads go, of queries, keys and values alike: they share a number of heads."""
    return _by_module(built, ledger, failed, HEAD)


def slices_with_stream(built: Built, ledger: Ledger, failed: Sequence[str]) -> list[Proposal]:
    """One place of every head goes, and as many channels of the stream around, where both must be equally many."""
    grids = _grids(built, ledger, failed)
    plain = [name for name in failed if name not in {grid.width.name for grid in grids}]
    found = []
    for size, rows in sorted({(grid.ids.numel(), len(grid.ids)) for grid in grids}):
        chosen = [grid for grid in grids if grid.ids.numel() == size and len(grid.ids) == rows]
        streams = [name for name in plain if built.graph.widths[name].size == size]
        if not streams:
            continue
        # Any pairing of channels with slices will do, so take neighbours: their places stay together in every weight.
        views = [_ids(built, name).view(-1, rows).T for name in streams] + [grid.ids for grid in chosen]
        anchors = [built.anchors[name] for name in streams] + [grid.anchor for grid in chosen]
        found.append(
            Proposal(tuple(anchors), SLICE, _join([_join_rows(v) for v in views], [v[0] for v in views]), size)
        )
    return found


REMEDIES: tuple[Remedy, ...] = (
    attributes_follow,
    slices_with_stream,
    slices,
    slices_of_one_module,
    heads_of_one_module,
)
"""In the order in which they are tried. A stream that no attribute mends and that is as wide as the heads together most
likely hangs with them, and finding that out first saves many trials; of the rest the finest come first."""


def patches(model: nn.Module, width: Width, kind: str) -> tuple[tuple[str, str], ...]:
    """(module path, attribute) of the numbers that follow a width: right name, right value, on or above its modules."""
    totals: dict[tuple[str, int], int] = defaultdict(int)
    for tie in width.ties:
        totals[tie.tensor, tie.dim] += tie.repeat * width.size
    values = {width.size} | {total * k for total in totals.values() for k in (1, 2, 3, 4)}
    paths = dict.fromkeys(path for tie in width.ties for path in _upwards(tie.module))
    others = {path: _other_lengths(model, path, totals) for path in paths}
    return tuple(
        (path, name)
        for path in paths
        for name, value in vars(model.get_submodule(path)).items()
        if name in NAMES[kind] and number_in(value) in values - others[path] and number_in(value) > 1
    )


def number_in(value: object) -> int:
    """The number that an attribute holds, `8` or `(8, 1, 1)`; 0 if it holds anything else."""
    if type(value) is int:
        return value
    longer = [entry for entry in value if entry != 1] if isinstance(value, tuple) else []
    return longer[0] if len(longer) == 1 and type(longer[0]) is int else 0


def _other_lengths(model: nn.Module, path: str, totals: Mapping[tuple[str, int], int]) -> set[int]:
    """Lengths of a module's own axes that the width does not fill, unless it fills another of that length."""
    filled, other = set(), set()
    for name, tensor in model.get_submodule(path).named_parameters(path, recurse=False):
        for dim, length in enumerate(tensor.shape):
            (filled if totals.get((name, dim)) == length else other).add(length)
    return other - filled


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _grids(built: Built, ledger: Ledger, failed: Sequence[str]) -> list[Grid]:
    """The grid of every failing width that the model's code has laid out as one, each unit once."""
    by_first: dict[int, list[Tensor]] = defaultdict(list)
    for ids in ledger.grids.values():
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


def _by_module(built: Built, ledger: Ledger, failed: Sequence[str], kind: str) -> list[Proposal]:
    together: dict[tuple[str, int], list[Grid]] = defaultdict(list)
    for grid in _grids(built, ledger, failed):
        together[_block(grid.width), len(grid.ids)].append(grid)
    found = []
    for (_, rows), grids in together.items():
        views = [grid.ids.T if kind == HEAD else grid.ids for grid in grids]
        if len({view.shape[1] for view in views}) > 1:
            continue
        edges = _join([_join_rows(view) for view in views], [view[0] for view in views])
        key = (rows, tuple(structure(grid.width) for grid in grids))
        found.append(Proposal(tuple(grid.anchor for grid in grids), kind, edges, key))
    return found


def _block(width: Width) -> str:
    """Path around the module of a width's first producer: where a fused projection and separate ones meet."""
    first = (width.producers or width.ties)[0].module
    return first if any(tie.module == first and tie.start for tie in width.ties) else first.rpartition(".")[0]


def _join_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Edges that make every column of `[rows, columns]` one unit."""
    return ids.reshape(-1), ids[:1].expand_as(ids).reshape(-1)


def _join(edges: Sequence[tuple[Tensor, Tensor]], firsts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All edges, and those that make the equally long `firsts` one."""
    across = [(row, firsts[0]) for row in firsts[1:]]
    ones, twos = zip(*edges, *across, strict=True)
    return torch.cat(ones), torch.cat(twos)


def _none() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)


def _ids(built: Built, name: str) -> Tensor:
    """One id of every unit of a width, in order."""
    _, first = np.unique(built.component, return_index=True)
    return torch.from_numpy(first[list(built.members[name])])


def structure(width: Width) -> tuple[object, ...]:
    """What a width looks like apart from where it stands: equal ones pass or fail their trials alike."""
    shows = {(".".join(tie.tensor.split(".")[-2:]), tie.dim, tie.role, tie.repeat) for tie in width.ties}
    return width.size, tuple(sorted(shows))
