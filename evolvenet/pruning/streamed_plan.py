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

from evolvenet.errors import concerning
from evolvenet.execution.choices import Choices
from evolvenet.execution.early_stop import Finished
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.residual_sums import ResidualSumMode
from evolvenet.execution.sampling import evenly
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import Tie, WidthGraph
from evolvenet.linalg.host_transfers import to_device
from evolvenet.measurement.activation_moments import CAP, ActivationMoments, Halves, gather, halves_on_host
from evolvenet.measurement.weight_uses import UseRecorder, WeightUses
from evolvenet.pruning.reconstruction import fit_to_targets
from evolvenet.pruning.reconstruction_batch import ReconstructionLimits
from evolvenet.pruning.recorded_outputs import OutputRecorder, consumers_of, recorded
from evolvenet.pruning.recording import Recording
from evolvenet.pruning.selection import add_refits, chosen, refit_columns, with_deltas
from evolvenet.surgery.basis_change import BasisChange
from evolvenet.surgery.resize_model import Surgery, check_finite, compile_surgery


@dataclass(frozen=True, eq=False)
class StreamedCut:
    """A cut, and what its consumers are fitted to.

    Args:
        bare: the cut.
        surgery: the same, with refits of those consumers that are not fitted to their outputs.
        recording: the outputs, for `fit_to_targets`, and the refits of the others for where that fit fails.
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

    A consumer whose error this fit does not lower gets its refit to the moments, and the consumers after it are fitted to what
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

    Consumers that `fit_to_targets` fits afterwards to the same samples do not start from their refits to the moments: with and
    without that the outputs of a language model with 25, 50 and 75 % of its inner units removed were equally far from those
    before. They get them where that fit fails.

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
    recorder = OutputRecorder(consumers_of(graph, cut), limits)
    calls, places, uses, fitted = _first_sample(model, graph, sizes, first_samples(batch, 1), recorder)
    plan = _Plan(model, graph, sizes, uses, held_out, calls, places, fitted)
    for name, waiting in plan.waiting.items():
        if not waiting:
            plan.finish(name)
    recorder = OutputRecorder(recorder.consumers, recorder.limits)
    targets = recorded(model, batch, recorder, graph.differentiates, choices := Choices(), plan.add)
    for name in [name for name, waiting in plan.waiting.items() if waiting]:
        plan.finish(name)
    if plan.late:
        return None
    bare = check_finite(compile_surgery(model, graph, plan.maps, plan.bases))
    recording = Recording(batch, targets, held_out, choices, rounds=limits.rounds, fallbacks=plan.fallbacks(bare))
    return StreamedCut(bare, with_deltas(model, bare, plan.deltas), recording)


def _first_sample(
    model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int], sample: Any, recorder: OutputRecorder
) -> tuple[Counter[Tie], Counter[Tie], WeightUses, frozenset[str]]:
    """Counts and uses of the weights, from a run on one sample.

    Returns:
        How often each consumer of the widths runs, at how many places, what weights are used for, and which consumers will be
        fitted to their outputs as a whole: stacked ones may not be, it depends on the samples.
    """
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
        recorder.record(op, out)

    def on_bias(*found: Any) -> None:
        uses.add_bias(*found)
        recorder.bias(*found)

    mode = ResidualSumMode(model, count, after, recorder.sum, on_bias)
    with isolated(model, gradients=graph.differentiates), op_by_op(mode):
        run_model(model, sample)
    uses.add_other_uses(mode.other_uses)
    usable = recorder.usable(mode.other_uses)
    fitted = frozenset(name for name, targets in usable.items() if len(targets) == 1 and targets[0].group is None)
    return calls, places, uses.found(graph), fitted


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
        fitted: consumers that are fitted to their outputs afterwards.

    Attributes:
        deltas: {tensor: its change} by the refits of the other consumers.
        fallback_deltas: {tensor: its change} by those of the fitted ones.
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
    fitted: frozenset[str]
    maps: dict[str, IndexMap] = field(default_factory=dict)
    bases: dict[str, BasisChange] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    fallback_deltas: dict[str, Tensor] = field(default_factory=dict)
    late: bool = False

    def __post_init__(self) -> None:
        widths = {self.graph.widths[name].name: self.graph.widths[name] for name in self.sizes}
        self.waiting = {name: sum(self.calls[tie] for tie in width.consumers) for name, width in widths.items()}
        self._sizes = {self.graph.widths[name].name: size for name, size in self.sizes.items()}
        self._seen = Counter[Tie]()
        self._moments: dict[str, dict[Tie, Halves]] = {name: {} for name in widths}
        self._rows: dict[Tie, tuple[Tensor, Tensor]] = {}
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
            self._keep_rows(name, tie, op)
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
        rows = {tie: self._rows.pop(tie) for tie in ties if tie in self._rows}
        self.late |= any(self._seen[tie] != samples * self.places[tie] for tie in ties)
        if self.late:
            return
        found = {tie: halves for tie, halves in self._moments.pop(name).items() if halves.seen}
        statistics = ActivationMoments(*halves_on_host(found), self.uses)
        maps, bases = chosen(self.model, self.graph, {name: self._sizes[name]}, statistics)
        self.maps |= maps
        self.bases |= bases
        add_refits(self.deltas, self.model, self.graph, maps, statistics, bases, self.fitted)
        if name in maps and name not in bases:
            self._add_fallbacks(name, maps[name], statistics, rows)

    def _add_fallbacks(
        self, name: str, index_map: IndexMap, statistics: ActivationMoments, rows: Mapping[Tie, tuple[Tensor, Tensor]]
    ) -> None:
        for tie in self.graph.widths[name].consumers:
            if tie.tensor not in self.fitted or tie not in statistics or not statistics.is_refittable(tie):
                continue
            part = index_map.part(tie.part)
            with concerning(name):
                for tensor, delta in refit_columns(self.model, tie, part, statistics, rows.get(tie)):
                    # Kept until all is planned, so in the type of the weight.
                    kept = delta.to(self.model.get_parameter(tensor).dtype)
                    self.fallback_deltas[tensor] = self.fallback_deltas.get(tensor, 0) + kept

    def fallbacks(self, bare: Surgery) -> dict[str, Tensor]:
        """{tensor: its value after the cut} with the refits of the fitted consumers."""
        deltas = {name: delta + self.deltas.get(name, 0) for name, delta in self.fallback_deltas.items()}
        self.fallback_deltas.clear()
        return {each.name: each.value for each in with_deltas(self.model, bare, deltas).changes if each.name in deltas}

    def _keep_rows(self, name: str, tie: Tie, op: WeightOp) -> None:
        """Keep the inputs of a dense consumer where they are few: the dual form of a fit needs them."""
        size, row = self.graph.widths[name].size, evenly(op.input_positions, CAP)
        whole = op.geometry is None and len(op.weight) == self.graph.shapes[op.tensor][op.output_axis]
        alone = tie.tensor in self.fitted and self.calls[tie] == tie.repeat == 1
        if alone and whole and len(row) < 2 * self._sizes[name]:
            inputs = op.inputs[:, tie.start : tie.start + size].detach()
            odd = self.held_out[row * len(self.held_out) // op.input_positions]
            self._rows[tie] = inputs[to_device(row, inputs.device)], odd
