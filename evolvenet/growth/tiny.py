"""The expressivity bottleneck: the part of the loss's gradient at a consumer's outputs that no update of it follows.

From Verbockhaven, Rudkiewicz, Charpiat and Chevallier, "Growing tiny networks: spotting expressivity bottlenecks and
fixing them optimally", TMLR 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet._compat.torch import ConvNd, conv_forward, parameter_table
from evolvenet.execution.isolation import isolated
from evolvenet.execution.sampling import evenly
from evolvenet.execution.weight_ops import Geometry, WeightOp, output_positions
from evolvenet.graph.index_map import NEW_UNIT
from evolvenet.graph.width_graph import CONSUMES, PRODUCES, Tie
from evolvenet.growth.expanded_model import Growth, finite
from evolvenet.linalg.ridge import refit

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
        return cls(torch.linalg.cholesky(second + RIDGE * level * torch.eye(len(second), dtype=second.dtype)))

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
        weight: of the old shape.
        bias: of the old shape, or None where there is none.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """What the present units can do about the gradient, and the metric of new rows; neither by default.

    Args:
        scales: {producer's tie: metric of its rows}; the norm for the others.
        updates: {path of a consumer: the update of its present columns, to be subtracted from the gradient}.
    """

    scales: Mapping[Tie, Scale] = field(default_factory=dict)
    updates: Mapping[str, Update] = field(default_factory=dict)


def measure_bottleneck(growth: Growth, method: str) -> Bottleneck:
    """Measure the second moments of the producers' inputs, and fit the consumers' updates without new units.

    The desired change of a consumer's outputs is minus the loss's gradient. Its ridge fit on the consumer's present inputs
    is what an update of the present weights achieves; the rest is the bottleneck. A consumer for
    which the fit is no better than nothing on the other half of the samples is left out, as are consumers and producers
    other than dense and ungrouped convolution layers.

    Args:
        growth: the expansion, with batches and a loss.
        method: its name, for error messages.

    Returns:
        Metrics from the second moments of the producers' inputs, updates of the consumers.

    Raises:
        ResizeError, SpectrumError, TraceError: for batches or a loss that cannot be used, or NaN in them.
    """
    producers = [
        tie for width in growth.widths for tie in growth.matrices(width, PRODUCES) if _has_weight_op(growth, tie, 0)
    ]
    consumers = [
        tie for width in growth.widths for tie in growth.matrices(width, CONSUMES) if _has_weight_op(growth, tie, 1)
    ]
    pairs = growth.pairs(method)
    seen = {tie.module: _LayerRecorder(tie.module, max(2, ROWS // len(pairs))) for tie in (*producers, *consumers)}
    with isolated(growth.model, shadows=True, gradients=True), ExitStack() as hooks:
        for path, module_seen in seen.items():
            module = growth.model.get_submodule(path)
            module.get_parameter("weight").requires_grad_()
            hooks.callback(module.register_forward_hook(module_seen, with_kwargs=True).remove)
        weights = [growth.model.get_submodule(path).get_parameter("weight") for path in seen]
        for inputs, targets in pairs if weights else ():
            torch.autograd.grad(growth.value(inputs, targets), weights, allow_unused=True)
    scales = {tie: Scale.of(seen[tie.module].second()) for tie in producers if seen[tie.module].records}
    updates = {path: seen[path].update(growth.model.get_submodule(path)) for path in {tie.module for tie in consumers}}
    return Bottleneck(scales, {path: update for path, update in updates.items() if update is not None})


def _has_weight_op(growth: Growth, tie: Tie, dim: int) -> bool:
    """Whether the tie is the natural axis of a module that `weight_op_of` knows, and no other module uses its tensors."""
    module = growth.model.get_submodule(tie.module)
    known = weight_op_of.dispatch(type(module)) is not weight_op_of.dispatch(object)
    names = [f"{tie.module}.{name}" if tie.module else name for name in dict(module.named_parameters(recurse=False))]
    if not known or tie.dim != dim or tie.tensor not in names or any(map(growth.graph.is_shared, names)):
        return False
    return not module.get_parameter("weight").is_complex()


@singledispatch
def weight_op_of(module: nn.Module, path: str, x: Tensor) -> WeightOp | None:
    """The module's product of its weight and an input; None for other types, and for settings that are not handled."""
    return None


@weight_op_of.register
def _(module: nn.Linear, path: str, x: Tensor) -> WeightOp | None:
    return WeightOp(path, 1, 0, module.weight, module.bias, None, x.flatten(0, -2), None) if x.dim() > 1 else None


@weight_op_of.register(nn.Conv1d)
@weight_op_of.register(nn.Conv2d)
@weight_op_of.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, path: str, x: Tensor) -> WeightOp | None:
    space = len(module.kernel_size)
    unusual = module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    if unusual or x.dim() != space + 2:
        return None
    padding, ones = tuple(map(int, module.padding)), (1,) * space
    geometry = Geometry(module.kernel_size, module.stride, padding, padding, module.dilation, ones)
    return WeightOp(path, 1, 0, module.weight, module.bias, None, x, geometry)


class _LayerRecorder:
    """The forward hook of one module: records inputs and gradients at evenly sampled positions of its outputs."""

    def __init__(self, path: str, most: int) -> None:
        self.path, self.most = path, most
        self.records: list[_Record] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        value: Any = args[0] if args else kwargs.get("input")
        op = weight_op_of(module, self.path, value.detach()) if isinstance(value, Tensor) else None
        if op is None:
            return
        # As the weight op has it: a dense layer's samples and positions on one axis.
        shape = (-1, output.shape[-1]) if op.geometry is None else output.shape
        total = output_positions(op, output.detach().reshape(shape))
        rows = evenly(total, self.most).to(value.device)
        record = _Record(op.columns(rows)[0], rows * len(value) // total)
        self.records.append(record)
        if output.requires_grad:
            # A hook, because an activation in place would leave the gradient of its own output here.
            output.register_hook(lambda gradient: record.set_gradients(op.outputs_at(gradient.reshape(shape), rows)[0]))

    def second(self) -> Tensor:
        """E[x·xᵀ], `[columns, columns]` float64."""
        inputs = _exact([record.inputs for record in self.records])
        return finite(inputs.T @ inputs / len(inputs), self.path)

    def update(self, module: nn.Module) -> Update | None:
        """The ridge fit of the gradients on the inputs, or None if it explains nothing on held-out samples."""
        full = [record for record in self.records if record.gradients is not None]
        if not full:
            return None
        weight, bias = module.get_parameter("weight"), parameter_table(module).get("bias")
        zeros = torch.zeros(weight.shape, dtype=torch.float64).flatten(1)
        made = refit(
            _exact([record.inputs for record in full]),
            _exact([record.gradients for record in full if record.gradients is not None]),
            zeros,
            None if bias is None else zeros.new_zeros(len(zeros)),
            torch.cat([record.sample for record in full]).cpu() % 2 == 1,
        )
        return made and Update(made[0].reshape(weight.shape), None if bias is None else made[1])


@dataclass(eq=False)
class _Record:
    """Inputs and output gradients of one call of a module.

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
    return torch.cat([part.to("cpu", torch.float64) for part in parts])


@singledispatch
def forward_with(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a module that `weight_op_of` handles, with another weight and bias."""
    raise AssertionError(f"{type(module).__name__} has no weight op")


@forward_with.register
def _(module: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


@forward_with.register
def _(module: ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv_forward(module, x, weight, bias)


class Corrections:
    """Terms of the loss, from forward hooks on the consumers of an expanded model, that subtract the updates.

    Adding `total` to the loss subtracts each consumer's update from the gradient that its new columns and their inputs
    get; the gradients of its other columns do not change.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def total(self) -> Tensor | float:
        """The sum of the last pass's terms; they are cleared."""
        parts, self.parts = self.parts, []
        return sum(parts)


@contextmanager
def subtract_updates(growth: Growth, updates: Mapping[str, Update]) -> Iterator[Corrections]:
    """Register the hooks on the consumers of the expanded model; on leaving they are removed."""
    corrections = Corrections()
    with ExitStack() as hooks:
        for path, update in updates.items():
            module = growth.model.get_submodule(path)
            hooks.callback(
                module.register_forward_hook(_Correction(growth, path, update, corrections), with_kwargs=True).remove
            )
        yield corrections


class _Correction:
    """The hook of one consumer: adds −⟨output of its update, output of its new columns⟩."""

    def __init__(self, growth: Growth, path: str, update: Update, corrections: Corrections) -> None:
        change = growth.changes[f"{path}.weight" if path else "weight"]
        like = change.tensor
        weight = update.weight.to(like.device, like.dtype)
        for dim, index_map in change.axes.items():
            weight = index_map.apply(weight, dim)
        bias = None if update.bias is None else update.bias.to(like.device, like.dtype)
        if bias is not None and 0 in change.axes:
            bias = change.axes[0].apply(bias, 0)
        self.weight, self.bias, self.corrections = weight, bias, corrections
        new_unit = [index == NEW_UNIT for index in change.axes[1].indices]
        self.new_unit = torch.tensor(new_unit, dtype=like.dtype, device=like.device).reshape(
            -1, *[1] * (like.dim() - 2)
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        present = forward_with(module, x.detach(), self.weight, self.bias)
        new = forward_with(module, x, module.get_parameter("weight") * self.new_unit, None)
        self.corrections.parts.append(-(present * new).sum())
