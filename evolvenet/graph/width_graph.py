"""`WidthGraph` and `Width`: the immutable result of a trace, and the graph after a change of widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evolvenet.errors import ResizeError
from evolvenet.graph.axes import CONSUMES, FOLLOWS, MASKS, PRODUCES, Segment, Tie
from evolvenet.graph.block_kinds import OTHER, coverage_by_kind
from evolvenet.graph.coverage import shares
from evolvenet.graph.exact_growth import COPY, ExactGrowth
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.map_check import check_map
from evolvenet.graph.width_graph_text import as_explanation, as_table, as_text

if TYPE_CHECKING:
    from rich.table import Table

OutputFunction = Callable[[Any], Any]
ChosenOutputs = tuple[str, ...] | OutputFunction | None


@dataclass(frozen=True)
class Width:
    """A set of units, each of which is kept or removed in all of the tensor axes where the width occurs.

    The layers and directions of one LSTM have one size, but units of their own: they are parts of one width. Each has `size`
    units, and which of them are kept may differ from part to part.

    Args:
        name: path of the first module, in execution order, that produces it.
        size: number of units.
        frozen: None, or the reason why it cannot be resized.
        parameters: number of parameters that lie in it (each weight entry counted once).
        ties: every tensor axis in which it occurs.
        mixed: None, or the op that mixes units with each other (layer norm, a mean over the units); growing then
            keeps the function only as `exact_growth` says.
        smallest: the fewest units it can have (two where the units are the groups of a grouped layer).
        patches: (module path, name) of Python numbers of the model's own code that are proportional to its size ("num_heads",
            "config.hidden_size", see `evolvenet.surgery.numbers`); a resize rescales them.
        step: policies propose multiples of it alone, see `rounded`.
        multiple: every size is a multiple of it, which an op of the model needs (`_grouped_mm` reads rows of 16 bytes).
        rank_of: path of the factorized layer of which it is a rank: nothing but linear maps touches its units, so that any
            invertible change of their basis keeps the function. None for other widths.
        exact_growth: how new units of a width that norms mix keep the function; None if they do not, or nothing mixes it.
        kind: of block, as the trace has seen it: one of `evolvenet.graph.block_kinds.KINDS`.
    """

    name: str
    size: int
    frozen: str | None = None
    parameters: int = 0
    ties: tuple[Tie, ...] = ()
    mixed: str | None = None
    smallest: int = 1
    patches: tuple[tuple[str, str], ...] = ()
    step: int = 1
    multiple: int = 1
    rank_of: str | None = None
    exact_growth: ExactGrowth | None = None
    kind: str = field(default=OTHER, compare=False)

    @property
    def can_grow(self) -> bool:
        """Whether new units can keep the function."""
        return self.mixed is None or self.exact_growth is not None

    def step_to(self, size: int) -> int:
        """The number of which a policy may propose multiples from there up."""
        return self.size if size > self.size and self.exact_growth == ExactGrowth(COPY) else self.step

    def rounded(self, size: int) -> int:
        """The size that a policy may propose instead of this one: the next multiple of `step` from there up.

        Between the present size, which need be no multiple, and the multiple above it: the present size. So pruning removes
        no more than was meant, and growth reaches the next multiple at least. Where new units can only be copies of all others:
        of the present size.

        >>> width = Width("fc1", 50, step=8)
        >>> [width.rounded(size) for size in (41, 48, 49, 50, 51, 60)]
        [48, 48, 50, 50, 56, 64]
        """
        step = self.step_to(size)
        above = -(-max(size, self.smallest) // step) * step
        return self.size if size <= self.size <= above else above

    @property
    def parts(self) -> int:
        """Number of parts, 1 for most widths."""
        return 1 + max((tie.part for tie in self.ties), default=0)

    def part(self, number: int) -> Width:
        """The width as if one of its parts were all of it."""
        return replace(self, ties=tuple(tie for tie in self.ties if tie.part == number)) if self.parts > 1 else self

    @property
    def producers(self) -> tuple[Tie, ...]:
        """The ties with role "produces"."""
        return tuple(tie for tie in self.ties if tie.role == PRODUCES)

    @property
    def consumers(self) -> tuple[Tie, ...]:
        """The ties with role "consumes"."""
        return tuple(tie for tie in self.ties if tie.role == CONSUMES)


class Widths(Mapping[str, Width]):
    """Widths by name, in execution order.

    A look-up also accepts the path of any other module that produces the width: in a residual stream,
    `widths["layer1.0.conv2"]` is `widths["conv1"]`. Iteration goes over the names alone.
    """

    def __init__(self, widths: Mapping[str, Width]) -> None:
        self._widths = dict(widths)
        self._aliases = {tie.module: name for name, width in reversed(list(widths.items())) for tie in width.producers}

    def __getitem__(self, name: str) -> Width:
        found = self._widths.get(name) or self._widths.get(self._aliases.get(name, ""))
        if found is None:
            known = ", ".join(name for name, width in self._widths.items() if width.frozen is None)
            raise ResizeError(f"No width is called {name!r}. Resizable here: {known or 'none'}.")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._widths or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)


@dataclass(frozen=True)
class WidthGraph:
    """The widths of a model, the tensor axes in which each occurs, and which of them can be resized.

    Args:
        widths: every width found, the frozen ones included.
        layouts: for each tensor name (parameters and buffers, tied names once) and axis, its segments.
        shapes: shape of each tensor in `layouts`.
        trainable: names in `layouts` that are parameters (the others are buffers).
        aliases: other names of the same tensor object (tied weights) → the name used here.
        differentiates: whether the model's own code computes gradients, so that it only runs with autograd on.
        added: names of the tensors that ops only add to their units: biases, running means.
        gates: names of the tensors that scale, gate or bound each unit by entries of its own: fixed kernels, grids of splines;
            also those whose entry of each unit says which place of another tensor is picked for it.
        outputs: paths, or a function, of those outputs of the model that count, as given to `trace`; None for all.
        notes: what the last change did differently from what was asked for, a line each: `prune` names fits that it refused.
    """

    widths: Widths
    layouts: Mapping[str, Mapping[int, tuple[Segment, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    differentiates: bool = False
    added: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()
    outputs: ChosenOutputs = None
    notes: tuple[str, ...] = ()

    @property
    def resizable(self) -> tuple[Width, ...]:
        """The widths that are not frozen, in execution order."""
        return tuple(width for width in self.widths.values() if width.frozen is None)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every resizable width."""
        return {width.name: width.size for width in self.resizable}

    @property
    def reasons(self) -> dict[str, str]:
        """Why each frozen width keeps its size."""
        return {width.name: width.frozen for width in self.widths.values() if width.frozen is not None}

    @property
    def rank_layers(self) -> dict[str, str]:
        """{rank: path of the factorized layer of which it is one}, of the resizable widths."""
        return {width.name: width.rank_of for width in self.resizable if width.rank_of is not None}

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(math.prod(self.shapes[name]) for name in self.trainable)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the parameters that falls to each width, 0 … 1, see `evolvenet.graph.coverage.shares`."""
        return shares(self)

    @property
    def coverage(self) -> float:
        """Share of the parameters that falls to resizable widths, 0 … 1.

        An entry of a weight `[hidden, stream]` counts one half if the hidden width can be resized and the stream is frozen.
        Inputs, outputs, vocabularies and kernels, which are given, are no part of this: where all other widths can be
        resized, every entry that lies in one of them counts whole.
        """
        found = self.shares
        return math.fsum(found[name] for name in self.sizes)

    @property
    def coverage_by_kind(self) -> dict[str, tuple[float, float]]:
        """{kind of block: (share of the parameters that can be removed, share that belongs to it)}, see `graph.block_kinds`."""
        return coverage_by_kind(self)

    @property
    def masks(self) -> frozenset[str]:
        """Names of the buffers that weights are multiplied with, entry by entry."""
        return frozenset(tie.tensor for width in self.widths.values() for tie in width.ties if tie.role == MASKS)

    def is_shared(self, tensor: str) -> bool:
        """Whether a tensor has several names in the model: a change for one of its uses would change the others."""
        return tensor in self.aliases or tensor in self.aliases.values()

    def check(self, maps: Mapping[str, IndexMap]) -> dict[str, IndexMap]:
        """The maps under the widths' own names, once it is clear that each can be applied.

        Raises:
            ResizeError: for an unknown or frozen width, a map made for another size, or a size that it cannot take.
        """
        checked: dict[str, IndexMap] = {}
        for given, index_map in maps.items():
            width = self.widths[given]
            check_map(width, index_map)
            if width.name in checked:
                raise ResizeError(
                    f"Width {width.name!r} was named twice ({given!r} is another name of it). Name it once."
                )
            checked[width.name] = index_map
        return checked

    def axis_maps(self, maps: Mapping[str, IndexMap]) -> dict[str, dict[int, IndexMap]]:
        """The maps of tensor axes that follow from maps of widths: {tensor: {axis: map}}, unchanged axes left out.

        Raises:
            ResizeError: as `check`.
        """
        checked = self.check(maps)
        found: dict[str, dict[int, IndexMap]] = {}
        # Most axes of a deep model are laid out alike.
        made: dict[tuple[Segment, ...], IndexMap] = {}
        for name, axes in self.layouts.items():
            for dim, segments in axes.items():
                if any(part.width in checked for part in segments):
                    if segments not in made:
                        made[segments] = IndexMap.concat([_part_map(part, checked) for part in segments])
                    found.setdefault(name, {})[dim] = made[segments]
        return found

    def resized(self, maps: Mapping[str, IndexMap]) -> WidthGraph:
        """The graph of the model after `maps`, without another trace.

        Raises:
            ResizeError: as `check`.
        """
        return self.with_sizes({name: index_map.new_size for name, index_map in self.check(maps).items()})

    def with_sizes(self, given: Mapping[str, int]) -> WidthGraph:
        """The graph of the same model with other sizes, also of widths that are frozen by now; the others stay.

        Args:
            given: {width: size}, by the widths' own names.
        """
        sizes = {name: given.get(name, width.size) for name, width in self.widths.items()}
        layouts = {
            name: {
                dim: tuple(
                    part if part.width is None else replace(part, length=sizes[part.width] * part.repeat)
                    for part in segments
                )
                for dim, segments in axes.items()
            }
            for name, axes in self.layouts.items()
        }
        shapes = {
            name: tuple(
                sum(part.length for part in layouts[name][dim]) if dim in layouts[name] else length
                for dim, length in enumerate(shape)
            )
            for name, shape in self.shapes.items()
        }
        bare = {name: replace(width, size=sizes[name], ties=()) for name, width in self.widths.items()}
        roles = {(tie.tensor, tie.dim): tie.role for width in self.widths.values() for tie in width.ties}
        made = assemble(bare, layouts, shapes, self.trainable, self.aliases, roles, self.differentiates, self.added)
        return replace(made, gates=self.gates, outputs=self.outputs)

    def proposed_parameters(self, sizes: Mapping[str, int]) -> int:
        """Number of parameters of the model if the named widths had these sizes.

        Raises:
            ResizeError: if no width has one of the names.
        """
        return sum(self.proposed_entries(sizes, self.trainable).values())

    def proposed_entries(self, sizes: Mapping[str, int], names: Iterable[str] | None = None) -> dict[str, int]:
        """Number of entries of tensors, by name, if the named widths had these sizes.

        Args:
            sizes: {width: size}; the others stay as they are.
            names: of the tensors, all by default.

        Raises:
            ResizeError: if no width has one of the names.
        """
        sizes = {self.widths[name].name: size for name, size in sizes.items()}
        found: dict[str, int] = {}
        for name in self.shapes if names is None else names:
            found[name] = 1
            for dim, length in enumerate(self.shapes[name]):
                segments = self.layouts[name].get(dim)
                found[name] *= length if segments is None else sum(_proposed(part, sizes) for part in segments)
        return found

    def explain(self, name: str) -> str:
        """Every axis that is tied to a width, one line each.

        Raises:
            ResizeError: if no width has that name.
        """
        return as_explanation(self.widths[name])

    def __rich__(self) -> Table:
        """The table that rich prints: `rich.print(graph)`. Frozen widths are dim; `str(graph)` is the plain text."""
        return as_table(self)

    def __str__(self) -> str:
        return as_text(self)


def _entries_in(chosen: set[str], shape: tuple[int, ...], axes: Mapping[int, tuple[Segment, ...]]) -> int:
    """Number of entries of a tensor that lie in at least one of the chosen widths."""
    outside = 1
    for dim, length in enumerate(shape):
        outside *= length - sum(part.length for part in axes.get(dim, ()) if part.width in chosen)
    return math.prod(shape) - outside


def _part_map(part: Segment, maps: Mapping[str, IndexMap]) -> IndexMap:
    index_map = None if part.width is None else maps.get(part.width)
    return IndexMap.identity(part.length) if index_map is None else index_map.part(part.part).repeat(part.repeat)


def _proposed(part: Segment, sizes: Mapping[str, int]) -> int:
    size = None if part.width is None else sizes.get(part.width)
    return part.length if size is None else size * part.repeat


def assemble(
    bare: Mapping[str, Width],
    layouts: Mapping[str, Mapping[int, tuple[Segment, ...]]],
    shapes: Mapping[str, tuple[int, ...]],
    trainable: frozenset[str],
    aliases: Mapping[str, str],
    roles: Mapping[tuple[str, int], str],
    differentiates: bool,
    added: frozenset[str] = frozenset(),
) -> WidthGraph:
    """Build a graph from widths without ties: the ties and parameter counts are computed from the layouts."""
    ties: dict[str, list[Tie]] = {name: [] for name in bare}
    for tensor, axes in layouts.items():
        for dim, segments in axes.items():
            start = 0
            for part in segments:
                if part.width is not None:
                    role = roles.get((tensor, dim), FOLLOWS)
                    ties[part.width].append(Tie(tensor, dim, start, part.repeat, role, part.part))
                start += part.length
    widths = {
        name: replace(
            width,
            ties=tuple(ties[name]),
            parameters=sum(
                _entries_in({name}, shapes[tensor], layouts[tensor])
                for tensor in {tie.tensor for tie in ties[name]} & trainable
            ),
        )
        for name, width in bare.items()
    }
    return WidthGraph(Widths(widths), layouts, shapes, trainable, aliases, differentiates, added)
