"""`resize`, `prune`, `grow`: change the widths of a model together with its optimizers' state, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.errors import stage
from evolvenet.graph.current import check_current
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.expanded_model import Loss
from evolvenet.growth.plan import plan_growth
from evolvenet.pruning.fitted_prune import plan_fitted_prune
from evolvenet.pruning.selection import plan_prune
from evolvenet.signals import deferred_signals
from evolvenet.surgery.optimizer_parameters import as_list
from evolvenet.surgery.optimizer_state import apply_state, compile_states, validate_state, weighing_new_gradients
from evolvenet.surgery.optimizer_tensors import with_inner
from evolvenet.surgery.resize_model import Surgery, compile_surgery, install
from evolvenet.surgery.width_record import remember_widths


def resize(
    model: nn.Module, graph: WidthGraph, maps: Mapping[str, IndexMap], optimizers: Optimizer | Sequence[Optimizer] = ()
) -> WidthGraph:
    """Change widths in place through index maps, with every optimizer's state, all or nothing.

    Args:
        model: the traced model.
        graph: its widths as they are now.
        maps: {width: map}. New units are zeros, with zero gradients; `grow` initializes them.
        optimizers: the one or those that hold the model's parameters.

    Returns:
        The graph of the changed model. The old one no longer fits it.

    Raises:
        ResizeError: if a width is unknown, frozen, or cannot take its map, or the graph was made before the last change of
            widths. Nothing has changed then.
        OptimizerStateError: if an optimizer's state is not understood. Nothing has changed then.

    >>> from evolvenet import IndexMap, trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = resize(model, trace(model, torch.zeros(1, 4)), {"0": IndexMap.keep([0, 2, 5], size=8)})
    >>> model[0], model[2].weight.shape
    (Linear(in_features=4, out_features=3, bias=True), torch.Size([2, 3]))
    """
    return commit(model, compile_surgery(model, graph, maps), optimizers)


def prune(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    batches: Iterable[Any] | None = None,
    optimizers: Optimizer | Sequence[Optimizer] = (),
) -> WidthGraph:
    """Shrink widths: select the units that stay, fit their consumers to the outputs before the cut, resize.

    Args:
        model: the traced model.
        graph: its widths as they are now.
        sizes: {width: new number of units}.
        batches: inputs of the model (tensors, tuples, dicts) to measure activations on; without them the choice is by
            weights alone and the consumers are not fitted. Samples of one source (crops of a photo, windows of a
            recording) belong in one batch: whether a fit helps is tested on other batches than those that it was made on,
            and with three batches or more so is the fit of all layers together, see `plan_fitted_prune`.
        optimizers: the one or those that hold the model's parameters.

    Returns:
        The graph of the changed model. Its `notes` say if the fit was refused, or taken by half, as it did not help on
        samples that were held out.

    Raises:
        ResizeError, OptimizerStateError: as `resize`.
    """
    check_current(model, graph)
    if batches is None:
        return commit(model, plan_prune(model, graph, sizes), optimizers)
    batches = batches if isinstance(batches, Tensor) else list(batches)
    return commit(model, plan_fitted_prune(model, graph, sizes, batches), optimizers)


def grow(  # noqa: PLR0913  public: each is one choice of a growth
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    method: str = "orthogonal",
    optimizers: Optimizer | Sequence[Optimizer] = (),
    generator: torch.Generator | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    update: bool = False,
) -> WidthGraph:
    """Widen widths without changing what the model computes, or, with `update`, so that the loss falls at once.

    Args:
        model: the traced model.
        graph: its widths as they are now.
        sizes: {width: new number of units}.
        method: how new units start: "orthogonal", "paired", "gradmax", "tiny", or "random", which does change what the
            model computes; see `plan_growth`.
        optimizers: the one or those that hold the model's parameters.
        generator: source of the new units' random directions.
        batches: model inputs, for "orthogonal" and "paired" where the rows already span everything; with a loss, pairs of
            (model inputs, targets).
        loss: (model output, targets) → a scalar; "gradmax", "tiny" and `update` need it and batches.
        update: whether the weights that produce or consume the widths then move, layer by layer, along TINY's least-squares
            step, as far as a line search says; only weights that the optimizers hold, or all that require gradients where
            there is no optimizer. This changes what the model computes on purpose; the mean loss of the batches,
            in eval mode, is never higher than before. Adam's estimates are carried and soon outweighed by new gradients, as
            after a fitted cut. See `evolvenet.growth.weight_update.update_weights`.

    Returns:
        The graph of the changed model.

    Raises:
        ResizeError, OptimizerStateError: as `resize`; also for a width whose units an op mixes so that no
            new unit could leave the function as it is (`Width.can_grow`), and for batches or a loss that the method needs
            and lacks.
    """
    check_current(model, graph)
    optimizers = as_list(optimizers)
    surgery = plan_growth(model, graph, sizes, method, generator, batches, loss, update, optimizers)
    return commit(model, surgery, optimizers)


@deferred_signals("the change of widths")
def commit(model: nn.Module, surgery: Surgery, optimizers: Optimizer | Sequence[Optimizer] = ()) -> WidthGraph:
    """Apply a compiled surgery to a model and its optimizers; on any failure everything is as before.

    Returns:
        The graph of the changed model.

    Raises:
        OptimizerStateError: if a state does not fit, before or after.
    """
    with ExitStack() as undo:
        apply(model, surgery, as_list(optimizers), undo)
        undo.pop_all()
    before = surgery.graph.with_sizes({name: index_map.size for name, index_map in surgery.maps.items()})
    remember_widths(model, surgery.graph, before.sizes)
    return surgery.graph


def apply(model: nn.Module, surgery: Surgery, optimizers: Sequence[Optimizer], undo: ExitStack) -> None:
    """Apply a compiled surgery; closing `undo` puts everything back, also what was done before a failure.

    Raises:
        OptimizerStateError: if a state does not fit, before or after.
    """
    with stage("optimizer state"), torch.inference_mode(False):
        plans = compile_states(optimizers, surgery.changes)
        plans = [weighing_new_gradients(plan) for plan in plans] if surgery.updated else plans
    undo.callback(install(model, surgery))
    for plan in plans:
        undo.callback(apply_state, apply_state(plan))
    with stage("optimizer state check"):
        for optimizer in with_inner(optimizers):
            validate_state(optimizer)
