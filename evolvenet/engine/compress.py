"""`compress`: a network of a given cost in one call, by widths and ranks together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.engine.compression import UNITS, Attempt, Compression, amount
from evolvenet.engine.functional import apply
from evolvenet.errors import EvolveNetError, ResizeError, TraceError
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.graph.restriction import Patterns, Restriction
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lowrank.attention import split_attentions
from evolvenet.lowrank.budget import Option, energy_loss, factorizable, layer_cost, options_of, within_budget
from evolvenet.lowrank.factorize import Selected, Work, factorize_by
from evolvenet.lowrank.fit import Observations, observe
from evolvenet.lowrank.joint import LayerInGraph, joint
from evolvenet.lowrank.plan import Request, requested
from evolvenet.lowrank.report import Factorization
from evolvenet.lowrank.sensitivity import OutputLoss, output_losses
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.cost import Costs, latency, macs, parameters, size_in_bytes
from evolvenet.measurement.output_error import MEASURES, OutputMeasure, outputs_on
from evolvenet.pruning.allocation import allocate_to
from evolvenet.pruning.distillation import Descent, distil
from evolvenet.pruning.distillation_losses import OutputDistance
from evolvenet.pruning.distillation_samples import Augment, before_judged, imitation
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.pruning.selection import plan_prune
from evolvenet.pruning.trials import Curve, trial_curves
from evolvenet.signals import deferred_signals
from evolvenet.surgery.optimizer_parameters import as_list
from evolvenet.surgery.width_record import remember_widths
from evolvenet.tracing.trace import trace

log = logging.getLogger("evolvenet")

SPLITS = (0.4, 0.7)
"""Shares of the way to the limit, in logarithms of the cost, that widths go before ranks go the rest."""

BY_ENERGY = "ranks by energy"
"""The attempt whose ranks go by the energy of the layers' outputs, not by trials on those of the network."""

NEAR = 0.97
"""Share of a latency that widths are chosen for: the next measurement may be a little slower."""

BISECTIONS = 6
"""In the search for the multiply-accumulates whose latency fits."""

HELD_OUT = 0.25
"""Share of the batches that nothing is fitted on while attempts are compared."""


# Tensors of inference mode could not be trained on, and factors are new tensors.
@torch.inference_mode(False)
@torch.no_grad()
def compress(  # noqa: PLR0913  one name for each cost
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    *,
    parameters: int | None = None,
    macs: int | None = None,
    bytes: int | None = None,
    latency: float | None = None,
    lowrank: bool = True,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    fixed: Patterns = (),
    multiple: int = 1,
    outputs: Outputs | None = None,
    steps: int = 0,
    augment: Augment | None = None,
    features: Sequence[str] = (),
    loss: OutputMeasure = "outputs",
) -> Compression:
    """Make a network as small as is required, in place, all or nothing, with the least change of its outputs.

    Several ways are tried, and the one with the least measured error of the network's outputs is taken: cuts of widths alone;
    factors of ranks alone; both, by loss per cost over both; and widths part of the way, ranks for the rest. Each is fitted on
    unlabelled samples and judged on others, a quarter of the batches; the best one is then done again with all batches.
    No label is needed. A few hundred samples are enough, in four batches or more. Nothing is trained without `steps`; with
    some, the result is trained on the same samples to put out what the uncut network did, see `evolvenet.polish`.

    Args:
        model: any module. Its parameters and buffers are resized in place; layers are replaced by chains where a lower rank is
            the better choice, see `evolvenet.factorize`.
        example_inputs: as for `trace`.
        batches: inputs of the model.
        parameters: most parameters afterwards; or one of the next three.
        macs: most multiply-accumulates of a forward pass, for one sample.
        bytes: most bytes of parameters and buffers, in their own dtypes.
        latency: most seconds of a forward pass on the example inputs, measured on this machine, threads and load as they are:
            give example inputs of the batch size that counts. Chains are timed, since fewer multiply-accumulates are not
            always faster.
        lowrank: whether ranks are in question; without, widths alone are cut.
        optimizers: the one or those that hold the model's parameters. State of cut tensors is cut, factors start fresh.
        fixed: names or patterns of widths that keep their size, or of modules that produce them.
        multiple: of which the channels of every width that is cut are a multiple.
        outputs: as for `trace`: what the error is measured on, too.
        steps: of gradient descent at the end. 200 are worth most of what more of them are.
        augment: see `evolvenet.polish`. A copy of the uncut network is kept for it until the end.
        features: the same.
        loss: "outputs" for the relative error of the outputs; "kl" where they are logits, for the divergence of the predicted
            probabilities. By it widths and ranks are chosen, attempts compared and steps taken.

    Returns:
        What was tried and done; `print` it.

    Raises:
        ResizeError: if the network cannot be made so small, or for none or several costs. Nothing has changed then.
        TraceError: if the model does not run on the inputs, or there is no batch.
        SpectrumError: for NaN or infinite weights or inputs.
        DistillationError: for another loss, or outputs that are no logits for "kl"; if steps are asked for and no parameter
            requires gradients, or the network cannot be copied.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> done = compress(model, torch.zeros(1, 32), [torch.randn(32, 32) for _ in range(4)], parameters=4_000)
    >>> done.before, done.after <= 4_000, [attempt.name for attempt in done.attempts][:3]
    (6922, True, ['widths', 'ranks', 'ranks by energy'])
    """
    # Over 40 lines: the signature, whose arguments are listed one a line.
    given = {"params": parameters, "macs": macs, "bytes": bytes, "latency": latency}
    goal = Goal.of({kind: limit for kind, limit in given.items() if limit is not None}, example_inputs)
    listed, descent = _listed(batches), Descent(steps, augment=augment, features=tuple(features), loss=loss)
    graph = Restriction(fixed=fixed, multiple=multiple).apply(trace(model, example_inputs, outputs))
    before = goal.cost(model)
    if before <= goal.limit:
        raise ResizeError(
            f"Compress: expected fewer {UNITS[goal.kind]} than the model has, {amount(goal.kind, before)}, got "
            f"{amount(goal.kind, goal.limit)}. It meets the limit already."
        )
    fitting, judging = held_out(listed)
    whole = outputs_on(model, judging, graph)
    if loss != "outputs":
        OutputDistance.of(loss, [whole])
    search = Search.of(model, graph, goal, fitting, lowrank, loss)

    def error(model: nn.Module, graph: WidthGraph) -> float:
        return MEASURES[loss](whole, outputs_on(model, judging, graph))

    found: dict[str, tuple[Attempt, Mapping[str, int]]] = {}
    for name, sizes in search.candidates():
        with deferred_signals("an attempt"), ExitStack() as undo:
            found[name] = search.tried(name, sizes, fitting, error, undo), sizes
    chosen, sizes = _best(goal, list(found.values()))
    lesson = imitation(model, listed, graph.outputs, augment is not None or bool(features)) if steps else None
    with ExitStack() as undo:
        with deferred_signals("the compression"):
            known = before_judged(listed, lesson[1]) if lesson is not None else listed  # less what decides on the steps
            cut, layers = search.execute(chosen.name, sizes, known, as_list(optimizers), undo)
            after = (
                trace(model, example_inputs, outputs) if layers is not None and layers.before > layers.after else cut
            )
        polished = None if lesson is None else distil(model, *lesson, descent)
        undo.pop_all()
    remember_widths(model, after, graph.sizes)
    changed = {name: (size, sizes[name]) for name, size in graph.sizes.items() if sizes[name] != size}
    attempts = tuple(attempt for attempt, _ in found.values())
    return Compression(
        goal.kind, goal.limit, before, goal.cost(model), attempts, chosen, changed, layers, after, polished, loss
    )


@dataclass(frozen=True)
class Goal:
    """A limit on a cost of the network.

    Args:
        kind: "params", "macs", "bytes" or "latency".
        limit: of the cost.
        example_inputs: what multiply-accumulates are counted on, and a forward pass is timed with.
    """

    kind: str
    limit: float
    example_inputs: Any

    @classmethod
    def of(cls, given: Mapping[str, float], example_inputs: Any) -> Goal:
        """The goal from the one cost that is given.

        Raises:
            ResizeError: for none or several.
        """
        if len(given) != 1:
            raise ResizeError(
                f"Compress: expected one of parameters, macs, bytes and latency, got {', '.join(given) or 'none'}. "
                "Take for example compress(model, inputs, batches, parameters=100_000)."
            )
        ((kind, limit),) = given.items()
        return cls(kind, limit, example_inputs)

    def cost(self, model: nn.Module) -> float:
        """Of a model."""
        if self.kind == "latency":
            return latency(model, self.example_inputs)
        if self.kind == "macs":
            return macs(model, self.example_inputs)
        return parameters(model) if self.kind == "params" else size_in_bytes(model)


def held_out(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Batches to fit on and others to judge on; the same ones where there is one alone.

    >>> held_out([1, 2, 3, 4, 5])
    ([1, 2, 3, 4], [5])
    """
    few = max(1, int(HELD_OUT * len(batches)))
    return (batches[:-few], batches[-few:]) if len(batches) > 1 else (batches, batches)


@dataclass(frozen=True, eq=False)
class Search:
    """Everything that attempts at one goal have in common: losses of widths and of ranks, measured on the uncut network.

    Args:
        model: the model, uncut whenever a method begins.
        graph: its widths.
        goal: the limit.
        costs: of the network at other widths.
        curves: {width: loss at some sizes}.
        loss: of factors; None where ranks are not in question.
        options: {layer: ways to factorize it}.
        layers: {layer: its place in the graph}.
    """

    model: nn.Module
    graph: WidthGraph
    goal: Goal
    costs: Costs
    curves: Mapping[str, Curve]
    loss: OutputLoss | None
    options: Mapping[str, Sequence[Option]]
    layers: Mapping[str, LayerInGraph]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        graph: WidthGraph,
        goal: Goal,
        batches: Sequence[Any],
        lowrank: bool,
        measure: OutputMeasure,
    ) -> Search:
        """Measure the losses: trial cuts of single widths, trial factors of single layers."""
        costs, curves = Costs.of(model, graph, goal.example_inputs), trial_curves(model, graph, batches, loss=measure)
        if not lowrank:
            return cls(model, graph, goal, costs, curves, None, {}, {})
        with deferred_signals("the search of layers"), ExitStack() as undo:
            split_attentions(model, None, undo)
            requests = requested(model, None, "auto")
            asked = factorizable(requests)
            if not asked:
                return cls(model, graph, goal, costs, curves, None, {}, {})
            seen = observe(model, [request.target for request in asked.values()], batches)
            loss = output_losses(model, requests, seen, batches, graph, measure)
            # A sum of measured times of layers would be too rough to share a limit between widths and ranks.
            shared = {} if goal.kind == "latency" else asked
            options = {
                name: options_of(request, seen, layer_cost(goal.kind, request, seen), loss)
                for name, request in shared.items()
            }
            layers = {name: _in_graph(request, seen) for name, request in asked.items()}
        return cls(model, graph, goal, costs, curves, loss, options, layers)

    def candidates(self) -> Iterator[tuple[str, Mapping[str, int]]]:
        """(name, sizes of the widths, after which ranks go the rest of the way)."""
        yield "widths", self._sizes(self.goal.limit)
        if self.loss is None:
            return
        yield "ranks", self.graph.sizes
        yield BY_ENERGY, self.graph.sizes
        limit, kind = self.goal.limit, self.goal.kind
        if self.options:
            both = joint(self.graph, self.costs, kind, limit, self.curves, self.options, self.layers)
            yield "widths and ranks", both.sizes
        start = self.costs.at(kind, {})
        for share in SPLITS:
            cost = limit**share * start ** (1 - share)
            yield f"widths to {amount(kind, cost)}, then ranks", self._sizes(cost)

    def _sizes(self, limit: float) -> dict[str, int]:
        """The widths for a cost; for a latency those with the most multiply-accumulates that are fast enough."""
        if self.goal.kind != "latency":
            return allocate_to(self.graph, self.curves, partial(self.costs.at, self.goal.kind), limit)
        allocated = partial(allocate_to, self.graph, self.curves, partial(self.costs.at, "macs"))
        low, high, limit = 0.0, self.costs.at("macs", {}), NEAR * limit
        best = allocated(low)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            sizes = allocated(middle)
            if self.costs.at("latency", sizes) <= limit:
                best, low = sizes, middle
            else:
                high = middle
        return best

    def tried(
        self,
        name: str,
        sizes: Mapping[str, int],
        batches: Sequence[Any],
        error: Callable[[nn.Module, WidthGraph], float],
        undo: ExitStack,
    ) -> Attempt:
        """The outcome of an attempt.

        Args:
            name: of the attempt.
            sizes: {width: size}.
            batches: to fit on.
            error: (model, its graph) → error of its outputs.
            undo: closing it puts everything back.
        """
        try:
            self.execute(name, sizes, batches, (), undo)
            cost = self.goal.cost(self.model)
            if cost > self.goal.limit:
                return Attempt(name, cost, None, "above the limit")
            return Attempt(name, cost, error(self.model, self.graph))
        except EvolveNetError as problem:
            log.debug("compress: %s failed", name, exc_info=problem)
            return Attempt(name, None, None, str(problem))

    def execute(
        self,
        name: str,
        sizes: Mapping[str, int],
        batches: Sequence[Any],
        optimizers: Sequence[Optimizer],
        undo: ExitStack,
    ) -> tuple[WidthGraph, Factorization | None]:
        """Cut the widths, then choose and fit ranks until the network is within the limit.

        Args:
            name: of the attempt.
            sizes: {width: size}.
            batches: to fit on.
            optimizers: of the model.
            undo: closing it puts everything back, also what was done before a failure.
        """
        surgery = plan_prune(self.model, self.graph, sizes, collect(self.model, self.graph, batches))
        surgery = reconstruct(self.model, self.graph, surgery, batches)
        apply(self.model, surgery, optimizers, undo)
        if self.loss is None or self.goal.cost(self.model) <= self.goal.limit:
            return surgery.graph, None
        return surgery.graph, factorize_by(
            self.model, partial(self._select, name), undo, None, "auto", batches, optimizers
        )

    def _select(self, name: str, work: Work) -> Selected:
        assert self.loss is not None
        loss = energy_loss if name == BY_ENERGY else self.loss
        if self.goal.kind == "latency":
            return work.within_latency(self.goal.limit, self.goal.example_inputs, loss)
        name, limit = {"params": "parameters"}.get(self.goal.kind, self.goal.kind), int(self.goal.limit)
        return within_budget(work.model, work.requests, work.seen, loss=loss, **{f"most_{name}": limit}), {}


def _in_graph(request: Request, seen: Observations) -> LayerInGraph:
    target = request.target
    each = target.layer.get_parameter("weight").element_size()
    return LayerInGraph(seen.names[target.name], target.shape, seen.extents[target.name], each)


def _listed(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, Tensor):
        raise TraceError("Batches: expected an iterable of model inputs, got one tensor. Wrap it in a list: [inputs].")
    listed = list(batches)
    if not listed:
        raise TraceError("Batches: expected at least one batch of model inputs, got none.")
    return listed


def _best(goal: Goal, found: Sequence[tuple[Attempt, Mapping[str, int]]]) -> tuple[Attempt, Mapping[str, int]]:
    """The attempt with the least error; one whose outputs are not finite has none."""
    errors = [(attempt.error, place) for place, (attempt, _) in enumerate(found) if attempt.error is not None]
    there = [each for each in errors if math.isfinite(each[0])]
    if not there:
        reasons = "; ".join(
            f"{attempt.name}: {attempt.reason or f'error {attempt.error}'}"
            + (f" ({attempt.cost:,})" if attempt.cost else "")
            for attempt, _ in found
        )
        raise ResizeError(
            f"Compress: no attempt reached {amount(goal.kind, goal.limit)} {UNITS[goal.kind]}. {reasons}. Take a larger limit."
        )
    return found[min(there)[1]]
