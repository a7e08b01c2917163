"""The plan of a cut, width by width while the model runs: second moments of one width at a time, for models of any size.

The moments of all consumers of a language model take several times the memory of its weights. Here all samples go through
the model as one batch; once the last consumer of a width has run, its units are chosen, and its moments are given up. In the
same run the outputs of the consumers are recorded, to which they are fitted in the cut model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from evolvenet.execution.choices import Choices
from evolvenet.execution.early_stop import Finished
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.residual_sums import ResidualSumMode
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import Tie, WidthGraph
from evolvenet.measurement.activation_moments import ActivationMoments, Halves, gather, halves_on_host
from evolvenet.measurement.weight_uses import UseRecorder, WeightUses
from evolvenet.pruning.reconstruction import fit_to_targets
from evolvenet.pruning.reconstruction_batch import ReconstructionLimits
from evolvenet.pruning.recorded_outputs import OutputRecorder, consumers_of, recorded
from evolvenet.pruning.recording import Recording
from evolvenet.pruning.selection import add_refits, chosen, with_deltas
from evolvenet.surgery.basis_change import BasisChange
from evolvenet.surgery.resize_model import Surgery, check_finite, compile_surgery


@dataclass(frozen=True, eq=False)
class StreamedCut:
    """A cut, and what its consumers are fitted to.

    Args:
        bare: the cut.
        surgery: the same, with refits of all consumers to the moments.
        recording: the outputs, for `fit_to_targets`.
    """

    bare: Surgery
    surgery: Surgery
    recording: Recording


def fit_streamed(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    batch: Any,
    held_out: Tensor,
    limits: ReconstructionLimits,
) -> tuple[Surgery, Surgery] | None:
    """The cut of `plan_streamed`, and the same with the fit to the outputs; arguments and errors are those of `plan_streamed`.

    A consumer whose error this fit does not lower keeps its refit to the moments, and the consumers after it are fitted to what
    it puts out with that.

    Returns:
        Both, or None as `plan_streamed`.
    """
    cut = plan_streamed(model, graph, sizes, batch, held_out, limits)
    return None if cut is None else (cut.bare, fit_to_targets(model, graph, cut.surgery, cut.recording))


def plan_streamed(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    batch: Any,
    held_out: Tensor,
    limits: ReconstructionLimits,
) -> StreamedCut | None:
    """`plan_prune` with the moments of one batch, of which only those of one width are in memory.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}.
        batch: inputs of the model: all samples.
        held_out: `[samples]` booleans, see `evolvenet.execution.sampling.held_out`.
        limits: on the outputs that are recorded in the same run.

    Returns:
        The cut and the recorded outputs. None if a consumer does not take as many places of every sample in as many calls as
        on the first one: when it has run for the last time is not known then.

    Raises:
        ResizeError, SpectrumError: as `plan_prune`.
    """
    cut = [graph.widths[name].name for name, size in sizes.items() if size != graph.widths[name].size]
    calls, places, uses = _first_sample(model, graph, sizes, first_samples(batch, 1))
    plan = _Plan(model, graph, sizes, uses, held_out, calls, places)
    for name, waiting in plan.waiting.items():
        if not waiting:
            plan.finish(name)
    recorder = OutputRecorder(consumers_of(graph, cut), limits)
    targets = recorded(model, batch, recorder, graph.differentiates, choices := Choices(), plan.add)
    for name in [name for name, waiting in plan.waiting.items() if waiting]:
        plan.finish(name)
    if plan.late:
        return None
    bare = check_finite(compile_surgery(model, graph, plan.maps, plan.bases))
    recording = Recording(batch, targets, held_out, choices, rounds=limits.rounds)
    return StreamedCut(bare, with_deltas(model, bare, plan.deltas), recording)


def _first_sample(
    model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int], sample: Any
) -> tuple[Counter[Tie], Counter[Tie], WeightUses]:
    """From a run on one sample: how often each consumer of the widths runs, at how many places, what weights are used for."""
    calls, places, uses = Counter[Tie](), Counter[Tie](), UseRecorder(model)
    by_tensor: dict[str, list[Tie]] = {}
    for name in sizes:
        for tie in graph.widths[name].consumers:
            by_tensor.setdefault(tie.tensor, []).append(tie)

    def count(op: WeightOp) -> None:
        for tie in by_tensor.get(op.tensor, ()):
            if tie.dim == op.axis:
                calls[tie] += 1
                places[tie] += op.input_positions

    def after(op: WeightOp, out: Tensor) -> None:
        uses.add_op(op)

    mode = ResidualSumMode(model, count, after, None, uses.add_bias)
    with isolated(model, gradients=graph.differentiates), op_by_op(mode):
        run_model(model, sample)
    uses.add_other_uses(mode.other_uses)
    return calls, places, uses.found(graph)


@dataclass
class _Plan:
    """What is known of a cut so far.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}.
        uses: of the weights.
        held_out: `[samples]` booleans.
        calls: how often each consumer runs.
        places: at how many places of one sample.

    Attributes:
        waiting: {width: how many calls of its consumers are still to come}; of those that are finished 0.
        late: whether a consumer has run at another number of places, or after its width was finished.
    """

    model: nn.Module
    graph: WidthGraph
    sizes: Mapping[str, int]
    uses: WeightUses
    held_out: Tensor
    calls: Counter[Tie]
    places: Counter[Tie]
    maps: dict[str, IndexMap] = field(default_factory=dict)
    bases: dict[str, BasisChange] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    late: bool = False

    def __post_init__(self) -> None:
        widths = {self.graph.widths[name].name: self.graph.widths[name] for name in self.sizes}
        self.waiting = {name: sum(self.calls[tie] for tie in width.consumers) for name, width in widths.items()}
        self._sizes = {self.graph.widths[name].name: size for name, size in self.sizes.items()}
        self._seen = Counter[Tie]()
        self._moments: dict[str, dict[Tie, Halves]] = {name: {} for name in widths}
        self._owners: dict[str, list[tuple[str, Tie]]] = {}
        for name, width in widths.items():
            for tie in width.consumers:
                self._owners.setdefault(tie.tensor, []).append((name, tie))

    def add(self, op: WeightOp) -> None:
        """Add the inputs of a weight op; finish the widths for which it was the last one."""
        done: list[str] = []
        for name, tie in self._owners.get(op.tensor, ()):
            if tie.dim != op.axis:
                continue
            if not self.waiting[name]:
                self.late = True
                continue
            halves = self._moments[name].setdefault(tie, Halves(self.graph.widths[name].size))
            gather({op.tensor: {tie: halves}}, self.held_out, op)
            self._seen[tie] += op.input_positions
            self.waiting[name] -= 1
            if not self.waiting[name]:
                done.append(name)
        for name in done:
            self.finish(name)
        if self.late:
            raise Finished

    def finish(self, name: str) -> None:
        """Choose the units of a width and reconstruct the others from them in its consumers; its moments are given up."""
        self.waiting[name] = 0
        ties, samples = self.graph.widths[name].consumers, len(self.held_out)
        self.late |= any(self._seen[tie] != samples * self.places[tie] for tie in ties)
        if self.late:
            return
        found = {tie: halves for tie, halves in self._moments.pop(name).items() if halves.seen}
        statistics = ActivationMoments(*halves_on_host(found), self.uses)
        maps, bases = chosen(self.model, self.graph, {name: self._sizes[name]}, statistics)
        self.maps |= maps
        self.bases |= bases
        add_refits(self.deltas, self.model, self.graph, maps, statistics, bases)
