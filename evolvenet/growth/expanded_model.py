"""The expanded model: the places of new units in every tensor, and a run with them that leaves the model as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import ResizeError, SpectrumError, concerning
from evolvenet.execution.isolation import isolated
from evolvenet.execution.step import run_model
from evolvenet.graph.index_map import NEW_UNIT, IndexMap
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import FOLLOWS, MASKS, PRODUCES, Tie, Width, WidthGraph
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.spectrum import matricize
from evolvenet.surgery.norm_expansion import expand_norms
from evolvenet.surgery.resize_model import Surgery, TensorChange, compile_surgery, install

INITIAL_NORM = 3**-0.5
"""Mean norm of a row of PyTorch's default initialisation, U(−1/√d, 1/√d); for a layer whose rows are all 0."""

Entries = Mapping[Tie, Tensor]
"""{tie: entries of the new units, `[count, places]` float64 or complex128}; the places in the order of `Growth.unit_entries`."""

Loss = Callable[[Any, Any], Tensor]
"""(the model's output, targets) → a scalar."""


@dataclass(frozen=True)
class NewUnitSlice:
    """The slice of a tensor that holds the new units.

    Args:
        dim: the axis of the units.
        first: its first index on the axis.
        count: number of new units.
        repeat: consecutive indices of each unit on the axis.
        others: {other axis that changes: its map}; entries between new units of both axes stay 0.
    """

    dim: int
    first: int
    count: int
    repeat: int
    others: Mapping[int, IndexMap]

    def put(self, tensor: Tensor, entries: Tensor | None) -> None:
        """Write `[count, places]`, or zeros, into a tensor of the new shape."""
        part = tensor.narrow(self.dim, self.first, self.count * self.repeat)
        if entries is None:
            part.zero_()
            return
        lengths = [self.others[dim].size if dim in self.others else length for dim, length in enumerate(tensor.shape)]
        del lengths[self.dim]
        fresh = entries.reshape(self.count * self.repeat, *lengths).movedim(0, self.dim)
        for dim, index_map in self.others.items():
            fresh = index_map.apply(fresh, dim)
        part.copy_(fresh)

    def take(self, tensor: Tensor) -> Tensor:
        """Read `[count, places]` out of a tensor of the new shape, float64 or complex128 on the CPU."""
        part = tensor.detach().narrow(self.dim, self.first, self.count * self.repeat)
        for dim, index_map in self.others.items():
            old = [place for place, index in enumerate(index_map.indices) if index != NEW_UNIT]
            part = part.index_select(dim, torch.tensor(old, device=tensor.device))
        return in_float64(part.movedim(self.dim, 0).reshape(self.count, -1), "cpu")


@dataclass(frozen=True, eq=False)
class Growth:
    """The input of an initializer.

    Args:
        model: the model, unchanged.
        graph: its widths.
        surgery: the expansion, new units zero (1 for norm weights and running variances).
        generator: where random numbers come from, a CPU generator; None for PyTorch's global one.
        batches: None; model inputs; with a loss, pairs of (model inputs, targets).
        loss: None, or (model output, targets) → a scalar.
    """

    model: nn.Module
    graph: WidthGraph
    surgery: Surgery
    generator: torch.Generator | None = None
    batches: tuple[Any, ...] | None = None
    loss: Loss | None = None

    @property
    def widths(self) -> tuple[Width, ...]:
        """The widths that grow, without those that a norm mixes: see `evolvenet.surgery.norm_expansion`."""
        growing = (self.graph.widths[name] for name in self.surgery.maps)
        return tuple(width for width in growing if width.exact_growth is None)

    @property
    def mixed_widths(self) -> tuple[Width, ...]:
        """The widths that grow and that a norm mixes; their new units start with random columns and zero or equal rows."""
        growing = (self.graph.widths[name] for name in self.surgery.maps)
        return tuple(width for width in growing if width.exact_growth is not None)

    def count(self, width: Width) -> int:
        """Number of new units of the width."""
        return self.surgery.maps[width.name].new_size - width.size

    @cached_property
    def changes(self) -> dict[str, TensorChange]:
        """The changes by the tensors' names."""
        return {change.name: change for change in self.surgery.changes}

    @property
    def inputs(self) -> tuple[Any, ...] | None:
        """The model inputs alone."""
        if self.batches is None or self.loss is None:
            return self.batches
        return tuple(inputs for inputs, _ in self.pairs("inputs"))

    def pairs(self, method: str) -> tuple[tuple[Any, Any], ...]:
        """(inputs, targets) of every batch.

        Raises:
            ResizeError: if there are no batches, no loss, or the batches are no pairs.
        """
        missing = [name for name, value in (("batches", self.batches), ("loss", self.loss)) if value is None]
        if missing:
            raise ResizeError(
                f"Grow: method {method!r} uses the loss's gradient and needs batches of (inputs, targets) and "
                f"loss(model_output, targets), got no {' and no '.join(missing)}. Pass both, or take 'orthogonal'."
            )
        for batch in self.batches or ():
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                got = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
                raise ResizeError(
                    f"Grow: with a loss, expected every batch to be a pair of (inputs, targets), got {got}."
                )
        return tuple((batch[0], batch[1]) for batch in self.batches or ())

    def value(self, inputs: Any, targets: Any) -> Tensor:
        """The loss of one batch.

        Raises:
            ResizeError: if it is no scalar, or has no gradient.
        """
        value = self._one_number(inputs, targets)
        if not value.requires_grad:
            raise ResizeError(
                "Grow: the loss has no gradient: something between the weights and the loss is detached, or runs under "
                "no_grad. Methods that use the gradient need it; 'orthogonal' and 'paired' do not."
            )
        return value.sum()

    def mean_loss(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        """The mean of the batches' losses, each with the same random numbers; batches count equally.

        Raises:
            ResizeError: if a loss is no scalar.
        """
        values: list[float] = []
        for inputs, targets in pairs:
            with isolated(self.model, gradients=self.graph.differentiates):
                values.append(float(self._one_number(inputs, targets)))
        return math.fsum(values) / len(values)

    def _one_number(self, inputs: Any, targets: Any) -> Tensor:
        assert self.loss is not None, "pairs() refuses a growth without a loss"
        value = self.loss(run_model(self.model, inputs), targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ResizeError(
                f"Grow: expected loss(model_output, targets) to be a tensor with one number, got {got}. "
                "The model runs in eval mode; take the mean over the batch."
            )
        return value

    def of(self, counts: Mapping[str, int]) -> Growth:
        """The same growth with other numbers of new units, {width: count}; widths with none are left out."""
        sizes = {name: self.graph.widths[name].size for name in counts}
        maps = {name: IndexMap.grow(sizes[name], count) for name, count in counts.items() if count}
        return replace(self, surgery=compile_surgery(self.model, self.graph, maps))

    def unit_entries(self, tie: Tie, width: Width) -> Tensor:
        """The entries of the present units in one tensor, `[width.size, places]`, float64 or complex128 on the CPU.

        Raises:
            SpectrumError: for NaN or infinite entries.
        """
        tensor = self.changes[tie.tensor].tensor.detach().narrow(tie.dim, tie.start, width.size * tie.repeat)
        return in_float64(matricize(tensor, tie.dim, tie.tensor), "cpu").reshape(width.size, -1)

    def norm(self, tie: Tie, width: Width) -> float:
        """Mean norm of a present unit's entries in one tensor; `INITIAL_NORM` where a producer's are all 0."""
        return float(self.unit_entries(tie, width).norm(dim=1).mean()) or (
            INITIAL_NORM if tie.role == PRODUCES else 0.0
        )

    def slot(self, tie: Tie, width: Width) -> NewUnitSlice:
        """The slice of one tensor that holds the new units."""
        axes = self.changes[tie.tensor].axes
        first = axes[tie.dim].indices.index(tie.start) + width.size * tie.repeat
        others = {dim: index_map for dim, index_map in axes.items() if dim != tie.dim}
        return NewUnitSlice(tie.dim, first, self.count(width), tie.repeat, others)

    def matrices(self, width: Width, role: str) -> tuple[Tie, ...]:
        """The ties of one role in weights and kernels, not in vectors."""
        return tuple(tie for tie in width.ties if tie.role == role and len(self.graph.shapes[tie.tensor]) > 1)

    def is_copied(self, tie: Tie) -> bool:
        """Whether the surgery has given new units the entries of present ones: in masks, and in gates that are not trained."""
        gate = tie.tensor in self.graph.gates and not self.changes[tie.tensor].tensor.requires_grad
        return gate or tie.role == MASKS

    def is_vector(self, tie: Tie) -> bool:
        """Whether a tensor has one axis of any length: `[units]`, or `[1, units, 1, 1]` for images."""
        shape = self.graph.shapes[tie.tensor]
        return len(shape) == 1 or math.prod(shape) == shape[tie.dim]


def fill_new_units(growth: Growth, directions: Entries) -> Surgery:
    """The surgery of a growth with the entries of its new units.

    Args:
        growth: the expansion.
        directions: {tie: rows of norm 1 (or 0)}, scaled to the mean norm of the present units; zeros for ties left out. The
            entries of vectors are not given: 0 where ops only add them (biases, running means), the mean magnitude of the
            present units where they scale (norm weights, running variances), 1 if those are all 0, and those of present
            units in masks and gates that are not trained.

    Returns:
        The changes, for `apply_surgery`.
    """
    values = {name: change.value.clone() for name, change in growth.changes.items()}
    added = growth.graph.added
    for width in growth.widths:
        for tie in width.ties:
            slot, value = growth.slot(tie, width), values[tie.tensor]
            if tie in directions:
                with concerning(width.name):
                    slot.put(value, growth.norm(tie, width) * directions[tie])
            elif growth.is_vector(tie) and tie.role == FOLLOWS and not (tie.tensor in added or growth.is_copied(tie)):
                units = growth.changes[tie.tensor].tensor.detach().narrow(tie.dim, tie.start, width.size * tie.repeat)
                level = units.abs().mean()
                # With a scale of 0 and columns of 0 both gradients would stay 0.
                if level > 0:
                    value.narrow(tie.dim, slot.first, slot.count * slot.repeat).fill_(level)
    filled = replace(growth.surgery, changes=tuple(replace(c, value=values[c.name]) for c in growth.surgery.changes))
    return expand_norms(growth.model, growth.graph, filled, growth.generator)


@contextmanager
def expanded(growth: Growth, directions: Entries) -> Iterator[Mapping[str, Tensor]]:
    """The expanded model, on shadows of its tensors, in eval mode with gradients; on leaving it is as it was.

    Yields:
        {name: shadow} of the tensors with a new shape.
    """
    with installed(growth.model, lambda: fill_new_units(growth, directions)) as shadows:
        yield shadows


@contextmanager
def installed(model: nn.Module, plan: Callable[[], Surgery]) -> Iterator[Mapping[str, Tensor]]:
    """The model after a surgery, on shadows of its tensors, in eval mode with gradients; on leaving it is as it was.

    Args:
        model: the model.
        plan: the surgery, made inside; its values are the shadows' memory.

    Yields:
        {name: shadow} of the tensors that the surgery changes.
    """
    with isolated(model, shadows=True, gradients=True):
        shadows, _, _ = named_tensors(model)
        placed = plan()
        changes = tuple(replace(change, tensor=shadows[change.name]) for change in placed.changes)
        install(model, replace(placed, changes=changes))
        yield {change.name: change.tensor for change in changes}


def finite(entries: Tensor, where: str) -> Tensor:
    """Return the entries unless some are NaN or infinite.

    Raises:
        SpectrumError: if some are.
    """
    if not bool(entries.isfinite().all()):
        raise SpectrumError(
            f"{where}: expected finite inputs and gradients of the loss while growing, got NaN or infinite ones. "
            "Training has diverged, or the batches hold such values: check both."
        )
    return entries
