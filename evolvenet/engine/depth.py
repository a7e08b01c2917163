"""Depth as a last width: residual blocks that carry nothing are removed whole.

A block computes y = x + f(x). On some batches every module with parameters is observed that is called once and returns a
tensor of its input's shape (`measurement/residual_blocks.py`). Where Σ‖y − x‖² is at most a share of Σ‖y‖², the block is
replaced by its input. Where a module inside of a block returns nothing, Σ‖f‖² at most that share of the block's Σ‖y‖², this
branch alone is replaced by zeros. They are tried one after the other, the outermost first, what lies inside of one only if it
stays; each goes only if the model's outputs then lose no more than is allowed. Whole layers of a model of the transformers
library leave its list of layers (`RemainingLayers`): layers number their places in the cache. An attention that has such a
number is removed with its layer only.

What is removed stands in checkpoints (`evolvenet.surgery.module_replacement`), so that a freshly built model gets the same
modules before it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.engine.event_data import EventData
from evolvenet.errors import ResizeError
from evolvenet.graph.renaming import Rename, without_layer
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.cost import latency, macs, parameters, size_in_bytes
from evolvenet.measurement.output_error import first_batches, output_error, outputs_on
from evolvenet.measurement.residual_blocks import Observed, observe_blocks
from evolvenet.policies.base import PolicyContext
from evolvenet.signals import deferred_signals
from evolvenet.surgery.module_replacement import BUILDERS, Record, exchange_modules, replacements, whole_in
from evolvenet.surgery.optimizer_parameters import as_list, parameter_names, replace_parameters
from evolvenet.surgery.remaining_layers import KIND as LAYERS
from evolvenet.surgery.remaining_layers import PLACE, RemainingLayers, unclear_fields
from evolvenet.surgery.removed_block import KIND as BLOCK
from evolvenet.surgery.removed_block import NOTHING, PASSES, RemovedBlock
from evolvenet.surgery.width_record import forget

log = logging.getLogger("evolvenet")
ROUNDING = 1e-5
"""Relative error of outputs that are the same but for the order of sums."""

TRIED = 0.1
"""Share of a block's energy: of one that carries more no policy expects that it can go."""
SAMPLES = 256
"""Samples on which removals are tried in a run."""

Accept = Callable[[Sequence[Tensor], Sequence[Tensor]], bool]
"""(outputs before any removal, outputs now) → whether the last removal may stay."""


@dataclass(frozen=True)
class Removal:
    """A block or a branch that is removed, as plain data that can be sent to other processes.

    Args:
        path: by the names before the removals that precede it in a list.
        returns, argument, outputs: see `RemovedBlock`.
        lost: share of the energy that it carried.
        leaves: whether it is a layer that leaves its list, so that those after it get other names.
    """

    path: str
    returns: str
    argument: int | str
    outputs: int
    lost: float
    leaves: bool = False


@deferred_signals("the removal of blocks")
def remove_blocks(
    model: nn.Module,
    example_inputs: Any,
    batches: Sequence[Any] = (),
    share: float = 0.0,
    optimizers: Optimizer | Sequence[Optimizer] = (),
) -> dict[str, float]:
    """Remove residual blocks, and branches of them, that carry nothing or next to nothing; in place.

    Call it after `prune`; the graph has to be traced anew afterwards. In a run give the policy `depth=True`, or call
    `Evolver.remove_blocks`. Branches that are zero because they have just been initialized so would learn: remove them only once
    they have been trained.

    Args:
        model: any module.
        example_inputs: what it is called with.
        batches: more inputs, on which blocks are observed; the example inputs alone if there are none.
        share: of a block's energy, and of that of the model's outputs, that may be lost with what is removed; 0 for what adds
            exactly nothing.
        optimizers: those that hold the model's parameters: what is removed leaves them.

    Returns:
        {path of what was removed, by the names before: share of the energy that it carried}.

    Raises:
        ResizeError: for a share outside of 0 … 1.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return x + self.down(self.up(x).relu())
    >>> model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2))
    >>> _ = nn.init.zeros_(model[1].down.weight), nn.init.zeros_(model[1].down.bias)
    >>> remove_blocks(model, torch.randn(2, 4))
    {'1': 0.0}
    >>> model[1]
    RemovedBlock(Block, returns its input)
    """
    if not 0 <= share <= 1:
        raise ResizeError(f"remove_blocks: expected a share in 0 … 1, got {share!r}. Take for example share=1e-4.")
    accept = energy_limit(share)
    removals = find_removals(model, list(batches) or [example_inputs], share, lambda _: accept)
    with ExitStack() as undo:
        for removal in removals:
            apply_removal(model, removal, as_list(optimizers), undo)
        undo.pop_all()
    if removals:
        # It names tensors that are gone.
        forget(model)
    return {removal.path: removal.lost for removal in reversed(removals)}


def energy_limit(share: float) -> Accept:
    """Outputs may lose so much of their energy by all removals together."""

    def accept(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
        return all(
            torch.dist(one, other) <= max(ROUNDING, share**0.5) * other.norm()
            for one, other in zip(now, before, strict=True)
        )

    return accept


def find_removals(
    model: nn.Module,
    inputs: Sequence[Any],
    share: float,
    limit: Callable[[str], Accept],
    graph: WidthGraph | None = None,
    may_go: Callable[[str], bool] = lambda _: True,
) -> list[Removal]:
    """The blocks and branches to remove, from the last one to the first: what leaves a list of layers moves those after it.

    Args:
        model: is left as it was.
        inputs: of the model.
        share: of a block's energy; those that carry more are not tried.
        limit: (path of a block) → what is called once it is removed, with all that were accepted before it gone, too.
        graph: of the model: which outputs count.
        may_go: whether the block at a path may be removed at all.
    """
    seen = observe_blocks(model, inputs)
    modules = dict(model.named_modules())
    before = outputs_on(model, inputs, graph, most=None)
    found: list[Removal] = []
    with ExitStack() as every:
        for path in _outer_first(modules):
            each = seen.get(path)
            if each is None or any(path.startswith(f"{removal.path}.") for removal in found):
                continue
            for returns, lost in _lost(path, each, modules, seen).items():
                if lost > share or not may_go(path) or _has_to_stay(modules, path, returns):
                    continue
                leaves = _holds_place(modules[path])
                removal = Removal(path, returns, each.argument, each.outputs, lost, leaves)
                with ExitStack() as undo:
                    apply_removal(model, removal, (), undo)
                    if _runs_as_before(model, inputs, before, limit(path), graph):
                        found.append(removal)
                        every.enter_context(undo.pop_all())
                        break
                    log.debug("%s stays: without it the model's outputs lose more than is allowed", path)
    # Of two in one list the later one goes first.
    order = {path: place for place, path in enumerate(modules)}
    return sorted(found, key=lambda removal: -order[removal.path])


def _outer_first(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """All paths from the last module to the first, what holds a module before it."""
    inside: dict[str, list[str]] = {}
    for path in modules:
        if path:
            holder = path.rpartition(".")[0]
            # A module that is shared may lie in a holder that goes by another name.
            inside.setdefault(holder if holder in modules else "", []).append(path)
    left = list(inside.get("", ()))
    while left:
        path = left.pop()
        yield path
        left += inside.get(path, ())


def _runs_as_before(
    model: nn.Module, inputs: Sequence[Any], before: Sequence[Tensor], accept: Accept, graph: WidthGraph | None
) -> bool:
    """Whether the model still runs, its outputs have their shapes, and the removal is accepted."""
    try:
        now = outputs_on(model, inputs, graph, most=None)
    except Exception as problem:
        log.debug("A removed block is put back", exc_info=problem)
        return False
    return [each.shape for each in now] == [each.shape for each in before] and accept(before, now)


def _lost(
    path: str, each: Observed, modules: Mapping[str, nn.Module], seen: Mapping[str, Observed]
) -> dict[str, float]:
    """{what it could return: share of the energy that is lost}."""
    lost: dict[str, float] = {}
    if any(True for _ in modules[path].children()) and each.energy:
        # A layer alone is no block: a norm may find its inputs normalized already.
        lost[PASSES] = each.change / each.energy
    parts = path.split(".")
    around = [seen.get(".".join(parts[:length])) for length in range(1, len(parts))]
    blocks = [block.energy for block in around if block is not None and block.shape == each.shape and block.energy]
    if blocks or each.energy == 0:
        lost[NOTHING] = each.energy / blocks[-1] if blocks else 0.0
    return lost


def _holds_place(module: nn.Module) -> bool:
    return any(hasattr(each, PLACE) for each in module.modules())


def _has_to_stay(modules: Mapping[str, nn.Module], path: str, returns: str) -> bool:
    """Whether something inside has a place in the cache, and is no layer of a list from which it could be taken."""
    if not _holds_place(modules[path]):
        return False
    if any(getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in modules.values()):
        log.info(
            "%s stays: in a model of encoder and decoder layers keep their places, since both count theirs in one configuration",
            path,
        )
        return True
    layers = modules[path.rpartition(".")[0]]
    if returns != PASSES or not isinstance(layers, nn.ModuleList):
        return True
    unclear = unclear_fields(modules[""], layers)
    if unclear:
        log.info("%s stays: the configuration's %s may count layers, how is not known", path, ", ".join(unclear))
    return bool(unclear)


def apply_removal(model: nn.Module, removal: Removal, optimizers: Sequence[Optimizer], undo: ExitStack) -> None:
    """Remove one block or branch; closing `undo` puts it back."""
    module = model.get_submodule(removal.path)
    if removal.leaves:
        parent, _, index = removal.path.rpartition(".")
        layers = model.get_submodule(parent)
        assert isinstance(layers, nn.ModuleList)
        exchange_modules(model, {layers: RemainingLayers.without(layers, [int(index)])}, undo)
    else:
        stand_in = RemovedBlock(module, removal.returns, removal.argument, removal.outputs)
        exchange_modules(model, {module: stand_in}, undo)
    left = set(model.parameters())
    gone: dict[Tensor, Sequence[Tensor]] = {each: [] for each in module.parameters() if each not in left}
    replace_parameters(optimizers, gone, parameter_names(model), undo)


def renaming(removals: Sequence[Removal]) -> Rename:
    """The names that everything has after removals, which follow one another in this order."""
    steps = [without_layer(each.path) for each in removals if each.leaves]
    gone = [each.path for each in removals if not each.leaves]

    def rename(name: str) -> str | None:
        found: str | None = None if any(f"{name}.".startswith(f"{path}.") for path in gone) else name
        for step in steps:
            found = found if found is None else step(found)
        return found

    return rename


def removes_blocks(policy: object) -> bool:
    """Whether a policy may remove blocks at an event, see `evolvenet.policies.base.DepthPolicy`."""
    return bool(getattr(policy, "depth", False)) and callable(getattr(policy, "block_loss", None))


class _Costs:
    """What a network costs in each of its states between removals, which its number of parameters tells from one another."""

    def __init__(self, policy: Any, data: EventData) -> None:
        self._data = data
        self._kinds = {getattr(policy, "kind", getattr(policy, "cost", "params"))}
        self._known: dict[tuple[str, int], float] = {}

    def nothing(self, kind: str) -> float:
        """0, as what is saved before any removal; the kind is one that the policy goes by."""
        self._kinds.add(kind)
        return 0.0

    def keep(self) -> None:
        """Measure the present state: later the network is in another one."""
        for kind in self._kinds:
            self._at(kind, parameters(self._data.model))

    def saved(self, since: int, now: int, kind: str) -> float:
        """The difference between two states; one that was not kept has to be the present one."""
        return self._at(kind, since) - self._at(kind, now)

    def _at(self, kind: str, count: int) -> float:
        if (kind, count) not in self._known:
            model, inputs, own = self._data.model, self._data.example_inputs, self._data.graph.differentiates
            measure = {
                "params": lambda: count,
                "bytes": lambda: size_in_bytes(model),
                "macs": lambda: macs(model, inputs, own),
            }
            self._known[kind, count] = measure.get(kind, lambda: latency(model, inputs, own))()
        return self._known[kind, count]


def removals_of_policy(
    policy: Any, context: PolicyContext, data: EventData, may_go: Callable[[str], bool]
) -> list[Removal]:
    """The blocks that a policy gives up: those whose loss is within what it allows, by themselves and together.

    Args:
        policy: with a method `block_loss`.
        context: of the event.
        data: of the event, with its batches.
        may_go: see `find_removals`.
    """
    model, costs, lost = data.model, _Costs(policy, data), [0.0]
    first = parameters(model)
    kept = [first]

    def limit(path: str) -> Accept:
        now = parameters(model)

        def accept(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
            loss = output_error(before, after)
            alone, together = partial(costs.saved, kept[0], now), partial(costs.saved, first, now)
            accepted = partial(costs.saved, first, kept[0])
            fits = loss - lost[0] <= policy.block_loss(context, path, alone, accepted) + ROUNDING**2
            if fits and loss <= policy.block_loss(context, path, together, costs.nothing) + ROUNDING**2:
                lost[0], kept[0] = loss, now
                costs.keep()
                return True
            return False

        return accept

    # What it reads of the context is computed once, while the model is whole.
    policy.block_loss(context, "", costs.nothing, costs.nothing)
    costs.keep()
    return find_removals(model, first_batches(data.batches, SAMPLES), TRIED, limit, data.graph, may_go)


def restore_blocks(model: nn.Module, records: Mapping[str, Record]) -> None:
    """Give a model the blocks of another moment. New tensors have undefined values, and are in no optimizer.

    Args:
        model: with blocks that were removed since, or that were not removed yet.
        records: {path: record} of the replacements of that moment.
    """
    kinds = (RemovedBlock, RemainingLayers)
    with ExitStack() as undo:
        for path, own in reversed(replacements(model).items()):
            if isinstance(own, kinds) and own.record() != records.get(path):
                exchange_modules(model, {own: whole_in(model, own)}, undo)
        for path in sorted(records, key=lambda path: path.count(".")):
            module = model.get_submodule(path)
            if records[path]["type"] in (BLOCK, LAYERS) and not isinstance(module, kinds):
                exchange_modules(model, {module: BUILDERS[records[path]["type"]](module, records[path])}, undo)
        undo.pop_all()
