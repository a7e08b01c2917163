"""Snapshots of a network in training, with its widths and optimizer state, and the return to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import reset_compiled_code
from evolvenet.engine.depth import restore_blocks
from evolvenet.engine.distributed import ProcessGroup, run_on_all_ranks
from evolvenet.engine.invariants import ModelReference, validate
from evolvenet.engine.rank_changes import restore_chains
from evolvenet.graph.plain_data import check_types
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.policies.base import Judgement, JudgingPolicy
from evolvenet.surgery.checkpoint import WidthRecord, fit_shapes
from evolvenet.surgery.module_replacement import Record, replacements
from evolvenet.surgery.optimizer_groups import group_names, restore_groups
from evolvenet.surgery.optimizer_state import validate_state
from evolvenet.surgery.optimizer_tensors import with_inner
from evolvenet.surgery.optimizer_values import held_by_place, optimizer_values, restore_optimizer


@dataclass(frozen=True)
class Snapshot:
    """Weights, buffers, widths and optimizer state. Learning rates and other settings of the optimizers are not part of it.

    Args:
        networks: of the model and each of its copies, every tensor by name.
        graph: the widths.
        width_record: what depends on widths and is not in a state dict, from `WidthRecord.values`.
        states: of each optimizer and of those inside of them, what it keeps, from `optimizer_values`.
        chains: {path: record} of the factorized layers, and of what stands for removed blocks.
        groups: of each optimizer, and of those inside of them, the names of each group's parameters; None for
            one of another model.
        names: what the run keeps by the names of widths, where the cut after it has removed blocks; None elsewhere.
    """

    networks: Sequence[Mapping[str, Tensor]]
    graph: WidthGraph
    width_record: Mapping[str, Any]
    states: Sequence[Mapping[str, Any]]
    chains: Mapping[str, Record] = field(default_factory=dict[str, Record])
    groups: Sequence[Sequence[Sequence[str | None]]] = ()
    names: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, model: nn.Module, graph: WidthGraph, optimizers: Sequence[Optimizer], copies: Sequence[nn.Module] = ()
    ) -> Snapshot:
        """Copy the present state, which takes as much memory again as weights and optimizer state."""
        return cls(
            [{name: tensor.detach().clone() for name, tensor in _tensors(each).items()} for each in (model, *copies)],
            graph,
            WidthRecord.of(model, graph).values(model),
            [optimizer_values(optimizer) for optimizer in with_inner(optimizers)],
            {path: module.record() for path, module in replacements(model).items()},
            group_names(model, with_inner(optimizers)),
        )

    def restore(self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[nn.Module] = ()) -> None:
        """Restore everything. Replicas that are not in the snapshot get the model's weights.

        Raises:
            RecordError, OptimizerStateError: if the model or an optimizer is another one than in the snapshot. Part of it may
                have been restored then: restore a snapshot taken before the call.
        """
        networks = [*self.networks, *[self.networks[0]] * (1 + len(copies) - len(self.networks))]
        before = set(model.parameters())
        for network in (model, *copies):
            restore_blocks(network, self.chains)
            restore_chains(network, self.chains, optimizers if network is model else ())
        every = with_inner(optimizers)
        restore_groups(model, every, self.groups, before - set(model.parameters()))
        held = [held_by_place(optimizer) for optimizer in every]
        for network, values in zip((model, *copies), networks, strict=False):
            fit_shapes(network, values, record=self.width_record)
            tensors = _tensors(network)
            with torch.no_grad():
                for name, value in values.items():
                    tensors[name].copy_(value)
        for optimizer, values, tensors in zip(every, self.states, held, strict=True):
            restore_optimizer(optimizer, values, tensors)
            validate_state(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot as plain data and tensors, for a checkpoint."""
        return {
            "networks": [dict(each) for each in self.networks],
            "graph": to_state_dict(self.graph),
            "note": dict(self.width_record),
            "states": [dict(each) for each in self.states],
            "chains": {path: dict(record) for path, record in self.chains.items()},
            "groups": [[list(names) for names in groups] for groups in self.groups],
            "names": self.names and dict(self.names),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """The snapshot that `state_dict` was called on."""
        found = cls(
            state["networks"], from_state_dict(state["graph"]), state["note"], state["states"],
            state.get("chains", {}), state.get("groups", ()), state.get("names"),
        )  # fmt: skip
        check_types(found, cls, "snapshot")
        return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its first name, also those that no state dict has."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class TrainingRun(Protocol):
    """The attributes of an `Evolver` that `roll_back` uses."""

    model: nn.Module
    optimizers: list[Optimizer]
    example_inputs: Any
    after_change: Callable[[], object]


def roll_back(
    group: ProcessGroup, past: Snapshot, present: Snapshot, run: TrainingRun, copies: Sequence[nn.Module] = ()
) -> None:
    """Restore a past snapshot on every rank and validate it; where that fails, restore the present one.

    Raises:
        EvolveNetError: if restoring or validating fails, here or on another rank.
    """
    before = run_on_all_ranks(group, lambda: ModelReference.of(run.model, run.example_inputs, past.graph))
    try:
        run_on_all_ranks(group, lambda: past.restore(run.model, run.optimizers, copies))
        run_on_all_ranks(group, lambda: _validate(past, run, before))
        run_on_all_ranks(group, run.after_change)
    except BaseException:
        present.restore(run.model, run.optimizers, copies)
        run.after_change()
        raise
    reset_compiled_code()


def _validate(past: Snapshot, run: TrainingRun, before: ModelReference) -> None:
    kept = before.with_layers_of(run.model)
    validate(run.model, past.graph, run.optimizers, run.example_inputs, kept)


class PendingCut:
    """The state of a policy that judges its cuts, and while one is pending a snapshot of the network before it.

    Args:
        policy: whose state is kept, and which judges the cut.
    """

    def __init__(self, policy: JudgingPolicy) -> None:
        self.policy = policy
        self.state: Any = None
        self.snapshot: Snapshot | None = None

    def record(self, snapshot: Snapshot | None, widths: Sequence[str]) -> None:
        """Record the result of an event: where no cut is pending, its changes become the pending cut.

        Args:
            snapshot: from before the changes; None if the event changed nothing.
            widths: names of the widths that it changed.
        """
        if self.snapshot is None:
            self.state, self.snapshot = self.policy.record(self.state, widths), snapshot

    def judge(self, value: float) -> tuple[Judgement, Snapshot | None]:
        """The policy's judgement after a validation, and the snapshot to restore if the pending cut is undone."""
        judgement, snapshot = self.policy.judge(self.state, value), self.snapshot
        self.state = judgement.state
        if judgement.verdict != "wait":
            self.snapshot = None
        return judgement, snapshot if judgement.verdict == "undo" else None

    def rename(self, known: Mapping[str, str]) -> None:
        """Widths have got other names; a policy with a method `renamed(state, known)` brings its state up to date.

        Args:
            known: {new name: name before}.
        """
        renamed = getattr(self.policy, "renamed", None)
        if self.state is not None and callable(renamed):
            self.state = renamed(self.state, known)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, for a checkpoint."""
        return {"state": self.state, "past": None if self.snapshot is None else self.snapshot.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.state = state["state"]
        self.snapshot = None if state["past"] is None else Snapshot.from_state_dict(state["past"])
