"""What the consumers of an uncut model put out on some batches: what a cut model's consumers are fitted to."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from evolvenet.execution.choices import Choices
from evolvenet.execution.op_cache import OpCache
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.pruning.reconstruction_batch import (
    ReconstructionLimits,
    concatenated,
    held_out_of,
    is_first_alone,
)
from evolvenet.pruning.recorded_outputs import OutputRecorder, OutputsBeside, consumers_of, recorded
from evolvenet.pruning.target import Target

log = logging.getLogger("evolvenet")


@dataclass(frozen=True, eq=False)
class Recording:
    """What consumers are fitted to.

    Args:
        batch: inputs of the model, one batch.
        targets: {consumer: its outputs on the batch in the uncut model}.
        held_out: `[samples]` booleans.
        choices: of the model's routers on the batch.
        cache: of results of the model's ops on the batch, if several cuts are fitted to it.
        rounds: of the fits of outputs that a rectifier takes.
        fallbacks: {tensor: its value in the cut model} for the consumers whose fit lowers no error, and their biases.
    """

    batch: Any
    targets: dict[str, list[Target]]
    held_out: Tensor
    choices: Choices
    cache: OpCache | None = None
    rounds: int = 0
    fallbacks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fitted(self) -> frozenset[str]:
        """The consumers that are fitted to their outputs whatever the units; of stacked ones that depends on the router."""
        return frozenset(
            name for name, targets in self.targets.items() if all(target.group is None for target in targets)
        )

    def copy(self) -> Recording:
        """The same with lists of its own, as a fit empties them."""
        return replace(self, targets={name: list(each) for name, each in self.targets.items()})


def record(
    model: nn.Module,
    graph: WidthGraph,
    names: Collection[str],
    batches: Iterable[Any],
    limits: ReconstructionLimits,
    cache: OpCache | None = None,
) -> Recording | None:
    """What the consumers of some widths are fitted to after a cut of these widths, for `fit_to_targets`.

    Args:
        model: the model, uncut.
        graph: its widths.
        names: of the widths.
        batches: as for `reconstruct`.
        limits: as for `reconstruct`.
        cache: of results of the model's ops, for models that need no autograd.

    Returns:
        None without a batch or a consumer.
    """
    listed, own = list(batches), graph.differentiates
    batch, consumers = concatenated(listed, limits), consumers_of(graph, names)
    if batch is None or not consumers:
        return None
    try:
        targets = recorded(model, batch, OutputRecorder(consumers, limits), own, choices := Choices(), cache=cache)
    except Exception as problem:
        # A training step may count on the size of its batches, as one with a queue of former outputs does.
        log.debug("The model does not run on several batches as one: it is fitted on the first", exc_info=problem)
        batch = listed[0]
        targets = recorded(model, batch, OutputRecorder(consumers, limits), own, choices := Choices(), cache=cache)
    return Recording(batch, targets, held_out_of(listed, batch), choices, cache, limits.rounds)


def record_beside(
    model: nn.Module, graph: WidthGraph, batches: Sequence[Any], limits: ReconstructionLimits, memory: int
) -> OutputsBeside | None:
    """What records the outputs of the consumers of all widths in the run for the moments.

    Args:
        model: the model.
        graph: its widths.
        batches: of that run.
        limits: as for `record`.
        memory: most bytes of outputs.

    Returns:
        None where `record` would take other samples than those of the first batch, or the outputs take more memory.
    """
    consumers = consumers_of(graph, [width.name for width in graph.resizable])
    tensors, _, _ = named_tensors(model)
    weights = [tensors[name] for name in consumers]
    size = sum(each.element_size() * len(each) * limits.rows_for(math.prod(each.shape[1:])) for each in weights)
    return OutputsBeside(consumers, limits) if is_first_alone(batches, limits) and size <= memory else None


def recording_of(
    found: OutputsBeside,
    graph: WidthGraph,
    names: Collection[str],
    batches: Sequence[Any],
    limits: ReconstructionLimits,
) -> Recording | None:
    """As `record`, of outputs that are recorded already; `batches` and `limits` are those of `record_beside`."""
    consumers = consumers_of(graph, names)
    if not consumers:
        return None
    targets = {name: list(each) for name, each in found.targets.items() if name in consumers}
    batch = concatenated(batches, limits)
    return Recording(batch, targets, held_out_of(batches, batch), found.choices, rounds=limits.rounds)
