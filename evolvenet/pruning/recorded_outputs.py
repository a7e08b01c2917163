"""What a model's consumers put out on a batch, recorded for fits to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from evolvenet.errors import concerning
from evolvenet.execution.choices import Choices
from evolvenet.execution.early_stop import Finished, without_cache, without_logits
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.op_cache import OpCache
from evolvenet.execution.residual_sums import ResidualSumMode, TrackedOutput
from evolvenet.execution.sampling import evenly
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp, output_positions
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import FOLLOWS, WidthGraph
from evolvenet.linalg.host_transfers import to_device
from evolvenet.measurement.weight_uses import UseRecorder
from evolvenet.pruning.reconstruction_batch import ReconstructionLimits
from evolvenet.pruning.target import Target


def consumers_of(graph: WidthGraph, names: Iterable[str]) -> frozenset[str]:
    """The weights that consume some widths, and kernels that follow one: depthwise ones pass errors of their inputs on."""
    return frozenset(
        tie.tensor
        for width in map(graph.widths.__getitem__, names)
        for tie in (*width.consumers, *(tie for tie in width.ties if tie.role == FOLLOWS))
        if tie.tensor in graph.trainable and len(graph.shapes[tie.tensor]) > 1
    )


class OutputRecorder:
    """Records the outputs of the consumers of the uncut model, in execution order.

    Args:
        consumers: names of their weights.
        limits: on the number of output positions.
    """

    def __init__(self, consumers: frozenset[str], limits: ReconstructionLimits) -> None:
        self.consumers, self.limits = consumers, limits
        self.targets: dict[str, list[Target]] = {}
        self.bias_uses: Counter[tuple[str, int]] = Counter()
        # Weak, or every consumer's input would stay in memory until the end of the pass.
        self._index: WeakKeyDictionary[WeightOp, tuple[str, int]] = WeakKeyDictionary()
        self._added: WeakKeyDictionary[WeightOp, Tensor] = WeakKeyDictionary()

    def record(self, op: WeightOp, out: Tensor) -> None:
        """Record the outputs of a weight op."""
        bias = None if op.bias is None or op.bias_name is None else (op.bias_name, int(op.bias.storage_offset()))
        if bias is not None:
            self.bias_uses[bias] += 1
        if op.tensor not in self.consumers or op.weight.is_complex():
            return
        with concerning((op.tensor, op.axis)):
            self._record(op, out, bias)

    def _record(self, op: WeightOp, out: Tensor, bias: tuple[str, int] | None) -> None:
        total = output_positions(op, out)
        on_host = evenly(total, self.limits.rows_for(op.matrix().shape[-1]))
        rows = to_device(on_host, out.device)
        outputs = op.products_at(out, rows).movedim(0, 1).flatten(1)
        targets = self.targets.setdefault(op.tensor, [])
        self._index[op] = (op.tensor, len(targets))
        group = op.group if op.stacked else None
        place = op.start, len(op.weight), op.axis
        targets.append(Target(*place, bias, rows, on_host, total, op.input_positions, outputs, group=group))

    def sum(self, output: TrackedOutput, own: Tensor, other: Tensor) -> None:
        """See `ResidualSumMode`."""
        if output.op in self._index:
            name, index = self._index[output.op]
            target = self.targets[name][index]
            summed = output.values_at(own, target.rows) + output.values_at(other, target.rows)
            self.targets[name][index] = replace(target, outputs=summed, summed=True)

    def bias(self, op: WeightOp, name: str, values: Tensor | None, sign: int) -> None:
        """See `ResidualSumMode`."""
        self.bias_uses[name, 0] += 1
        if op in self._index:
            tensor, index = self._index[op]
            target = self.targets[tensor][index]
            if target.bias is None:
                target = replace(target, bias=(name, 0), bias_sign=sign, is_mean=values is None)
                outputs = target.outputs if values is None else target.outputs + values
                if values is not None:
                    self._added[op] = values
                self.targets[tensor][index] = replace(target, outputs=outputs)

    def use(self, op: WeightOp, output: TrackedOutput | None, rectified: bool) -> None:
        """See `ResidualSumMode`."""
        if op not in self._index:
            return
        tensor, index = self._index[op]
        target = self.targets[tensor][index]
        if not rectified or target.rectified is not None:
            # What is used twice may be needed where it is negative.
            target = replace(target, rectified=False)
        elif output is None or output.op.weight_first:
            target = replace(target, rectified=target.summed)
        elif not target.summed:
            # The bias of an op of its own is in the outputs, and in the shift.
            apart = self._added.get(op, 0)
            target = replace(target, rectified=True, floor=apart - output.shift / output.scale, slope=output.scale)
        self.targets[tensor][index] = target

    def usable(self, other_uses: set[str]) -> dict[str, list[Target]]:
        """The targets of weights that nothing else uses, and no entry of which is used twice."""

        def own_bias(target: Target) -> bool:
            shared = target.bias is not None and not target.is_mean and target.bias[0] in other_uses
            return target.bias is None or (self.bias_uses[target.bias] == 1 and not shared)

        found: dict[str, list[Target]] = {}
        for name, targets in self.targets.items():
            spans = sorted((target.group or 0, target.start, target.start + target.length) for target in targets)
            disjoint = all(one[0] < two[0] or one[2] <= two[1] for one, two in pairwise(spans))
            if disjoint and name not in other_uses and all(own_bias(target) for target in targets):
                found[name] = targets
        return found


def recorded(
    model: nn.Module,
    batch: Any,
    recorder: OutputRecorder,
    gradients: bool,
    choices: Choices | None = None,
    before: Callable[[WeightOp], None] | None = None,
    cache: OpCache | None = None,
) -> dict[str, list[Target]]:
    """What consumers put out on a batch, as far as they can be fitted to it.

    Args:
        model: uncut.
        batch: inputs of it.
        recorder: of the outputs.
        gradients: whether autograd is on.
        choices: those of routers are recorded there.
        before: called with each weight op before it runs, but for those of weight norm; it may raise `Finished`.
        cache: of results of the model's ops; not with `gradients`.
    """

    def add(op: WeightOp) -> None:
        # What weight norm makes of a direction is multiplied with data, not the direction itself.
        if before is not None and op.tensor not in mode.normed:
            before(op)

    mode = ResidualSumMode(model, add, recorder.record, recorder.sum, recorder.bias, recorder.use)
    mode.follows_norms, mode.choices = True, choices
    tensors, _, _ = named_tensors(model)
    batch = without_cache(model, without_logits(model, batch, [tensors[name] for name in recorder.consumers]))
    again = nullcontext() if cache is None else cache.on(model, batch, ())
    with isolated(model, gradients=gradients), again, op_by_op(mode), suppress(Finished):
        # What is returned is used by others, who may need it where it is negative.
        mode.report_uses(run_model(model, batch), rectified=False)
    return recorder.usable(mode.other_uses)


class OutputsBeside:
    """Records the outputs of consumers in the run for the moments, which is one run less than `recorded` takes.

    Args:
        consumers: names of their weights.
        limits: on the number of output positions.

    Attributes:
        choices: of the model's routers.
        targets: as from `recorded`; empty before the run.
    """

    def __init__(self, consumers: frozenset[str], limits: ReconstructionLimits) -> None:
        self._recorder, self.choices = OutputRecorder(consumers, limits), Choices()
        self.targets: dict[str, list[Target]] = {}

    def mode(self, model: nn.Module, before: Callable[[WeightOp], None], uses: UseRecorder) -> ResidualSumMode:
        """See `RunBeside`. A product with a weight that weight norm has computed has outputs, and counts as no use of its own."""
        recorder = self._recorder

        def add(op: WeightOp) -> None:
            if op.tensor not in mode.normed:
                before(op)

        def after(op: WeightOp, out: Tensor) -> None:
            if op.tensor not in mode.normed:
                uses.add_op(op)
            elif op.bias_name is not None:
                uses.add_other_uses([op.bias_name])
            recorder.record(op, out)

        def on_bias(op: WeightOp, name: str, values: Tensor | None, sign: int) -> None:
            if op.tensor not in mode.normed:
                uses.add_bias(op, name, values, sign)
            elif values is not None:
                uses.add_other_uses([name])
            recorder.bias(op, name, values, sign)

        mode = ResidualSumMode(model, add, after, recorder.sum, on_bias, recorder.use)
        mode.follows_norms, mode.choices = True, self.choices
        return mode

    def finish(self, mode: ResidualSumMode, result: Any) -> None:
        """See `RunBeside`."""
        # What is returned is used by others, who may need it where it is negative.
        mode.report_uses(result, rectified=False)
        self.targets = self._recorder.usable(mode.other_uses)
