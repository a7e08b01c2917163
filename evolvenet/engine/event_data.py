"""What one event measures, and the surgeries that it plans from that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from evolvenet.errors import is_out_of_memory, stage
from evolvenet.execution.step import returned_loss
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.loss_test import Gradients, evidence
from evolvenet.growth.plan import NewUnits, plan_growth
from evolvenet.lowrank.fit import Observations
from evolvenet.lowrank.layer_ranks import LayerRanks, LowRank, costs_of
from evolvenet.lowrank.rank_statistics import observe_whole, rank_statistics, rank_trials
from evolvenet.measurement.activation_moments import ActivationMoments, collect
from evolvenet.measurement.host_model import on_host
from evolvenet.measurement.past_events import PastEvents
from evolvenet.measurement.width_statistics import WidthStatistics, width_statistics
from evolvenet.policies.base import PolicyContext
from evolvenet.pruning.reconstruction import fit_to_targets
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
from evolvenet.pruning.recorded_outputs import OutputsBeside
from evolvenet.pruning.recording import record, record_beside, recording_of
from evolvenet.pruning.selection import plan_prune
from evolvenet.pruning.trials import SHARES, Curve, trial_curves
from evolvenet.surgery.resize_model import Surgery

KEPT = 2**28
"""Most bytes of outputs that are recorded before it is known which widths are cut."""

log = logging.getLogger("evolvenet")


@dataclass(frozen=True, eq=False)
class EventData:
    """The batches of an event and what is measured on them. Each quantity is computed when it is first needed, and kept.

    Args:
        model: the model.
        graph: its widths before the event.
        example_inputs: what costs are counted on.
        batches: inputs to measure on, of all ranks.
        gradients: of the loss at the outputs for each batch, as far as they are known.
        past: this event's number and share of the run, and what the events before it left.
        previous: share of the run that was done at the event before, 0 at the first one; None where the run's length is unknown.
        seed: of the run; new units draw from `seed` + the event's number.
        lowrank: how layers may be factorized; None where ranks are not in question.
        new_units: how they start.
        optimizers: that train the model.
    """

    model: nn.Module
    graph: WidthGraph
    example_inputs: Any
    batches: Sequence[Any]
    gradients: Sequence[Gradients]
    past: PastEvents
    previous: float | None
    seed: int
    lowrank: LowRank | None = None
    new_units: NewUnits = field(default_factory=NewUnits)
    optimizers: Sequence[Optimizer] = ()

    @cached_property
    def ranks(self) -> LayerRanks | None:
        """The ranks of all layers, of whole ones as well; None where ranks are not in question."""
        return self.lowrank and self.lowrank.ranks(self.model, self.graph, self.example_inputs)

    @cached_property
    def whole_layers(self) -> Observations | None:
        """Second moments of the inputs of whole layers that may be factorized, from one more forward pass."""
        with stage("statistics"):
            return observe_whole(self.model, self.ranks, self.batches) if self.ranks is not None else None

    @cached_property
    def moments(self) -> ActivationMoments:
        """Second moments of what the consumers of every width take in, from one forward pass a batch."""
        with stage("statistics"):
            return collect(self.model, self.graph, self.batches, beside=self.outputs)

    @cached_property
    def outputs(self) -> OutputsBeside | None:
        """The outputs of all consumers, from the same run as the moments; None where a cut records those of other samples."""
        return record_beside(self.model, self.graph, self.batches, TRAINING_LIMITS, KEPT)

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Say to which sizes widths will be changed: where none shrinks no outputs are recorded, and those that are are given up.

        Before that it is not known whether a width will be cut, and outputs are recorded beside the moments.
        """
        if not self._cut(sizes):
            vars(self)["outputs"] = None

    def _cut(self, sizes: Mapping[str, int]) -> list[str]:
        """The widths that shrink."""
        widths = self.graph.widths
        return [name for name, size in sizes.items() if name in widths and size < widths[name].size]

    @cached_property
    def host(self) -> nn.Module:
        """The model's weights on the CPU."""
        return on_host(self.model)

    @cached_property
    def statistics(self) -> dict[str, WidthStatistics]:
        """{width: its statistics}."""
        moments = self.moments
        with stage("spectra"):
            found = width_statistics(self.host, self.graph, moments, self.past)
            if self.ranks is not None and self.whole_layers is not None:
                found |= rank_statistics(self.model, self.ranks, self.whole_layers, self.past)
            return found

    @property
    def measured(self) -> dict[str, WidthStatistics]:
        """The statistics if they have been computed, else none."""
        return vars(self).get("statistics", {})

    def context(self, initial: Mapping[str, int], state: Any) -> PolicyContext:
        """What a policy may look at.

        Args:
            initial: {width: size} at the start of the run.
            state: what a judging policy kept.
        """
        return PolicyContext(
            self.graph if self.ranks is None else self.ranks.extended,
            self.past.progress,
            initial,
            state,
            self.previous,
            measure=lambda: self.statistics,
            count_costs=lambda: costs_of(self.model, self.graph, self.example_inputs, self.ranks),
            run_trials=self.trials,
            run_loss_tests=lambda sizes: evidence(
                self.model, self.graph, sizes, self.batches, self.gradients, self.generator()
            ),
        )

    def trials(self, shares: Sequence[float] = SHARES) -> dict[str, Curve]:
        """See `PolicyContext.trials`."""
        found = trial_curves(self.model, self.graph, self.batches, shares)
        if self.ranks is not None and self.whole_layers is not None:
            found |= rank_trials(self.model, self.ranks, self.whole_layers, self.batches, shares)
        return found

    def plan_pruning(self, sizes: Mapping[str, int]) -> Surgery:
        """The surgery that prunes widths to smaller sizes, their consumers fitted to the outputs that they had.

        They are not refitted to the moments first. With that, the outputs of ResNets trained on MNIST and cut to 90, 70 and 50 %
        of their units were no nearer to what they were.
        """
        moments = self.moments
        cut = self._cut(sizes)
        with stage("reconstruction"):
            if self.outputs is None:
                recording = record(self.model, self.graph, cut, self.batches, TRAINING_LIMITS)
            else:
                recording = recording_of(self.outputs, self.graph, cut, self.batches, TRAINING_LIMITS)
        with stage("unit selection"):
            fitted = frozenset[str]() if recording is None else recording.fitted
            surgery = plan_prune(self.model, self.graph, sizes, moments, self.host, fitted)
        with stage("reconstruction"):
            return surgery if recording is None else fit_to_targets(self.model, self.graph, surgery, recording)

    def plan_growth(self, graph: WidthGraph, sizes: Mapping[str, int]) -> Surgery:
        """The surgery that grows widths to larger sizes.

        Args:
            graph: the widths after the event's pruning.
            sizes: {width: size}.
        """
        with stage("growth"):
            if self.new_units.needs_loss:
                try:
                    return plan_growth(
                        self.model, graph, sizes, self.new_units.method, self.generator(),
                        [(batch, None) for batch in self.batches], returned_loss, self.new_units.update, self.optimizers,
                    )  # fmt: skip
                except Exception as problem:
                    if is_out_of_memory(problem):
                        raise
                    other = self.new_units.without_loss.method
                    log.warning("New units start as %r and no weight is updated: %s", other, problem)
            return plan_growth(self.model, graph, sizes, self.new_units.without_loss.method, self.generator())

    def generator(self) -> torch.Generator:
        """The source of the new units' random directions."""
        return torch.Generator().manual_seed(self.seed + self.past.count)
