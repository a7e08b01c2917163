"""A cut, the fit of all consumers after it, and a test on held-out batches whether the fit helps.

Each layer's fit is tested by itself (`linalg.ridge`). That does not say that all of them together bring the outputs nearer to
what they were: where the calibration data is narrow, errors add up from layer to layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from evolvenet.execution.sampling import samples_in
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.output_error import first_batches, output_error, outputs_on
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.pruning.reconstruction_batch import (
    LARGE_LIMITS,
    ONE_SHOT_LIMITS,
    ReconstructionLimits,
    concatenated,
    held_out_of,
    is_large,
)
from evolvenet.pruning.selection import plan_prune
from evolvenet.pruning.streamed_plan import fit_streamed
from evolvenet.surgery.resize_model import Surgery, compile_surgery, install

log = logging.getLogger("evolvenet")

LEAST = 3
"""Fewest batches of which some are held out: with two, half of the data would be."""
HELD_OUT = 8
"""One batch of so many is held out, one at least."""
TESTED = 128
"""Most samples that the outputs are compared on."""
SHARES = (1.0, 0.0, 0.5)
"""Of the way from the cut to the fit, that are tried."""
MARGIN = 1.02
"""The whole fit is taken unless its error is more than so many times the least."""


def plan_fitted_prune(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    batches: Sequence[Any] | Tensor,
    limits: ReconstructionLimits = ONE_SHOT_LIMITS,
) -> Surgery:
    """Choose units, cut the others, and fit the consumers as far as it helps on batches that are held out.

    With `LEAST` batches or more, the last ones are held out. On these the outputs' error (see `output_error`) is compared after
    the cut alone, with the fit, and half-way between both. The best share of the fit is taken, for a fit to all batches
    (to the others only, for a large model, see `is_large`). If that is not the whole fit, the new graph's `notes`
    and a warning say so.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}.
        batches: inputs of the model.
        limits: on the data of the fit.

    Returns:
        The changes. Nothing is changed yet.

    Raises:
        ResizeError, SpectrumError, TraceError: as `plan_prune` and `collect`.
    """
    # A single tensor is refused there.
    listed = batches if isinstance(batches, Tensor) else list(batches)
    if is_large(graph) and limits == ONE_SHOT_LIMITS:
        limits = LARGE_LIMITS
    if len(listed) < LEAST or isinstance(listed, Tensor):
        return _fitted(model, graph, sizes, listed, limits)[1]
    count = max(1, len(listed) // HELD_OUT)
    rest, tested = listed[:-count], first_batches(listed[-count:], TESTED)
    cut, surgery = _fitted(model, graph, sizes, rest, limits)
    bare = cut()
    values = {change.name: change.value for change in bare.changes}
    if all(change.value is values.get(change.name) for change in surgery.changes):
        # No consumer of a large model could be fitted.
        return surgery
    errors = _errors(model, graph, bare, surgery, tested)
    # Where no error is a number, they tell nothing.
    known = {share: error for share, error in errors.items() if math.isfinite(error)}
    better = not known or errors[1.0] <= MARGIN * min(known.values())
    share = 1.0 if better else min(known, key=lambda each: known[each])
    if share and not is_large(graph):
        cut, surgery = _fitted(model, graph, sizes, listed, limits)
        bare = surgery if share == 1 else cut()
    if share == 1:
        return surgery
    what = f"taken by {share:.0%}" if share else "refused"
    note = (
        f"the fit of the consumers is {what}: the outputs' error on held-out batches is {errors[1.0]:.3g} with it, "
        f"{errors[0.5]:.3g} with half of it, {errors[0.0]:.3g} without; batches from more sources would help"
    )
    log.warning("Prune: %s.", note)
    chosen = _between(bare, surgery, share)
    return replace(chosen, graph=replace(chosen.graph, notes=(note,)))


def _errors(
    model: nn.Module, graph: WidthGraph, bare: Surgery, fitted: Surgery, batches: Sequence[Any]
) -> dict[float, float]:
    """{share of the fit: the outputs' error on the batches}; the model is left as it was."""
    whole = outputs_on(model, batches, graph)
    errors: dict[float, float] = {}
    for share in SHARES:
        # Outputs that move in proportion to the share are, half-way, at least (√bare − √fitted) / 2 away: not nearer than
        # with the whole fit.
        if share not in (0.0, 1.0) and errors[0.0] >= 9 * errors[1.0]:
            continue
        undo = install(model, _between(bare, fitted, share))
        try:
            errors[share] = output_error(whole, outputs_on(model, batches, graph))
        finally:
            undo()
    return errors


def _fitted(
    model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int], batches: Any, limits: ReconstructionLimits
) -> tuple[Callable[[], Surgery], Surgery]:
    """What computes the cut alone, and the cut with the fit.

    They share the values of tensors that the fit leaves alone, if the model is large.
    """
    names = [graph.widths[name].name for name, size in sizes.items() if size != graph.widths[name].size]
    if is_large(graph) and not isinstance(batches, Tensor):
        joined = concatenated(batches, limits)
        if joined is not None and samples_in(joined) == sum(map(samples_in, batches)):
            streamed = fit_streamed(model, graph, sizes, joined, held_out_of(batches, joined), limits)
            if streamed is not None:
                cut, fitted = streamed
                return lambda: cut, fitted
    surgery = plan_prune(model, graph, sizes, collect(model, graph, batches, names))
    bare = partial(compile_surgery, model, graph, surgery.maps, surgery.bases)
    return bare, reconstruct(model, graph, surgery, batches, limits)


def _between(bare: Surgery, fitted: Surgery, share: float) -> Surgery:
    """The surgery whose values are so far on the way from the bare cut to the fit."""
    cut = {change.name: change.value for change in bare.changes}

    def value(name: str, tensor: Tensor, there: Tensor) -> Tensor:
        start = cut.get(name, tensor.detach())
        if share == 1 or start is there or not (there.is_floating_point() or there.is_complex()):
            return there
        return start + (there - start) * share if share else start

    return replace(
        fitted,
        changes=tuple(
            replace(change, value=value(change.name, change.tensor, change.value)) for change in fitted.changes
        ),
    )
