"""The changes that one event makes to a model, its replicas and its optimizers: the same on every rank, and revertible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from evolvenet.engine.distributed import ProcessGroup, broadcast_surgery, run_on_all_ranks
from evolvenet.engine.functional import apply
from evolvenet.engine.history import WidthChange, changed
from evolvenet.engine.replica_update import plan_replica_update, without_shared_tensors
from evolvenet.errors import stage
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.resize_model import Surgery


@dataclass(frozen=True, eq=False)
class Transaction:
    """Applies rank 0's surgeries to a model, its replicas and its optimizers on every rank.

    Args:
        group: the processes that train the model.
        model: the model.
        optimizers: those that hold its parameters.
        replicas: models with the same tensor names and weights of their own.
        batches: inputs for the reconstruction of the replicas' layers, needed on rank 0 alone.
        undo: closing it reverts every surgery that was applied, the last one first.
        changes: the widths changed so far; those of a surgery are appended before it is applied.
    """

    group: ProcessGroup
    model: nn.Module
    optimizers: Sequence[Optimizer]
    replicas: Sequence[nn.Module]
    batches: Sequence[Any]
    undo: ExitStack
    changes: list[WidthChange]

    def apply(self, graph: WidthGraph, plan: Callable[[], Surgery], reasons: Mapping[str, str]) -> Surgery:
        """Apply the surgery that `plan` returns on rank 0.

        Args:
            graph: the widths before it.
            plan: called on rank 0 alone.
            reasons: {width: why it changes}, for the record.

        Returns:
            The surgery.

        Raises:
            EvolveNetError: on every rank, if planning or applying it fails on one. What was applied so far stays so until
                `undo` is closed.
        """
        surgery = broadcast_surgery(self.group, self.model, graph, plan)
        # All replicas' surgeries are planned before the model changes, since a replica may share buffers with it.
        with stage("replica update"):
            planned = [(replica, self._replica_surgery(replica, graph, surgery)) for replica in self.replicas]
        with stage("surgery"):
            self.changes.extend(changed(graph.sizes, surgery.graph.sizes, reasons))
            run_on_all_ranks(self.group, partial(apply, self.model, surgery, self.optimizers, self.undo))
            for replica, own in planned:
                run_on_all_ranks(self.group, partial(apply, replica, own, (), self.undo))
        return surgery

    def _replica_surgery(self, replica: nn.Module, graph: WidthGraph, surgery: Surgery) -> Surgery:
        plan = partial(plan_replica_update, replica, graph, surgery, self.batches)
        return without_shared_tensors(broadcast_surgery(self.group, replica, graph, plan), self.model)
