"""The surgery that adds units to a model without changing its function."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.errors import PolicyError, ResizeError, TraceError
from evolvenet.graph.exact_growth import COPY, ExactGrowth
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.naming import tensor_named
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.growth.expanded_model import Growth, Loss, fill_new_units
from evolvenet.growth.initializers import METHODS
from evolvenet.growth.weight_update import update_weights
from evolvenet.surgery.resize_model import Surgery, check_finite, compile_surgery

log = logging.getLogger("evolvenet")

WITH_LOSS = frozenset({"gradmax", "tiny"})
"""The methods that need batches and a loss."""


@dataclass(frozen=True)
class NewUnits:
    """How the new units of a run start.

    Args:
        method: see `plan_growth`.
        update: whether the weights around them then move so that the loss falls.

    Raises:
        PolicyError: for an unknown method.

    >>> NewUnits("tiny").needs_loss, NewUnits("paired").needs_loss
    (True, False)
    """

    method: str = "orthogonal"
    update: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PolicyError(f"Expected new_units to be one of {', '.join(sorted(METHODS))}, got {self.method!r}.")

    @property
    def needs_loss(self) -> bool:
        """Whether the training loss is needed."""
        return self.update or self.method in WITH_LOSS

    @property
    def without_loss(self) -> NewUnits:
        """How they start where there is no loss: by the same method if it needs none, without updates.

        >>> NewUnits("paired", update=True).without_loss
        NewUnits(method='paired', update=False)
        >>> NewUnits("tiny").without_loss
        NewUnits(method='orthogonal', update=False)
        """
        return NewUnits("orthogonal" if self.method in WITH_LOSS else self.method)


def plan_growth(  # noqa: PLR0913  each is one choice of a growth
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    method: str = "orthogonal",
    generator: torch.Generator | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    update: bool = False,
    optimizers: Sequence[Optimizer] = (),
) -> Surgery:
    """Add units so that the network computes the same function (but for "random" and `update`). Nothing is changed yet.

    New units come last. Their rows in every producer follow the method, with the mean norm of the existing rows; what
    is added to them (biases, running means) is 0, what scales them (norm weights, running variances) the mean magnitude
    of the present units, depthwise kernels are random of the mean norm; the columns that consume them are 0 and have a
    gradient at once, but for the pairs of "paired". In a weight that both produces and consumes the units both are 0.

    Widths that a norm mixes, such as residual streams, start in their own way whatever the method: with zeros, the mean of
    the present units, or copies of them, see `evolvenet.surgery.norm_expansion`.

    - "orthogonal": rows orthogonal to all others as long as there are any; then random, or with batches those whose
      activations are predicted worst from the present units (NORTH*).
    - "paired": the same, in pairs with fan-outs of opposite signs (Net2Net, gromo), the last of an odd number alone.
    - "gradmax": rows that make the gradient of the fan-out largest (GradMax, with fan-in and fan-out exchanged).
    - "tiny": rows for the part of the gradient that no update of the present weights follows (TINY).
    - "random": rows and columns random; changes the function, for comparison.

    Algorithms and sources: `evolvenet.growth.initializers`.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}, each at least the present size.
        method: one of `METHODS`.
        generator: where the random numbers come from, a CPU generator; None for PyTorch's global one.
        batches: model inputs, as for `prune`; with a loss, pairs of (model inputs, targets). "gradmax" and "tiny" run
            the model and its backward pass over all of them 21 times: a few batches are enough.
        loss: (model output, targets) → a scalar, the model in eval mode; "gradmax", "tiny" and `update` need it.
        update: whether the weights around the new units then move so that the loss falls, see `update_weights`.
        optimizers: that train the model: `update` moves only weights that they hold, or all where there are none.

    Returns:
        The changes, for `apply_surgery`.

    Raises:
        ResizeError: for an unknown method, an unknown or frozen width, a size that it cannot take, a width of which an
            op mixes the units so that none can be added, or batches or a loss that the method needs and that are missing or
            malformed.
        SpectrumError: for NaN or infinite weights, activations or gradients.
        TraceError: if there is no batch in `batches`.

    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> surgery = plan_growth(model, trace(model, torch.zeros(1, 4)), {"0": 3})
    >>> values = {change.name: change.value for change in surgery.changes}
    >>> values["0.weight"].shape, values["2.weight"][:, 2].tolist()
    (torch.Size([3, 4]), [0.0, 0.0])
    """
    if method not in METHODS:
        raise ResizeError(f"Grow: expected a method out of {', '.join(sorted(METHODS))}, got {method!r}.")
    maps: dict[str, IndexMap] = {}
    for name, size in sizes.items():
        width = graph.widths[name]
        _check(width, size)
        if size > width.size:
            _warn_of_untrained(model, width)
            maps[width.name] = IndexMap.grow(width.size, size - width.size)
    surgery = check_finite(compile_surgery(model, graph, maps))
    growth = Growth(model, graph, surgery, generator, _gathered(batches), loss)
    filled = fill_new_units(growth, METHODS[method](growth))
    return update_weights(growth, filled, optimizers) if update and maps else filled


def _gathered(batches: Iterable[Any] | None) -> tuple[Any, ...] | None:
    """All batches in a tuple: they are run several times."""
    if isinstance(batches, Tensor):
        raise TraceError("Batches: expected an iterable of batches, got one tensor. Wrap it in a list: [inputs].")
    gathered = None if batches is None else tuple(batches)
    if gathered == ():
        raise TraceError("Batches: expected at least one batch, got none.")
    return gathered


def _warn_of_untrained(model: nn.Module, width: Width) -> None:
    """Warn where all consumers of a width are buffers or frozen: the columns of new units are 0 and will stay so."""
    consumers = [tie.tensor for tie in width.consumers]
    if consumers and not any(tensor_named(model, name).requires_grad for name in consumers):
        log.warning(
            "Grow: nothing that consumes the units of %s is trained (%s): the new ones have no effect until you write their "
            "entries there.", width.name, ", ".join(consumers),
        )  # fmt: skip


def _check(width: Width, size: int) -> None:
    """Raise ResizeError for a size that would not keep the function."""
    if size < width.size:
        raise ResizeError(
            f"Grow: width {width.name!r} has {width.size} units, expected a new size of {width.size} or more, "
            f"got {size}. To remove units, use prune."
        )
    if width.frozen is not None or size == width.size:
        return
    if not width.can_grow:
        raise ResizeError(
            f"Grow: width {width.name!r} cannot grow from {width.size} to {size} units without changing the function: "
            f"{width.mixed}. Residual streams under layer norms and RMS norms grow, if each norm is of a type for which "
            "evolvenet.surgery.norms.norm_of is registered, or computes as torch's do. "
            "One that is tied to places of all heads of an attention (GPT-2) grows after trace(…, heads=True). "
            "resize with IndexMap.grow adds units all the same, as zeros."
        )
    if width.exact_growth == ExactGrowth(COPY) and size % width.size:
        raise ResizeError(
            f"Grow: width {width.name!r} can only grow by whole copies of its {width.size} units without changing the "
            f"function, expected a multiple of {width.size}, got {size}: {width.mixed}. Take {width.rounded(size)}."
        )
