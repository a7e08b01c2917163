"""Factors fitted to outputs: one pass observes the whole layers, a second one fits the factors one layer after the other.

The first pass records the second moment of every layer's inputs and its outputs. In the second one each layer is fitted,
before it runs, on the inputs that it gets behind the layers fitted so far to the outputs that it had in the first:

1. the whole weight by ridge least squares, which makes up for the errors of the layers before it;
2. its factors, weighted by the second moment of these inputs;
3. the last factor by ridge least squares again, and with it the bias, or the running mean of a batch norm right after it.

That is the asymmetric reconstruction of Zhang et al. (2016), as after a cut of widths; see `pruning.reconstruction`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import SpectrumError, TraceError
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.own_gradients import GradientsNeededError, own_gradients
from evolvenet.execution.residual_sums import ResidualSumMode
from evolvenet.execution.sampling import evenly, samples_in
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp, output_positions
from evolvenet.graph.naming import named_tensors
from evolvenet.linalg.host_transfers import to_device
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.ridge import Fit, refit_or_keep
from evolvenet.linalg.shrinkage import shrunk_covariance
from evolvenet.lowrank.base import Kind
from evolvenet.lowrank.layers import written
from evolvenet.lowrank.plan import Choice, SecondMoments, decomposed
from evolvenet.lowrank.targets import Target as Layer
from evolvenet.measurement.activation_moments import Moments, moments_on_host
from evolvenet.pruning.reconstruction import ConsumerFitter
from evolvenet.pruning.reconstruction_batch import ONE_SHOT_LIMITS, ReconstructionLimits, concatenated, held_out_of
from evolvenet.pruning.recorded_outputs import OutputRecorder, recorded
from evolvenet.pruning.target import Target

log = logging.getLogger(__name__)

MOST_COLUMNS = 6144
"""Columns of a weight up to which the second moment of its inputs is computed; a wider layer is decomposed by its weight."""


@dataclass(frozen=True)
class Extent:
    """Sizes of the inputs and outputs of one call of a layer.

    Args:
        before: of the input on each spatial axis; empty for a dense layer.
        after: of the output on each spatial axis.
        transposed: whether it is a transposed convolution.
        times: inputs of this size for each sample of the batch; of a dense layer the positions of a sample.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    transposed: bool
    times: float

    @classmethod
    def of(cls, op: WeightOp, out: Tensor, samples: int) -> Extent:
        """Of a weight op with its output, in a batch of so many samples."""
        space = (tuple(op.inputs.shape[2:]), tuple(out.shape[2:])) if op.geometry else ((), ())
        return cls(*space, op.geometry is not None and op.axis == 0, len(out) / samples)


@dataclass(frozen=True, eq=False)
class Observations:
    """What the first pass recorded.

    Args:
        batch: the inputs of the model.
        names: {name of a layer: name of its weight}.
        moments: {name of a layer: second moment of its inputs for each channel group}, about the mean where the layer has an
            offset that can take up a change of the mean.
        means: {name of a layer: mean of its inputs for each channel group}, in the order of the moments.
        targets: {name of a weight: its outputs}, of those that can be fitted.
        matrices: {name of a weight: `[groups, out / groups, columns]`}.
        extents: {name of a layer: sizes of its inputs and outputs in each call}, in the order of execution.
        held_out: `[samples]` booleans: the samples on which ridges are selected, other batches than those of the fit.
        gradients: whether the model only runs with autograd on, because its own code computes gradients.
    """

    batch: Any
    names: Mapping[str, str]
    moments: SecondMoments
    means: Mapping[str, Sequence[Tensor]]
    targets: Mapping[str, list[Target]]
    matrices: Mapping[str, Tensor]
    extents: Mapping[str, Sequence[Extent]]
    held_out: Tensor
    gradients: bool = False


@dataclass(frozen=True, eq=False)
class Fitted:
    """The factors, and what changes beside them.

    Args:
        factors: {name of a layer: its factors, for each channel group}.
        errors: {name of a layer: Σ‖ŷ − y‖² / Σ‖y − mean‖²}, of those that were fitted.
        values: {name of a bias or a running mean: its new value}.
    """

    factors: Mapping[str, Sequence[Sequence[Tensor]]]
    errors: Mapping[str, float]
    values: Mapping[str, Tensor]


def observe(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any], limits: ReconstructionLimits = ONE_SHOT_LIMITS
) -> Observations:
    """Run the model once and record inputs and outputs of some layers.

    Args:
        model: with whole layers; it is left as it was.
        layers: which may be factorized.
        batches: inputs of the model; only the first one where they cannot be concatenated.
        limits: how many of them are used.

    Raises:
        TraceError: if there is no batch.
        SpectrumError: for NaN or infinite inputs of a layer.
    """
    if isinstance(batches, Tensor):
        raise TraceError("Batches: expected an iterable of model inputs, got one tensor. Wrap it in a list: [inputs].")
    listed = list(batches)
    batch = concatenated(listed, limits)
    if batch is None:
        raise TraceError("Batches: expected at least one batch of model inputs, got none.")
    by_tensor = {id(tensor): name for name, tensor in named_tensors(model)[0].items()}
    names = {layer.name: by_tensor[id(layer.layer.get_parameter("weight"))] for layer in layers}

    def record(batch: Any) -> tuple[_InputRecorder, dict[str, list[Target]], bool]:
        recorder = _InputRecorder(frozenset(names.values()), limits, samples_in(batch))
        try:
            with own_gradients():
                return recorder, recorded(model, batch, recorder, gradients=False), False
        except GradientsNeededError:
            recorder = _InputRecorder(frozenset(names.values()), limits, samples_in(batch))
            return recorder, recorded(model, batch, recorder, gradients=True), True

    try:
        recorder, targets, gradients = record(batch)
    except Exception as problem:
        if len(listed) < 2:
            raise
        log.debug("The model does not run on several batches as one: it is fitted on the first", exc_info=problem)
        batch = listed[0]
        recorder, targets, gradients = record(batch)
    moments = {name: found for name, weight in names.items() if (found := recorder.second_moments(name, weight))}
    means = {name: [each.mean for each in recorder.moments[names[name]]] for name in moments}
    order = list(recorder.extents)
    ordered = sorted(names.items(), key=lambda item: order.index(item[1]) if item[1] in order else len(order))
    extents = {name: recorder.extents.get(weight, []) for name, weight in ordered}
    held_out = held_out_of(listed, batch)
    return Observations(batch, names, moments, means, targets, recorder.matrices, extents, held_out, gradients)


class _InputRecorder(OutputRecorder):
    """Records the moments of inputs beside the outputs."""

    def __init__(self, consumers: frozenset[str], limits: ReconstructionLimits, samples: int) -> None:
        super().__init__(consumers, limits)
        self.samples = samples
        self.moments: dict[str, list[Moments]] = {}
        self.matrices: dict[str, Tensor] = {}
        self.extents: dict[str, list[Extent]] = {}

    def record(self, op: WeightOp, out: Tensor) -> None:
        """Record the inputs and the outputs of a weight op."""
        super().record(op, out)
        if op.tensor not in self.consumers:
            return
        matrix = op.matrix()
        self.matrices[op.tensor] = matrix.clone()
        self.extents.setdefault(op.tensor, []).append(Extent.of(op, out, self.samples))
        if matrix.shape[-1] > MOST_COLUMNS:
            return
        rows = to_device(evenly(output_positions(op, out), self.limits.rows_for(matrix.shape[-1])), out.device)
        found = [Moments.of(_in_order(op, columns).flatten(1)) for columns in op.columns(rows)]
        before = self.moments.get(op.tensor)
        self.moments[op.tensor] = found if before is None else [a.merge(b) for a, b in zip(before, found, strict=True)]

    def second_moments(self, layer: str, weight: str) -> list[Tensor] | None:
        """The second moment of a layer's inputs for each channel group; None if it did not run, or is too wide."""
        found = self.moments.get(weight)
        if found is None or not all(each.count for each in found):
            return None
        found = self.moments[weight] = moments_on_host(found)
        centred = all(target.bias is not None for target in self.targets[weight])
        moments = [_shrunk(each, centred) for each in found]
        if not all(bool(moment.isfinite().all()) for moment in moments):
            raise SpectrumError(
                f"{layer}: expected finite inputs, got NaN or infinite ones. Training has diverged, or the batch holds such "
                "values: check both."
            )
        return moments


def _in_order(op: WeightOp, columns: Tensor) -> Tensor:
    """Rows `[rows, in·k…]` of patches or weights as `[rows, in, k…]`, in the order of the weight's kernel, and back."""
    return columns.reshape(len(columns), *op.weight.shape[1:]).flip(op.flipped_dims)


def fit(model: nn.Module, choices: Sequence[Choice], seen: Observations) -> Fitted:
    """Fit the factors of all chosen layers, in execution order. The model is left as it was.

    Layers whose weight is used more than once in a pass, or by an op other than a product with data, get the factors for
    the inputs of the first pass.

    Args:
        model: with whole layers.
        choices: which of them are factorized, and how.
        seen: from `observe`.
    """
    by_weight = {seen.names[choice.target.name]: choice for choice in choices}
    # A part of a weight is not fitted alone: its factors are those of the whole.
    targets = {
        name: list(each)
        for name, each in seen.targets.items()
        if name in by_weight and [target.length for target in each] == [_outputs(by_weight[name])]
    }
    solver = _Solver(by_weight, seen)
    with isolated(model, shadows=True):
        shadows, _, _ = named_tensors(model)
        for name, choice in by_weight.items():
            if name not in targets:
                merged = written(choice.target.layer, solver.decompose(choice))
                with torch.no_grad():
                    shadows[name].copy_(merged.to(shadows[name].device, shadows[name].dtype))
        fitter = ConsumerFitter(targets, {}, seen.held_out, shadows, solver.solve)
        with isolated(model, gradients=seen.gradients), op_by_op(ResidualSumMode(model, fitter.run, None, fitter.sum)):
            run_model(model, seen.batch)
        values = {name: shadows[name].detach().clone() for name in fitter.fitted() - set(by_weight)}
    for choice in choices:
        if choice.target.name not in solver.factors:
            solver.decompose(choice)
    return Fitted(solver.factors, solver.errors, values)


def _outputs(choice: Choice) -> int:
    return choice.target.shape.outputs * choice.target.shape.groups


class _Solver:
    """The fit of one layer's factors, as `ConsumerFitter` calls it.

    Attributes:
        factors: {name of a layer: its factors for each channel group}.
        errors: {name of a layer: relative squared error of its outputs}, of those that were fitted.
    """

    def __init__(self, choices: Mapping[str, Choice], seen: Observations) -> None:
        self.choices, self.seen = choices, seen
        self.factors: dict[str, Sequence[Sequence[Tensor]]] = {}
        self.errors: dict[str, float] = {}

    def decompose(self, choice: Choice) -> Tensor:
        """Factors for the inputs of the first pass; the weight `[groups, out, in, k…]` that they multiply to."""
        name = choice.target.name
        self.factors[name] = decomposed(choice, self.seen.moments.get(name))
        return torch.stack(_merged_groups(choice, self.factors[name]))

    def solve(self, op: WeightOp, columns: Tensor, targets: Tensor, bias: Tensor | None, held_out: Tensor) -> Fit:
        """See `pruning.reconstruction.Solve`."""
        choice, whole = self.choices[op.tensor], self.seen.matrices[op.tensor].to(columns.device)
        assert choice.kind is not None
        name, wide = choice.target.name, columns.shape[-1] > MOST_COLUMNS
        # Half types would round the inputs of the last factor.
        columns, targets = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (columns, targets))
        fitted = refit_or_keep(columns, targets, whole, bias, held_out)
        weights = [_in_order(op, in_float64(weight, "cpu")) for weight in (whole if fitted is None else fitted.weight)]
        inputs = [_in_order(op, group) for group in columns]
        moments = [None if wide else _moment(group, centred=bias is not None) for group in inputs]
        factors = [
            choice.kind.decompose(weight, choice.ranks, moment) for weight, moment in zip(weights, moments, strict=True)
        ]
        offset = _fit_last(choice, factors, inputs, targets, bias, held_out)
        self.factors[name] = factors
        matrix = torch.stack([_in_order(op, group).flatten(1) for group in _merged_groups(choice, factors)])
        self.errors[name] = _error(columns, targets, matrix, offset)
        offset = targets.new_zeros(targets.shape[0], targets.shape[2]) if offset is None else offset
        return Fit(matrix, offset, torch.ones((), dtype=torch.bool, device=matrix.device))


def _moment(inputs: Tensor, centred: bool) -> Tensor:
    (moments,) = moments_on_host([Moments.of(inputs.flatten(1))])
    return _shrunk(moments, centred)


def _shrunk(moments: Moments, centred: bool) -> Tensor:
    """The second moment, about the mean if `centred`; shrunk, since from few rows whole directions would seem to be empty."""
    covariance = shrunk_covariance(moments.covariance, moments.count)
    return covariance if centred else covariance + torch.outer(moments.mean, moments.mean)


def _merged_groups(choice: Choice, factors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    assert choice.kind is not None
    return [choice.kind.merged(group, choice.target.shape.inputs) for group in factors]


def _fit_last(
    choice: Choice,
    factors: list[list[Tensor]],
    inputs: Sequence[Tensor],
    targets: Tensor,
    bias: Tensor | None,
    held_out: Tensor,
) -> Tensor | None:
    """Fit the last factor of each channel group in place, and the bias; the bias `[groups, out]`, or None where there is none."""
    assert choice.kind is not None
    last_step = choice.kind.steps(choice.target.shape, choice.ranks)[-1]
    if last_step.groups > 1:
        outputs = torch.stack(
            [
                x.flatten(1) @ merged.flatten(1).mT.to(x.device, x.dtype)
                for x, merged in zip(inputs, _merged_groups(choice, factors), strict=True)
            ]
        )
        return None if bias is None else (targets - outputs).mean(1)
    z = torch.stack([last_inputs(choice.kind, x, group) for x, group in zip(inputs, factors, strict=True)])
    last = torch.stack([group[-1].flatten(1) for group in factors])
    wide = in_float64(z)
    start = None if bias is None else (in_float64(targets) - wide @ last.to(wide.device).mT).mean(1)
    found = refit_or_keep(z, targets, last, start, held_out)
    if found is None:
        return start
    for group, weight in zip(factors, found.weight, strict=True):
        group[-1] = weight.to("cpu").reshape(group[-1].shape)
    return None if bias is None else found.offset


def last_inputs(kind: Kind, inputs: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """What the last factor is multiplied with: `[rows, r·k…]`, k the sizes of the spatial axes that it covers.

    Args:
        kind: of the factors.
        inputs: patches of the layer's input, `[rows, in, k…]`.
        factors: of one channel group.
    """
    last = factors[-1]
    own = [axis for axis, size in enumerate(last.shape[2:]) if size > 1]
    others = [axis for axis in range(last.dim() - 2) if axis not in own]
    before = kind.merged(factors[:-1], inputs.shape[1]) if len(factors) > 2 else factors[0]
    patches = inputs.permute(0, 1, *(2 + axis for axis in others), *(2 + axis for axis in own))
    patches = patches.reshape(len(inputs), before[0].numel(), math.prod(last.shape[2:]))
    return torch.einsum("rvl,cv->rcl", patches, before.flatten(1).to(inputs.device, inputs.dtype)).flatten(1)


def _error(columns: Tensor, targets: Tensor, matrix: Tensor, offset: Tensor | None) -> float:
    """Σ‖ŷ − y‖² / Σ‖y − mean‖², without the mean where there is no offset."""
    outputs = columns @ matrix.mT.to(columns)
    if offset is not None:
        outputs = outputs + offset.unsqueeze(1).to(columns)
        level = targets - targets.mean(1, keepdim=True)
    else:
        level = targets
    total = float(in_float64(level).square().sum())
    return float(in_float64(outputs - targets).square().sum()) / total if total > 0 else 0.0
