"""Which of a model's units at the start of a run are still there, and the surgery that gives all widths their first sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from evolvenet.engine.functional import apply
from evolvenet.engine.rank_changes import merge_made
from evolvenet.errors import IndexMapError, RecordError
from evolvenet.graph.index_map import NEW_UNIT, IndexMap
from evolvenet.graph.plain_data import check_types, reading
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.surgery.resize_model import Surgery, compile_surgery


@dataclass(frozen=True)
class OriginalWidths:
    """The sizes of all widths at the start of a run, and for each present unit its number then.

    Ranks of layers that were whole then are not among them.

    Code that takes another route through its layers than any that was traced needs layers to fit that were cut apart.
    At their first sizes all layers fit each other as they did when the model was built.

    Args:
        sizes: {width: units at the start}.
        origins: {width: for each present unit its index at the start, −1 for one that has come since, as a map}.

    >>> from evolvenet.tracing.trace import trace
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> original = OriginalWidths.of(trace(model, torch.zeros(1, 2)))
    >>> original.after({"0": IndexMap.keep([0, 2], 3)}).origins["0"].indices
    (0, 2)
    """

    sizes: Mapping[str, int]
    origins: Mapping[str, IndexMap]

    @classmethod
    def of(cls, graph: WidthGraph) -> OriginalWidths:
        """A run begins with this graph."""
        sizes = {width.name: width.size for width in graph.widths.values()}
        return cls(sizes, {name: IndexMap.identity(size) for name, size in sizes.items()})

    @property
    def has_changed(self) -> bool:
        """Whether any width has other units than at the start, or has them in another order."""
        return any(not origin.is_identity for origin in self.origins.values())

    def made_chains(self, graph: WidthGraph) -> bool:
        """Whether a layer has become a chain since."""
        return any(width.rank_of is not None and width.name not in self.sizes for width in graph.widths.values())

    def after(self, maps: Mapping[str, IndexMap]) -> OriginalWidths:
        """The same after a change of widths.

        Raises:
            IndexMapError: for a map of another number of parts than the width has had so far.
        """
        for name, later in maps.items():
            known = len(self.origins[name].each) if name in self.origins else 1
            if known > 1 and later.parts and len(later.parts) != known:
                raise IndexMapError(
                    f"Width {name!r}: expected a map of {known} parts, for which its units at the start are known, got one of "
                    f"{len(later.parts)}. Take a map of the same graph, or go on with OriginalWidths.renamed for another one."
                )
        moved = {name: self.origins[name].then(later) for name, later in maps.items() if name in self.origins}
        return OriginalWidths(self.sizes, {**self.origins, **moved})

    def renamed(self, known: Mapping[str, str], after: WidthGraph) -> OriginalWidths:
        """The same by the names of another graph of the same model.

        Args:
            known: {width of it: its name here}, from `evolvenet.graph.renaming.same_widths`.
            after: the other graph; a width of it that is not in `known` has not changed so far. Of one that ties layers which
                had units of their own, those of the first layer tell the units of all.
        """
        fresh = OriginalWidths.of(after)
        sizes, origins = dict(fresh.sizes), dict(fresh.origins)
        for width in after.widths.values():
            name = known.get(width.name)
            if width.rank_of is not None and name is None:
                del sizes[width.name], origins[width.name]
            elif name is not None and name in self.origins and self.origins[name].new_size == width.size:
                sizes[width.name], origins[width.name] = self.sizes[name], _for_parts(self.origins[name], width)
        return OriginalWidths(sizes, origins)

    def surgery(self, model: nn.Module, graph: WidthGraph) -> Surgery:
        """What gives every width its first size and order again.

        Units that have gone come back as zeros; those that have come since go.

        Args:
            model: the model as it is.
            graph: its widths.
        """
        changed = {name: origin for name, origin in self.origins.items() if not origin.is_identity}
        known = {
            name: _for_parts(each, graph.widths[name]) if name in graph.widths else each
            for name, each in changed.items()
        }
        return compile_surgery(model, graph, {name: origin.inverse() for name, origin in known.items()})

    def state_dict(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        origins = {name: [list(each.indices) for each in origin.each] for name, origin in self.origins.items()}
        parts = {name: each for name, each in origins.items() if len(each) > 1}
        return {"sizes": dict(self.sizes), "origins": {name: each[0] for name, each in origins.items()}, "parts": parts}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> OriginalWidths:
        """What `state_dict` was called on.

        Raises:
            RecordError: for anything else.
        """
        try:
            with reading("The record of the units at the start of the run"):
                sizes, parts = dict(state["sizes"]), state.get("parts", {})
                origins = {
                    name: IndexMap.of_parts(parts.get(name, [origin]), sizes[name])
                    for name, origin in state["origins"].items()
                }
                found = cls(sizes, origins)
                check_types(found, cls, "original widths")
                return found
        except IndexMapError as error:
            raise RecordError(
                f"The checkpoint's units are not those of its widths at the start: {error} Use another checkpoint."
            ) from error

    def check_fits(self, graph: WidthGraph) -> None:
        """Raise unless there is an original unit, or −1, for every unit of a graph's widths.

        Raises:
            RecordError: naming the width.
        """
        for name, origin in self.origins.items():
            now = graph.widths[name].size if name in graph.widths else origin.new_size
            known = [[unit for unit in each.indices if unit != NEW_UNIT] for each in origin.each]
            fits = name not in graph.widths or _fits(origin, graph.widths[name])
            if not fits or any(len(set(units)) < len(units) for units in known):
                raise RecordError(
                    f"The checkpoint's units of {name} are not those of its {now}: expected one of the {origin.size} at the "
                    f"start, or {NEW_UNIT}, for each, got {list(origin.indices)[:8]}. Use another checkpoint."
                )


def _fits(origin: IndexMap, width: Width) -> bool:
    """Whether a map names an original unit for each of a width's, in every part."""
    return origin.new_size == width.size and len(origin.each) in (1, width.parts)


def _for_parts(origin: IndexMap, width: Width) -> IndexMap:
    """The map for a width, which may be of another trace: one that ties the parts goes by the units of the first.

    All parts get the same places then, so that what the code ties stays together.
    """
    return origin if len(origin.each) in (1, width.parts) else origin.part(0)


@contextmanager
def at_first_sizes(
    original: OriginalWidths,
    model: nn.Module,
    graph: WidthGraph,
    optimizers: Sequence[Optimizer] = (),
    replicas: Sequence[nn.Module] = (),
) -> Iterator[WidthGraph]:
    """Give all widths their first sizes, in the model, its optimizers and its replicas; revert that if the body raises.

    The body gets the graph of the restored model.

    >>> from evolvenet.engine.functional import prune
    >>> from evolvenet.tracing.trace import trace
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> original = OriginalWidths.of(graph := trace(model, torch.zeros(1, 2)))
    >>> graph = prune(model, graph, {"0": 1})
    >>> original = original.after({"0": IndexMap.keep([0], 3)})
    >>> with at_first_sizes(original, model, graph) as restored:
    ...     print(model[0], restored.sizes)
    Linear(in_features=2, out_features=3, bias=True) {'0': 3}
    """
    with ExitStack() as undo:
        graph = merge_made(model, graph, original.sizes, optimizers, replicas, undo)
        surgery = original.surgery(model, graph)
        apply(model, surgery, optimizers, undo)
        for replica in replicas:
            apply(replica, original.surgery(replica, graph), (), undo)
        yield surgery.graph
        undo.pop_all()
