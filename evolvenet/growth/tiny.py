"""The expressivity bottleneck: the part of the loss's gradient at a consumer's outputs that no update of it follows.

From Verbockhaven, Rudkiewicz, Charpiat and Chevallier, "Growing tiny networks: spotting expressivity bottlenecks and
fixing them optimally", TMLR 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evolvenet.execution.differentiable_ops import OnGradient, Product, ProductMode
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.sampling import evenly, samples_in
from evolvenet.execution.weight_ops import WeightOp, output_positions
from evolvenet.graph.index_map import NEW_UNIT
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import CONSUMES, PRODUCES, Tie
from evolvenet.growth.expanded_model import Growth, finite
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.ridge import refit
from evolvenet.measurement.weight_uses import UseRecorder, WeightUses

ROWS = 4096
"""Most output positions (samples × positions) of one layer from which moments and updates are computed."""

RIDGE = 1e-2
"""Added to the diagonal of the inputs' second moments, relative to its mean; bounds rows along rare input directions."""


@dataclass(frozen=True, eq=False)
class Scale:
    """A metric of rows: the length of a row is ‖row·factor‖.

    Args:
        factor: `[places, places]` lower triangular; None for the identity, where the length is the norm.

    >>> scale = Scale.of(torch.diag(torch.tensor([4.0, 4.0], dtype=torch.float64)))
    >>> scale.energy(torch.tensor([[1.0, 0.0]], dtype=torch.float64)).round().tolist()
    [4.0]
    """

    factor: Tensor | None = None

    @classmethod
    def of(cls, second: Tensor) -> Scale:
        """The length of a row is the root mean square of its outputs; `second` is E[x·xᵀ], `[places, places]` float64."""
        level = float(second.diagonal().mean())
        if not level > 0:
            return cls()
        return cls(
            torch.linalg.cholesky(
                second + RIDGE * level * torch.eye(len(second), dtype=second.dtype, device=second.device)
            )
        )

    def coordinates(self, rows: Tensor) -> Tensor:
        """Whitened rows, `[count, repeat · places]`: their norm is the length of the row."""
        return rows if self.factor is None else self._each(rows, self.factor.T)

    def rows(self, coordinates: Tensor) -> Tensor:
        """The rows of whitened ones: the inverse of `coordinates`."""
        return coordinates if self.factor is None else self._each(coordinates, self.factor.T, inverse=True)

    def gradients(self, gradients: Tensor) -> Tensor:
        """Gradients by the whitened rows, from gradients by the rows."""
        return gradients if self.factor is None else self._each(gradients, self.factor, inverse=True)

    def _each(self, rows: Tensor, factor: Tensor, inverse: bool = False) -> Tensor:
        """The factor times the row, or its inverse, for each of the `repeat` parts of every row."""
        parts = rows.reshape(-1, len(factor)).T
        upper = factor is not self.factor
        made = torch.linalg.solve_triangular(factor, parts, upper=upper) if inverse else factor @ parts
        return made.T.reshape(rows.shape)

    def energy(self, rows: Tensor) -> Tensor:
        """Squared lengths `[count]`."""
        return self.coordinates(rows).abs().square().sum(1)


@dataclass(frozen=True, eq=False)
class Update:
    """The weight and bias of a consumer that reproduce the gradient of its outputs best, by ridge least squares.

    Args:
        weight: `[out, in, k…]`, before the growth.
        bias: `[out]`, or None where there is none.
        axis: the consumer's axis of inputs: 0 for one that is stored as `[in, out]`.
    """

    weight: Tensor
    bias: Tensor | None
    axis: int


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """What the present units can do about the gradient, and the metric of new rows; neither by default.

    Args:
        scales: {producer's tie: metric of its rows}; the norm for the others.
        updates: {a consumer's weight: the update of its present columns, to be subtracted from the gradient}.
    """

    scales: Mapping[Tie, Scale] = field(default_factory=dict)
    updates: Mapping[str, Update] = field(default_factory=dict)


def measure_bottleneck(growth: Growth, method: str) -> Bottleneck:
    """Measure the second moments of the producers' inputs, and fit the consumers' updates without new units.

    The desired change of a consumer's outputs is minus the loss's gradient. Its ridge fit on the consumer's present inputs
    is what an update of the present weights achieves; the rest is the bottleneck. A consumer for
    which the fit is no better than nothing on the other half of the samples is left out, as are consumers and producers
    other than the whole real weights of dense products and ungrouped, plain convolutions that nothing else uses.

    Args:
        growth: the expansion, with batches and a loss.
        method: its name, for error messages.

    Returns:
        Metrics from the second moments of the producers' inputs, updates of the consumers.

    Raises:
        ResizeError, SpectrumError, TraceError: for batches or a loss that cannot be used, or NaN in them.
    """
    producers, consumers = (
        [tie for width in growth.widths for tie in growth.matrices(width, role)] for role in (PRODUCES, CONSUMES)
    )
    pairs = growth.pairs(method)
    with isolated(growth.model, shadows=True, gradients=True):
        seen, found = record_gradients(growth, [tie.tensor for tie in (*producers, *consumers)], pairs)
    scales = {
        tie: Scale.of(seen[tie.tensor].second()) for tie in producers if found.axes.get(tie.tensor) == 1 - tie.dim
    }
    updates = {
        tie.tensor: seen[tie.tensor].update(tie.dim, biased=tie.tensor in found.biases)
        for tie in consumers
        if found.axes.get(tie.tensor) == tie.dim
    }
    return Bottleneck(scales, {name: update for name, update in updates.items() if update is not None})


def record_gradients(
    growth: Growth, names: Collection[str], pairs: Sequence[tuple[Any, Any]], rows: int | None = None
) -> tuple[dict[str, OpRecorder], WeightUses]:
    """Run the loss and its backward pass, and record inputs and output gradients of the products with some weights.

    Args:
        growth: of the model, whose tensors are shadows now.
        names: of the weights.
        pairs: (inputs, targets) of each batch.
        rows: most output positions of one layer; None for `ROWS`.

    Returns:
        {weight: its recorder}, and how the weights are used; only those with `axes` are weights of plain products alone.

    Raises:
        ResizeError, SpectrumError: for batches or a loss that cannot be used, or NaN in them.
    """
    uses = UseRecorder(growth.model)
    seen = {name: OpRecorder(name, max(2, (ROWS if rows is None else rows) // len(pairs))) for name in names}
    shadows, _, _ = named_tensors(growth.model)
    weights = [shadows[name].requires_grad_() for name in seen]
    for inputs, targets in pairs if weights else ():
        samples = samples_in(inputs)

        def record(op: WeightOp, out: Tensor, samples: int = samples) -> OnGradient:
            uses.add_op(op)
            return seen[op.tensor].record(op, out, samples)

        mode = ProductMode(growth.model, seen, record, uses.add_bias)
        with op_by_op(mode):
            value = growth.value(inputs, targets)
        uses.add_other_uses(mode.other_uses)
        torch.autograd.grad(value, weights, allow_unused=True)
    found = uses.found(growth.graph)
    axes = {name: axis for name, axis in found.axes.items() if name in seen and seen[name].usable}
    return seen, WeightUses(found.biases, axes)


class OpRecorder:
    """Records inputs and output gradients of the products with one weight, at evenly sampled positions of the outputs.

    Attributes:
        usable: whether all of them are products with the whole weight that a new unit's row or column is one of.
    """

    def __init__(self, name: str, most: int) -> None:
        self.name, self.most = name, most
        self.records: list[_Record] = []
        self.usable = True
        self._shape: torch.Size = torch.Size()

    def record(self, op: WeightOp, out: Tensor, samples: int) -> OnGradient:
        """Record a weight op's inputs, and later the gradient of its output."""
        whole = not op.start and (not self._shape or op.weight.shape == self._shape)
        plain = op.groups == 1 and not op.weight.is_complex() and not (op.geometry is not None and op.axis == 0)
        self.usable = self.usable and whole and plain
        self._shape = op.weight.shape
        total = output_positions(op, out)
        rows = evenly(total, self.most).to(out.device)
        record = _Record(op.columns(rows)[0].detach(), rows * samples // max(1, total))
        self.records.append(record)
        return lambda gradient: record.set_gradients(op.outputs_at(gradient, rows)[0])

    def second(self) -> Tensor:
        """E[x·xᵀ], `[columns, columns]` float64."""
        inputs = _exact([record.inputs for record in self.records])
        return finite(inputs.T @ inputs / len(inputs), self.name)

    def update(self, axis: int, *, biased: bool) -> Update | None:
        """The ridge fit of the gradients on the inputs, or None if it explains nothing on held-out samples.

        Args:
            axis: of the weight's inputs.
            biased: whether a bias is fitted, too.
        """
        full = [record for record in self.records if record.gradients is not None]
        if not full:
            return None
        zeros = torch.zeros(self._shape, dtype=torch.float64, device="cpu").flatten(1)
        made = refit(
            _exact([record.inputs for record in full]),
            _exact([record.gradients for record in full if record.gradients is not None]),
            zeros,
            zeros.new_zeros(len(zeros)) if biased else None,
            torch.cat([record.sample for record in full]).cpu() % 2 == 1,
        )
        return made and Update(made[0].reshape(self._shape), made[1] if biased else None, axis)


@dataclass(eq=False)
class _Record:
    """Inputs and output gradients of one weight op.

    Args:
        inputs: `[rows, columns]`.
        sample: `[rows]` number of the sample of each row.
        gradients: `[rows, out]`, after the backward pass.
    """

    inputs: Tensor
    sample: Tensor
    gradients: Tensor | None = None

    def set_gradients(self, gradients: Tensor) -> None:
        """Keep the gradients of the outputs at the record's positions."""
        self.gradients = gradients.detach()


def _exact(parts: list[Tensor]) -> Tensor:
    return torch.cat([in_float64(part, "cpu") for part in parts])


class Corrections:
    """Terms of the loss that subtract the updates, from the products of an expanded model's consumers with their inputs.

    Adding `total` to the loss subtracts each consumer's update from the gradient that its new columns and their inputs
    get; the gradients of its other columns do not change.

    Args:
        growth: the expansion.
        updates: {a consumer's weight: its update}.
    """

    def __init__(self, growth: Growth, updates: Mapping[str, Update]) -> None:
        self.mode = ProductMode(growth.model, updates)
        self._weights = {name: named_tensors(growth.model)[0][name] for name in updates}
        self._each = {name: _Correction(growth, name, update) for name, update in updates.items()}

    def total(self) -> Tensor | float:
        """The sum of the last pass's terms; the pass is forgotten."""
        products, self.mode.products = self.mode.products, []
        return sum(self._each[p.op.tensor].term(p, self._weights[p.op.tensor]) for p in products)


@contextmanager
def subtract_updates(growth: Growth, updates: Mapping[str, Update]) -> Iterator[Corrections]:
    """Record the products of the consumers in every pass of the expanded model inside."""
    corrections = Corrections(growth, updates)
    with op_by_op(corrections.mode if updates else None):
        yield corrections


class _Correction:
    """The term of one consumer: −⟨output of its update, output of its new columns⟩."""

    def __init__(self, growth: Growth, name: str, update: Update) -> None:
        change = growth.changes[name]
        like, self.turned = change.tensor, update.axis == 0
        weight = update.weight.to(like.device, like.dtype)
        for dim, index_map in change.axes.items():
            weight = index_map.apply(weight, 1 - dim if self.turned else dim)
        bias, outputs = update.bias, change.axes.get(1 - update.axis)
        bias = None if bias is None else bias.to(like.device, like.dtype)
        self.weight, self.bias = weight, bias if bias is None or outputs is None else outputs.apply(bias, 0)
        new_unit = [index == NEW_UNIT for index in change.axes[update.axis].indices]
        self.new_unit = torch.tensor(new_unit, dtype=like.dtype, device=like.device)
        self.new_unit = self.new_unit.reshape(-1, *[1] * (like.dim() - 2))

    def term(self, product: Product, weight: Tensor) -> Tensor:
        """The term of one product of the pass with the expanded weight."""
        oriented = weight.T if self.turned else weight
        present = product.outputs(self.weight, self.bias, detached=True)
        return -(present * product.outputs(oriented * self.new_unit, None)).sum()
