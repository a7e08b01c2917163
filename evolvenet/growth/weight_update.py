"""Updates of present and new weights after a growth: least-squares steps, layer by layer, each with a line search.

The step is that of Verbockhaven, Rudkiewicz, Charpiat and Chevallier, "Growing tiny networks: spotting expressivity
bottlenecks and fixing them optimally", TMLR 2024: the change of a layer's weights whose change of the layer's outputs is
nearest to minus the loss's gradient there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.execution.differentiable_ops import ProductMode
from evolvenet.execution.isolation import op_by_op
from evolvenet.execution.weight_ops import WeightOp
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import CONSUMES, PRODUCES
from evolvenet.growth.expanded_model import INITIAL_NORM, Growth, installed
from evolvenet.growth.tiny import ROWS, record_gradients
from evolvenet.surgery.optimizer_tensors import with_inner
from evolvenet.surgery.resize_model import Surgery, with_values

log = logging.getLogger("evolvenet")

Pairs = Sequence[tuple[Any, Any]]
"""(inputs, targets) of each batch."""

HELD_OUT = 4
"""Every so many batches one is held out of the fits, for the line searches; with fewer the last one, if there are two."""

ENTRIES = 2**22
"""Most entries of one layer's inputs that a fit uses, rows × columns; at least `ROWS` rows."""

FIRST_STEP = 2.0**-6
"""Norm of the first step that a line search tries, as a share of the weight's norm."""

HALVINGS, DOUBLINGS = 6, 12
"""Most halvings of a first step that does not lower the loss, and doublings of one that does."""


def update_weights(growth: Growth, surgery: Surgery, optimizers: Sequence[Optimizer] = ()) -> Surgery:
    """Move the weights that produce or consume the growing widths so that the loss falls; the function changes.

    In the order in which the expanded model runs them, each weight moves along its least-squares step: with X the inputs of
    the layer, new units among them, and G the loss's gradient at its outputs, minus the ridge fit of G on X (the ridge
    selected on held-out samples, see `evolvenet.linalg.ridge.refit`). The step's length is that of the least loss on batches
    which were held out of the fit, 0 where none lowers it. If the mean loss of all batches is above that before, or not
    finite, no weight moves.

    The model runs in eval mode: statistics of batch norms and dropout are not those of training. Weights that are not
    trained, shared, in grouped or transposed convolutions, or used in other ways than in products stay. What is trained
    are the parameters with `requires_grad` that the optimizers hold; without optimizers, all that require gradients.

    Args:
        growth: with batches and a loss, its model before the growth.
        surgery: the growth, its new units filled.
        optimizers: that train the model.

    Returns:
        The surgery with other values of these weights and their biases.

    Raises:
        ResizeError, SpectrumError: for batches or a loss that cannot be used, or NaN in them.
    """
    pairs = growth.pairs("update")
    held = pairs[HELD_OUT - 1 :: HELD_OUT] or pairs[-1:]
    fitted = [pair for pair in pairs if not any(pair is other for other in held)] or pairs
    trained = _trained(growth.model, optimizers)
    copies = tuple(replace(change, value=change.value.clone()) for change in surgery.changes)
    with installed(growth.model, lambda: replace(surgery, changes=copies)), op_by_op():
        shadows, _, _ = named_tensors(growth.model)
        mover = _Mover(growth, shadows, trained, fitted, held)
        before = growth.mean_loss(pairs)
        for name in _in_order(growth, pairs[0], trained):
            mover.move(name)
        after = growth.mean_loss(pairs)
        if not after <= before:
            log.info(
                "Grow: the updates are left out, as the loss of all batches went from %.6g to %.6g.", before, after
            )
            return surgery
        moved = {name: shadows[name].detach().clone() for name in mover.moved}
    values = {change.name: change.value for change in surgery.changes}
    return replace(with_values(growth.model, surgery, {**values, **moved}), updated=bool(moved))


def _trained(model: nn.Module, optimizers: Sequence[Optimizer]) -> set[str]:
    """Names of the tensors that require gradients and that an optimizer holds, where there is one."""
    held = {weight for each in with_inner(optimizers) for group in each.param_groups for weight in group["params"]}
    tensors, _, _ = named_tensors(model)
    return {name for name, each in tensors.items() if each.requires_grad and (each in held or not optimizers)}


def _in_order(growth: Growth, pair: tuple[Any, Any], trained: set[str]) -> list[str]:
    """Names of the trained weights that produce or consume growing widths, in the order of their first product."""
    widths = (*growth.widths, *growth.mixed_widths)
    ties = [tie for width in widths for role in (PRODUCES, CONSUMES) for tie in growth.matrices(width, role)]
    order: dict[str, None] = {}

    def note(op: WeightOp, out: Tensor) -> None:
        order.setdefault(op.tensor)

    with op_by_op(ProductMode(growth.model, {tie.tensor for tie in ties} & trained, note)):
        growth.value(*pair)
    return list(order)


class _Mover:
    """Moves one weight after the other of an expanded model.

    Args:
        growth: of the model.
        shadows: its tensors, in place of the model's.
        trained: names of those that may move.
        fitted: batches of the fits.
        held: batches of the line searches.

    Attributes:
        moved: names of the tensors that have.
    """

    def __init__(
        self, growth: Growth, shadows: dict[str, Tensor], trained: set[str], fitted: Pairs, held: Pairs
    ) -> None:
        self.growth, self.shadows, self.trained = growth, shadows, trained
        self.fitted, self.held = fitted, held
        self.moved: set[str] = set()

    def move(self, name: str) -> None:
        """Move one weight, and its bias, along the least-squares step if that lowers the loss."""
        steps = self._steps(name)
        if not steps:
            return
        starts = {each: self.shadows[each].detach().clone() for each in steps}

        def loss_at(length: float) -> float:
            with torch.no_grad():
                for each, step in steps.items():
                    self.shadows[each].copy_(starts[each] + length * step)
            return self.growth.mean_loss(self.held)

        weight, norm = starts[name], float(steps[name].norm())
        size = float(weight.norm()) or INITIAL_NORM * len(weight) ** 0.5
        best = search_length(loss_at, FIRST_STEP * size / norm) if norm > 0 else 0.0
        loss_at(best)
        if best > 0:
            self.moved |= steps.keys()

    def _steps(self, name: str) -> dict[str, Tensor]:
        """{weight: minus its update, bias: minus its own}; empty where the fit explains nothing or cannot be made."""
        shape = self.shadows[name].shape
        columns = self.shadows[name].numel() // min(shape[:2])
        seen, uses = record_gradients(self.growth, [name], self.fitted, max(ROWS, ENTRIES // columns))
        bias = uses.biases.get(name)
        bias = bias if bias is not None and bias.name in self.trained else None
        update = seen[name].update(uses.axes[name], biased=bias is not None) if name in uses.axes else None
        if update is None:
            return {}
        weight = update.weight.T if update.axis == 0 else update.weight
        found = {name: -weight.to(self.shadows[name].device, self.shadows[name].dtype)}
        if bias is not None and update.bias is not None:
            like = self.shadows[bias.name]
            found[bias.name] = -bias.sign * update.bias.reshape(like.shape).to(like.device, like.dtype)
        return found


def search_length(loss_at: Callable[[float], float], first: float) -> float:
    """The length of a step, by doubling or halving a first one while the loss falls, then one finer step to each side.

    Args:
        loss_at: length → the loss, which may be NaN or infinite.
        first: the length that is tried first.

    Returns:
        Of the lengths that were tried the one with the least loss; 0 if none has a lower loss than 0.

    >>> search_length(lambda length: (length - 6) ** 2, first=1.0)
    5.656854249492381
    >>> search_length(lambda length: length, first=1.0)
    0.0
    """
    losses = {0.0: loss_at(0.0)}

    def lowers(length: float) -> bool:
        value = loss_at(length)
        lower = value < min(losses.values())
        losses[length] = value if math.isfinite(value) else math.inf
        return lower

    length = first
    if lowers(length):
        for _ in range(DOUBLINGS):
            length *= 2
            if not lowers(length):
                break
    else:
        for _ in range(HALVINGS):
            length /= 2
            if lowers(length):
                break
    best = min(losses, key=losses.__getitem__)
    for finer in (best * 2**0.5, best / 2**0.5) if best > 0 else ():
        lowers(finer)
    return min(losses, key=losses.__getitem__)
