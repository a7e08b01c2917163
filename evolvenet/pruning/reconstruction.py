"""Sequential compensation: after a cut every reader is fitted, in execution order, to what it used to answer.

A reader that is fitted to the units it has lost knows nothing of what the readers before it still get wrong. Here each
one is fitted on the inputs that it now really gets, errors from before included, against its original outputs: one
forward pass of the uncut model that remembers outputs, one of the cut model that stops at every reader and fits it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from evolvenet.execution.inputs import first_samples
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.residual_sums import ResidualSumMode, TrackedOutput
from evolvenet.execution.sampling import evenly, samples_in
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp, output_positions
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import FOLLOWS, WidthGraph
from evolvenet.linalg.ridge import fit_reader
from evolvenet.surgery.resize_model import Surgery, TensorChange, compile_surgery, install


@dataclass(frozen=True)
class Effort:
    """How much a compensation may cost.

    Args:
        samples: most samples of the batches that are used.
        entries: most entries of the inputs that are used: all run in one pass, and a thousand photographs would not fit
            in memory.
        rows: most places (samples × positions) that one reader is fitted on.
        work: most multiplications for the products of one reader's inputs with each other.
    """

    samples: int
    entries: int
    rows: int
    work: float

    def rows_for(self, columns: int) -> int:
        """Places to fit a matrix of so many columns on.

        >>> QUICK.rows_for(100), QUICK.rows_for(2304)
        (2048, 465)
        """
        squared = int((self.work / columns) ** 0.5)
        fitting = squared if squared < 2 * columns else int(self.work / columns**2)
        return max(16, min(self.rows, fitting))


THOROUGH = Effort(samples=1024, entries=8_000_000, rows=8192, work=4e10)
"""For one cut: a thousand images were enough on MNIST."""

QUICK = Effort(samples=256, entries=8_000_000, rows=2048, work=5e8)
"""For the cuts of a training run, which comes back to every weight."""


def reconstruct(
    model: nn.Module, graph: WidthGraph, surgery: Surgery, batches: Iterable[Any], effort: Effort = THOROUGH
) -> Surgery:
    """The surgery with every reader of a cut width fitted to its original outputs. Nothing is changed yet.

    A reader is a weight that is multiplied with data, in a dense product or a convolution of any kind, whatever module it
    belongs to; grouped and depthwise kernels group by group. It is left as cut if its entries are used twice in a forward
    pass or by any other op. Where what a reader makes is added to something of the same shape, as at the end of a residual
    block, it is fitted at that sum, so that it makes up for the shortcut's errors too. The fit is ridge least squares
    towards what the surgery holds; the bias takes the mean, or the running mean of a batch norm right after it. What the
    surgery holds is the fit of `plan_prune`, exact where units depend on each other, and all that other readers get. One
    half of the samples chooses the ridge that was fitted on the other half; a reader for which none beats the weights as
    they are keeps them.

    Args:
        model: the model, uncut.
        graph: its widths.
        surgery: what is going to be done to it.
        batches: inputs of the model.
        effort: how many of them are used, and how.

    Returns:
        The surgery with other values for the readers' weights and biases.

    >>> from evolvenet.graph.index_map import IndexMap
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> graph = trace(model, torch.zeros(1, 2))
    >>> cut = compile_surgery(model, graph, {"0": IndexMap.keep([0], size=2)})
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> fitted = reconstruct(model, graph, cut, [x])
    >>> undo, before = install(model, fitted), model(x)
    >>> undo()
    >>> bool((before - model(x)).abs().max() < 1e-3)
    True
    """
    batch = _joined(batches, effort)
    readers = _readers(graph, surgery)
    if batch is None or not readers:
        return surgery
    goals = _Goals(readers, effort)
    with isolated(model), op_by_op(mode := ResidualSumMode(model, None, goals.read, goals.sum, goals.bias)):
        run_model(model, batch)
    kept = goals.usable(mode.other_uses)
    if not kept:
        return surgery
    changes = {change.name: change for change in surgery.changes}
    with isolated(model, shadows=True):
        install(model, compile_surgery(model, graph, surgery.maps))
        shadows, _, _ = named_tensors(model)
        with torch.no_grad():
            for name, change in changes.items():
                shadows[name].copy_(change.value)
        fits = _Fits(kept, changes, samples_in(batch), shadows)
        with isolated(model), op_by_op(ResidualSumMode(model, fits.read, None, fits.sum)):
            run_model(model, batch)
        fitted = {name: shadows[name].detach().clone() for name in fits.touched}
    tensors, _, _ = named_tensors(model)
    for name, value in fitted.items():
        tensor = tensors[name]
        change = changes.get(name) or TensorChange(tensor, name, {}, tensor.detach())
        changes[name] = replace(change, value=value.to(tensor.device, tensor.dtype))
    return replace(surgery, changes=tuple(changes.values()))


def _readers(graph: WidthGraph, surgery: Surgery) -> frozenset[str]:
    """The weights that read a cut width; kernels that go with its units (depthwise ones) see the errors of others."""
    return frozenset(
        tie.tensor
        for name, index_map in surgery.maps.items()
        if index_map.removed
        for tie in (*graph.widths[name].consumers, *(tie for tie in graph.widths[name].ties if tie.role == FOLLOWS))
        if tie.tensor in graph.trainable and len(graph.shapes[tie.tensor]) > 1
    )


@dataclass(frozen=True, eq=False)
class Goal:
    """What a reader of the uncut model answered.

    Args:
        start: first of its rows in the weight.
        length: their number.
        axis: along which the weight reads.
        bias: name and place of its bias, or of the running mean that can take one off.
        rows: numbers of the output places that are compared.
        places: number of all output places.
        outputs: `[rows, out]`, of the sum that the reader ends in if `summed`.
        summed: whether it is to be fitted at that sum.
        late: the sign with which the bias is added in an op of its own, `outputs` being without it; 0 if it is not.
    """

    start: int
    length: int
    axis: int
    bias: tuple[str, int] | None
    rows: Tensor
    places: int
    outputs: Tensor
    summed: bool = False
    late: int = 0


class _Goals:
    """Remembers what the readers of the uncut model answer, in the order in which they do."""

    def __init__(self, readers: frozenset[str], effort: Effort) -> None:
        self.readers, self.effort = readers, effort
        self.found: dict[str, list[Goal]] = {}
        self.biases: Counter[tuple[str, int]] = Counter()
        # Weak, or every reader's input would stay in memory until the end of the pass.
        self._place: WeakKeyDictionary[WeightOp, tuple[str, int]] = WeakKeyDictionary()

    def read(self, op: WeightOp, out: Tensor) -> None:
        bias = None if op.bias is None or op.bias_name is None else (op.bias_name, int(op.bias.storage_offset()))
        if bias is not None:
            self.biases[bias] += 1
        if op.tensor not in self.readers:
            return
        total = output_positions(op, out)
        rows = evenly(total, self.effort.rows_for(op.matrix().shape[-1])).to(out.device)
        outputs = op.outputs_at(out, rows).movedim(0, 1).flatten(1)
        goals = self.found.setdefault(op.tensor, [])
        self._place[op] = (op.tensor, len(goals))
        goals.append(Goal(op.start, len(op.weight), op.axis, bias, rows, total, outputs))

    def sum(self, output: TrackedOutput, own: Tensor, other: Tensor) -> None:
        if output.op in self._place:
            name, index = self._place[output.op]
            goal = self.found[name][index]
            summed = output.values_at(own, goal.rows) + output.values_at(other, goal.rows)
            self.found[name][index] = replace(goal, outputs=summed, summed=True)

    def bias(self, op: WeightOp, name: str, sign: int) -> None:
        self.biases[name, 0] += 1
        if op in self._place:
            tensor, index = self._place[op]
            if self.found[tensor][index].bias is None:
                self.found[tensor][index] = replace(self.found[tensor][index], bias=(name, 0), late=sign)

    def usable(self, others: set[str]) -> dict[str, list[Goal]]:
        """The weights that nothing else uses, and no entry of which is used twice."""
        found = {}
        for name, goals in self.found.items():
            spans = sorted((goal.start, goal.start + goal.length) for goal in goals)
            apart = all(one[1] <= two[0] for one, two in pairwise(spans))
            own = all(
                goal.bias is None or (self.biases[goal.bias] == 1 and (goal.late < 0 or goal.bias[0] not in others))
                for goal in goals
            )
            if apart and own and name not in others:
                found[name] = goals
        return found


class _Fits:
    """Fits each reader of the cut model before it runs, or at the sum that it ends in."""

    def __init__(
        self,
        goals: dict[str, list[Goal]],
        changes: dict[str, TensorChange],
        samples: int,
        shadows: Mapping[str, Tensor],
    ) -> None:
        self.goals = {name: list(each) for name, each in goals.items()}
        self.changes, self.samples, self.shadows = changes, samples, shadows
        self.touched: set[str] = set()
        self._waiting: dict[WeightOp, Goal] = {}

    def read(self, op: WeightOp) -> None:
        if not self.goals.get(op.tensor):
            return
        goal = self.goals[op.tensor].pop(0)
        if goal.summed:
            self._waiting[op] = goal
        else:
            self._fit(op, goal, self._kept(op, goal))

    def sum(self, output: TrackedOutput, own: Tensor, other: Tensor) -> None:
        goal = self._waiting.pop(output.op, None)
        if goal is None:
            return
        summed = self._kept(output.op, goal)
        if summed.shape[1] != len(output.op.weight):
            return
        # A unit that the norm after it switches off has nothing to be fitted to.
        off = output.scale.abs() < 1e-6 * output.scale.abs().max()
        missing = summed - output.values_at(own, goal.rows) - output.values_at(other, goal.rows)
        step = missing.masked_fill(off, 0) / output.scale.masked_fill(off, 1)
        answers = output.op.outputs_at(output.recompute(), goal.rows).movedim(0, 1).flatten(1)
        if (offset := self._fit(output.op, goal, answers + step)) is not None:
            own.copy_(output.recomputed(own, offset if goal.late else 0.0))

    def _kept(self, op: WeightOp, goal: Goal) -> Tensor:
        """The goal's outputs of the units that the cut model still has."""
        change = self.changes.get(op.tensor)
        kept = change.axes.get(1 - goal.axis) if change else None
        if kept is None:
            return goal.outputs
        ends = goal.start, goal.start + goal.length
        return goal.outputs[:, [index - goal.start for index in kept.indices if ends[0] <= index < ends[1]]]

    def _fit(self, op: WeightOp, goal: Goal, outputs: Tensor) -> Tensor | None:
        """Fit the weight and the bias in place; what the bias has gained `[out]`, or None if nothing moved."""
        bias = self.shadows[goal.bias[0]] if goal.late and goal.bias else op.bias
        if outputs.shape[1] != len(op.weight) or (bias is None) != (goal.bias is None):
            return None
        wanted = outputs.reshape(len(outputs), op.groups, -1).movedim(1, 0)
        start = None if bias is None else (bias * (not goal.late)).reshape(op.groups, -1)
        odd = goal.rows * self.samples // goal.places % 2 == 1
        made = fit_reader(op.columns(goal.rows), wanted, op.matrix(), start, odd)
        if made is None:
            return None
        op.write_matrix(made[0].to(op.weight.dtype))
        self.touched.add(op.tensor)
        gained = (made[1] if start is None else made[1] - start).flatten()
        if bias is not None and goal.bias is not None:
            bias.add_(gained * (goal.late or 1))
            self.touched.add(goal.bias[0])
        return gained.to(op.weight.dtype)


def _joined(batches: Iterable[Any], effort: Effort) -> Any:
    """The batches as one, or the first alone where their leaves cannot be put together; no more than is to be used."""
    made = list(batches)
    if not made:
        return None
    flat = [tree_flatten(batch) for batch in made]
    leaves = [each[0] for each in flat]
    sizes = [{len(leaf) for leaf in each if isinstance(leaf, Tensor) and leaf.dim()} for each in leaves]
    alike = all(
        len(size) == 1 and len(each) == len(leaves[0]) and all(isinstance(leaf, Tensor) and leaf.dim() for leaf in each)
        for size, each in zip(sizes, leaves, strict=True)
    )
    shapes = [[leaf.shape[1:] for leaf in each] for each in leaves] if alike else []
    if not alike or any(shape != shapes[0] for shape in shapes):
        return _few(made[0], effort)
    return _few(tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], flat[0][1]), effort)


def _few(batch: Any, effort: Effort) -> Any:
    """As many samples as fit the limits."""
    sizes = [
        leaf[0].numel() for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf)
    ]
    return first_samples(batch, max(2, min(effort.samples, effort.entries // max([1, *sizes]))))
