"""Sequential reconstruction: after a cut every consumer is refitted, in execution order, to its original outputs.

`plan_cut` fits each consumer to the units that it loses, so the errors of the layers before it stay. Here each one is
fitted on the inputs that it gets in the cut model, with the errors of all earlier layers, to the outputs that it had in
the uncut one. That takes one forward pass of the uncut model, which records outputs, and one of the cut model, in which
each consumer is fitted before it runs. The asymmetric reconstruction of Zhang, Zou, He and Sun, "Accelerating
very deep convolutional networks for classification and detection", TPAMI 38(10), 2016, by ridge least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import unseen_by_modes
from evolvenet.errors import concerning
from evolvenet.execution.choices import Choices
from evolvenet.execution.early_stop import Finished, run_until_finished, without_cache
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.residual_sums import ResidualSumMode, TrackedOutput
from evolvenet.execution.weight_ops import NormedWeight, WeightOp
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.host_transfers import index_tensor, values_of
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.ridge import Fit, refit_or_keep, refit_residuals
from evolvenet.pruning.reconstruction_batch import (
    ONE_SHOT_LIMITS,
    ReconstructionLimits,
    is_large,
)
from evolvenet.pruning.recording import Recording, record
from evolvenet.pruning.rectified import Kink, rectified_fit
from evolvenet.pruning.target import Target
from evolvenet.surgery.basis_change import along
from evolvenet.surgery.resize_model import Surgery, TensorChange, install

Run = Callable[[nn.Module, Any], None]

SMALL = 65_536
"""Entries of a tensor of a large model that is copied even if nothing writes to it, as every vector is."""


def reconstruct(
    model: nn.Module,
    graph: WidthGraph,
    surgery: Surgery,
    batches: Iterable[Any],
    limits: ReconstructionLimits = ONE_SHOT_LIMITS,
) -> Surgery:
    """Refit every consumer of a cut width to its original outputs. Nothing is changed yet.

    A consumer is a weight that is multiplied with data, in a dense product or a convolution of any kind, whatever module it
    belongs to; grouped and depthwise kernels are fitted group by group, and stacked experts each on the samples that the uncut
    model's router sends there, which the cut one is made to send there too. Where its router sends other samples there, or whole
    experts are removed, they are not. It keeps the surgery's values, those of `plan_cut` fitted to the moments of all its
    inputs, if any other op uses it or its entries are used twice in a forward pass (recurrent weights, ALBERT's layers; a fit
    at all uses in the cut model brought the outputs no nearer). Where its output is added to something of the same shape, as
    at the end of a residual block, it is fitted to the original sum, which also corrects errors of the shortcut. The fit is
    ridge least squares, shrunk towards the surgery's values, see `linalg.ridge.refit`; the mean goes into the bias, or
    into the running mean of a batch norm right after it. The ridge is selected on every second batch, or on the second
    half of a single one, after fits on the others; a consumer whose error no ridge lowers keeps the surgery's values.
    Where a ReLU and nothing else takes the outputs or the sum, `limits.rounds` more fits go by what it passes on.

    Args:
        model: the model, uncut.
        graph: its widths.
        surgery: the cut, from `compile_surgery` or `plan_cut`.
        batches: inputs of the model; only the first one where they cannot be concatenated.
        limits: how many of them are used, and how.

    Returns:
        The surgery with other values for the consumers' weights and biases.

    >>> from evolvenet.graph.index_map import IndexMap
    >>> from evolvenet.surgery.resize_model import compile_surgery
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
    removed = [name for name, index_map in surgery.maps.items() if index_map.removes_units]
    recording = record(model, graph, removed, batches, limits)
    return surgery if recording is None else fit_to_targets(model, graph, surgery, recording)


def fit_to_targets(
    model: nn.Module, graph: WidthGraph, surgery: Surgery, recording: Recording, run: Run = run_until_finished
) -> Surgery:
    """`reconstruct` for outputs that are recorded already.

    Args:
        model: the model, uncut.
        graph: its widths.
        surgery: the cut.
        recording: its targets are emptied, so that each is in memory until its fit.
        run: runs the cut model on the batch; another one than this is not ended after the last fit.
    """
    if not recording.targets:
        return surgery
    fitted = _fitted(model, graph, surgery, recording, run)
    changes = {change.name: change for change in surgery.changes}
    tensors, _, _ = named_tensors(model)
    for name, value in fitted.items():
        tensor = tensors[name]
        change = changes.get(name) or TensorChange(tensor, name, {}, tensor.detach())
        changes[name] = replace(change, value=value.to(tensor.device, tensor.dtype))
    return replace(surgery, changes=tuple(changes.values()))


def _fitted(model: nn.Module, graph: WidthGraph, surgery: Surgery, recording: Recording, run: Run) -> dict[str, Tensor]:
    """{tensor: its fitted value}, from a run of the cut model."""
    targets, choices = recording.targets, recording.choices
    changes = {change.name: change for change in surgery.changes}
    large = is_large(graph)
    biases = {target.bias[0] for each in targets.values() for target in each if target.bias is not None}
    written = targets.keys() | biases

    def value(name: str, tensor: Tensor) -> Tensor:
        """A copy, but for matrices that no fit writes to."""
        shared = large and name not in written and tensor.numel() > max(SMALL, *tensor.shape)
        return tensor if shared else tensor.clone()

    with isolated(model, shadows=True, copied=not large, gradients=graph.differentiates):
        shadows, _, _ = named_tensors(model)
        if large:
            for name in shadows.keys() - changes.keys():
                shadows[name].data = value(name, shadows[name].data)
        cut = [
            replace(change, tensor=shadows[change.name], value=value(change.name, change.value))
            for change in surgery.changes
        ]
        install(model, replace(surgery, changes=tuple(cut)))
        fitter = ConsumerFitter(targets, changes, recording.held_out, shadows)
        fitter.ends_run, fitter.rounds = run is run_until_finished, recording.rounds
        fitter.fallbacks = recording.fallbacks
        mode = ResidualSumMode(model, fitter.run, None, fitter.sum)
        mode.follows_norms, fitter.normed, mode.choices, fitter.choices = True, mode.normed, choices, choices
        choices.replay()
        batch, cache = without_cache(model, recording.batch), recording.cache
        again = nullcontext() if cache is None else cache.on(model, batch, changes.keys() | written, copies=True)
        with again, op_by_op(mode):
            run(model, batch)
        return {name: shadows[name].detach() for name in fitter.fitted()}


Solve = Callable[[WeightOp, Tensor, Tensor, Tensor | None, Tensor], Fit]
"""(weight op, its columns, target outputs, bias, held-out rows) → weight `[groups, out / groups, columns]` and bias."""


class ConsumerFitter:
    """Fits each consumer of the cut model before it runs, or at the sum that it ends in.

    The host does not wait for a fit: one that does not lower the error is one that writes what was there.

    Args:
        targets: outputs of the uncut model, from `OutputRecorder.usable`; each is removed when it is fitted.
        changes: {weight: its change}, which says which of its output units are left.
        held_out: `[samples]` booleans, the samples on which the ridge is selected.
        shadows: {name: tensor} of the cut model.
        solve: the fit; None for ridge least squares, shrunk towards the weight as it is.

    Attributes:
        normed: weights of the cut model that weight norm computes, from the mode that it runs in; a fitted one is written
            into direction and length.
        choices: of the routers, replayed in the run of the cut model; without them no stacked weight is fitted.
        ends_run: whether `Finished` is raised after the last fit.
        rounds: of the fits of outputs that a rectifier takes, see `evolvenet.pruning.rectified`.
        fallbacks: {tensor: its value} for the consumers whose fit lowers no error, and their biases; for these the host waits.
    """

    def __init__(
        self,
        targets: dict[str, list[Target]],
        changes: dict[str, TensorChange],
        held_out: Tensor,
        shadows: Mapping[str, Tensor],
        solve: Solve | None = None,
    ) -> None:
        self.solve = solve
        self.targets = targets
        self.changes, self.held_out, self.shadows = changes, held_out, shadows
        self._improved: dict[str, list[Tensor]] = {}
        self.normed: Mapping[str, NormedWeight] = {}
        self.choices: Choices | None = None
        self.ends_run, self.rounds = False, 0
        self.fallbacks: Mapping[str, Tensor] = {}
        self._at_sum: dict[WeightOp, Target] = {}

    def fitted(self) -> set[str]:
        """Names of the tensors that have other values; waits for the device once."""
        flags = [(name, flag) for name, each in self._improved.items() for flag in each]
        found = values_of([flag for _, flag in flags])
        return {name for (name, _), improved in zip(flags, found, strict=True) if improved}

    def run(self, op: WeightOp) -> None:
        """Fit the op's weight, unless it is fitted at a sum."""
        target = self._target_of(op)
        # Otherwise which samples reach it depends on the units (a router's choice): its outputs are those of others.
        if target is not None and target.inputs == op.input_positions and target.summed:
            self._at_sum[op] = target
        elif target is not None:
            with concerning((op.tensor, op.axis)):
                if target.inputs == op.input_positions:
                    self._fit(op, target, self._kept_outputs(op, target, target.outputs), self._kept_kink(op, target))
                else:
                    self._write(op, target, None)
        self._end_run()

    def _end_run(self) -> None:
        if self.ends_run and not self._at_sum and not any(self.targets.values()):
            raise Finished

    def _target_of(self, op: WeightOp) -> Target | None:
        waiting = self.targets.get(op.tensor)
        if not waiting or not op.stacked:
            return waiting.pop(0) if waiting else None
        # Without some of the experts, the others have other numbers and get samples that those had.
        removed = op.tensor in self.changes and 0 in self.changes[op.tensor].axes
        if removed or self.choices is None or not self.choices.same:
            waiting.clear()
            return None
        found = next((target for target in waiting if target.group == op.group), None)
        if found is not None:
            waiting.remove(found)
        return found

    def sum(self, output: TrackedOutput, own: Tensor, other: Tensor) -> None:
        """See `ResidualSumMode`."""
        target = self._at_sum.pop(output.op, None)
        if target is not None:
            with concerning((output.op.tensor, output.op.axis)):
                self._fit_at_sum(target, output, own, other)
            self._end_run()

    def _fit_at_sum(self, target: Target, output: TrackedOutput, own: Tensor, other: Tensor) -> None:
        summed = self._kept_outputs(output.op, target, target.outputs)
        if summed.shape[1] == len(output.op.weight):
            found = self._fit_to_sum(target, output, own, other, summed)
        else:
            found = self._write(output.op, target, None)
        if found is not None:
            offset, improved = found
            again = output.recomputed(own, offset if target.bias_sign else 0.0)
            own.copy_(torch.where(improved, again, own))

    def _fit_to_sum(
        self, target: Target, output: TrackedOutput, own: Tensor, other: Tensor, summed: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """As `_fit`, to the sum `[rows, out]`."""
        # A unit that the norm after it scales by 0 contributes nothing to the sum: it keeps its outputs.
        off = output.scale.abs() < 1e-6 * output.scale.abs().max()
        present_sum = output.values_at(own, target.rows) + output.values_at(other, target.rows)
        scale = output.scale.masked_fill(off, 1)
        step = (summed - present_sum).masked_fill(off, 0) / scale
        if target.rectified and self.rounds:
            present = output.op.products_at(output.recompute(), target.rows).movedim(0, 1).flatten(1)
            if target.bias is not None and target.bias_sign:
                present = present + target.share * self.shadows[target.bias[0]].reshape(-1)
            kink = Kink(present - present_sum / scale, scale.masked_fill(off, 0))
            return self._fit(output.op, target, present + step, kink)
        return self._fit(output.op, target, step, beside_present=True)

    def _kept_kink(self, op: WeightOp, target: Target) -> Kink | None:
        """Where the rectifier of the outputs that are left begins to pass them on."""
        change = self.changes.get(op.tensor)
        mixed = change is not None and target.output_axis in change.bases
        if not target.rectified or target.floor is None or target.slope is None or mixed:
            return None
        floor, slope = (self._kept_outputs(op, target, each.unsqueeze(0)) for each in (target.floor, target.slope))
        return Kink(floor, slope)

    def _kept_outputs(self, op: WeightOp, target: Target, outputs: Tensor) -> Tensor:
        """Of outputs `[rows, out]` those of the units that the cut model still has, in their new basis."""
        change = self.changes.get(op.tensor)
        kept = change.axes.get(target.output_axis) if change else None
        if change is None or kept is None:
            return outputs
        basis = change.bases.get(target.output_axis)
        if basis is not None:
            # An op that multiplies with a part of the weight has outputs of a part of the units: they cannot be mixed.
            whole = (target.start, target.length) == (0, kept.size)
            outputs = along(outputs, basis.values, 1) if whole else outputs[:, :0]
            return outputs[:, kept.tensor(outputs.device)] if whole else outputs
        ends = target.start, target.start + target.length
        own = [index - target.start for index in kept.indices if ends[0] <= index < ends[1]]
        return outputs[:, index_tensor(own, outputs.device)]

    def _fit(
        self, op: WeightOp, target: Target, outputs: Tensor, kink: Kink | None = None, *, beside_present: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Fit the weight and the bias in place; the change of the bias `[out]` and whether they improve, or None if they stay.

        Args:
            op: the weight op.
            target: what it is fitted to.
            outputs: `[rows, out]`, to be reached.
            kink: of a rectifier of the outputs.
            beside_present: whether `outputs` are the differences from the present ones.
        """
        bias, start = self._bias_of(op, target)
        if outputs.shape[1] != len(op.weight) or (bias is None) != (target.bias is None):
            return self._write(op, target, None)
        targets = outputs.reshape(len(outputs), op.groups, -1).movedim(1, 0)
        held_out = self.held_out[target.rows_on_host * len(self.held_out) // target.positions]
        # The modes around the run are for the model's ops.
        with unseen_by_modes():
            columns = op.columns(target.rows)
            if beside_present and self.solve is not None:
                kind = torch.promote_types(columns.dtype, torch.float32)
                present = columns.to(kind) @ op.matrix().to(kind).mT
                targets = targets + (present if start is None else present + start.unsqueeze(-2))
            solve = lambda moved: self._solved(op, columns, moved, start, held_out, beside_present)  # noqa: E731
            found = solve(targets)
            if found is not None and kink is not None and self.rounds:
                found = rectified_fit(solve, found, columns, targets, kink, self.rounds)
        return self._write(op, target, found)

    def _bias_of(self, op: WeightOp, target: Target) -> tuple[Tensor | None, Tensor | None]:
        """The bias, and what of it is in the outputs `[groups, out / groups]`."""
        # A bias that is added by itself may have the shape of an image's channels.
        bias = self.shadows[target.bias[0]] if target.bias_sign and target.bias else op.bias
        return bias, None if bias is None else (bias * target.share).reshape(op.groups, -1)

    def _write(self, op: WeightOp, target: Target, found: Fit | None) -> tuple[Tensor, Tensor] | None:
        """Write a fit, or where there is none or it lowers no error the fallback; returns what `_fit` does."""
        bias, start = self._bias_of(op, target)
        if op.tensor in self.fallbacks and (found is None or not bool(found.improves)):
            found = self._fallback(op, target, bias, start)
        if found is None:
            return None
        op.write_matrix(found.weight.to(op.weight))
        self._add_improved(op.tensor, found.improves)
        if op.tensor in self.normed:
            self._write_normed(op.tensor, self.normed[op.tensor], found.improves.to(op.weight.device))
        offset = found.offset
        change = (offset if start is None else offset - in_float64(start, offset.device)).flatten()
        if bias is not None and target.bias is not None:
            bias.copy_(in_float64(bias, change.device) + (change * (target.bias_sign or 1)).reshape(bias.shape))
            self._add_improved(target.bias[0], found.improves)
        return change.to(op.weight), found.improves.to(op.weight.device)

    def _fallback(self, op: WeightOp, target: Target, bias: Tensor | None, start: Tensor | None) -> Fit | None:
        """In place of a fit that lowers no error, the refit that was made for this case; None if its bias is another one."""
        used = slice(op.start, op.start + len(op.weight))
        whole = self.fallbacks[op.tensor].to(op.weight).movedim(op.axis, 1)
        weight = whole[used].flip(op.flipped_dims).reshape(op.matrix().shape)
        offset = weight.new_zeros(weight.shape[:2]) if start is None else start
        if bias is not None and target.bias is not None and target.bias[0] in self.fallbacks:
            value = self.fallbacks[target.bias[0]].to(bias)
            value = value if value.numel() == bias.numel() else value[used]
            if value.numel() != bias.numel():
                return None
            change = value.reshape(bias.shape) - bias
            offset = offset + change.reshape(offset.shape) * (target.bias_sign or 1)
        return Fit(weight, in_float64(offset), torch.ones((), dtype=torch.bool, device=offset.device))

    def _solved(
        self, op: WeightOp, columns: Tensor, targets: Tensor, start: Tensor | None, held_out: Tensor, residuals: bool
    ) -> Fit | None:
        """The fit of an op to targets, or to residuals."""
        if self.solve is not None:
            return self.solve(op, columns, targets, start, held_out)
        return (refit_residuals if residuals else refit_or_keep)(columns, targets, op.matrix(), start, held_out)

    def _add_improved(self, name: str, improves: Tensor) -> None:
        self._improved.setdefault(name, []).append(improves)

    def _write_normed(self, direction: str, normed: NormedWeight, improves: Tensor) -> None:
        """Write a fitted weight into its direction, and its norms into the length; a direction of length 0 would be 0/0."""
        length = torch.norm_except_dim(normed.weight, 2, normed.dim)
        before = self.shadows[direction]
        before.copy_(torch.where((length > 0) & improves, normed.weight, before))
        lengths = self.shadows[normed.length]
        lengths.copy_(torch.where(improves, length, lengths))
        self._add_improved(normed.length, improves)
