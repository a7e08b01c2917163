"""`factorize`: layers replaced by chains of factors, with the optimizers, all or nothing."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import version_of
from evolvenet.errors import FactorizationError
from evolvenet.execution.state_guard import SavedState
from evolvenet.graph.naming import named_tensors
from evolvenet.lowrank.attention import Split, of_projections, split_attentions
from evolvenet.lowrank.budget import Loss, energy_loss, within_budget
from evolvenet.lowrank.factor_state import State, check_state, factor_states
from evolvenet.lowrank.fit import Fitted, Observations, fit, observe
from evolvenet.lowrank.latency import LatencyBudget, any_factors, fastest, within_latency
from evolvenet.lowrank.layers import factored
from evolvenet.lowrank.plan import (
    Choice,
    Rank,
    Request,
    SecondMoments,
    choose,
    decomposed,
    relative_error,
    requested,
    weights_of,
)
from evolvenet.lowrank.rank_choice import Within
from evolvenet.lowrank.report import Factorization, LayerReport
from evolvenet.lowrank.tolerance import Evaluate, ToleranceSearch
from evolvenet.pruning.reconstruction_batch import ONE_SHOT_LIMITS, ReconstructionLimits
from evolvenet.signals import deferred_signals
from evolvenet.surgery.module_replacement import exchange_modules
from evolvenet.surgery.optimizer_parameters import NewStates, as_list, parameter_names, replace_parameters


@torch.no_grad()
@deferred_signals("the factorization")
def factorize(  # noqa: PLR0913  of the budgets at most one is given
    model: nn.Module,
    ranks: Rank | Mapping[str, Any] | None = None,
    kinds: str | Mapping[str, str] = "auto",
    batches: Iterable[Any] | None = None,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    parameters: int | None = None,
    macs: int | None = None,
    bytes: int | None = None,
    latency: float | None = None,
    state: State = "fresh",
) -> Factorization:
    """Replace dense layers and convolutions by chains of smaller layers, in place, all or nothing.

    A layer whose factors would not have fewer parameters stays whole, and the report says so. The factors are ordinary
    layers in a `FactoredLayer`, which knows its `kind`, its `ranks` and its `merged_weight`. The bias stays the parameter
    that it was. `nn.MultiheadAttention` is split into its four projections where one of them is factorized.

    Args:
        model: any module.
        ranks: for all layers, or {layer: its rank} for some. A rank is an int, a tuple of the kind's ranks, a share of energy
            to keep (0.99, the default), "evbmf", "gavish_donoho", or a rule of `evolvenet.lowrank.rank_choice`, among them
            `Within`: the smallest rank with which a metric stays within a tolerance. In a dict it may come with a kind:
            ("spatial", 8).
        kinds: "auto" (SVD for dense layers and kernels of 1, Tucker-2 or spatial SVD, whichever is smaller, for others;
            Tucker-2 where the rank is given, channel SVD where there are few inputs), one of
            `evolvenet.lowrank.kinds.KINDS`, or {layer: kind}.
        batches: inputs of the model. With them the factors approximate the outputs of the layers: each layer, in execution
            order, is fitted on the inputs that it gets in the factorized model to the outputs that it had before, its bias
            or the running mean of a batch norm right after it included (`evolvenet.lowrank.fit`). Without them the factors
            approximate the weights, which is the baseline.
        optimizers: the one or those that hold the model's parameters. Factors take the place of their weight in its parameter
            group, with fresh state.
        parameters: most parameters of the whole model afterwards, in place of ranks: layers lose energy where it saves the most
            parameters, see `evolvenet.lowrank.budget`. The ranks are None, or {layer: None} for some layers alone.
        macs: likewise, most multiply-accumulates for one sample; needs batches.
        bytes: likewise, most bytes of the model's parameters and buffers in their own dtypes.
        latency: likewise, most seconds of a forward pass on the first batch, measured now, on this machine, with the number of
            threads that is set; needs batches. A chain may have fewer multiply-accumulates than its layer and be slower: such
            layers stay whole. See `evolvenet.lowrank.latency`.
        state: of the optimizers for the factors. "fresh" starts anew, with a step count of 0. "projected" maps the weight's
            first and second moments to the factors, "kronecker" does so from the sums over rows and columns of the second
            moment; both keep the step count, see `evolvenet.lowrank.factor_state`. They hold for the kinds "svd" and
            "spatial" and for Adam, AdamW and SGD; the state of all others, and of split attentions, is fresh.
            experiments/compare/factor_state.md compares them.

    Returns:
        What became of each layer.

    Raises:
        FactorizationError: if a layer that is named cannot be factorized as requested. Nothing has changed then.
        SpectrumError: for NaN or infinite weights or inputs.
        TraceError: for batches without a sample.

    >>> layer = nn.Linear(10, 10, bias=False)
    >>> layer.weight.data = torch.randn(10, 2) @ torch.randn(2, 10)
    >>> model, x = nn.Sequential(layer), torch.randn(100, 10)
    >>> before = model(x)
    >>> print(factorize(model, {"0": 2})["0"])
    0: svd of rank 2, 100 → 40 parameters, error ...
    >>> sum(parameter.numel() for parameter in model.parameters())
    40
    >>> bool((model(x) - before).abs().max() < 5e-6)
    True
    """

    def select(work: Work) -> Selected:
        if not _budgeted(ranks, parameters=parameters, macs=macs, bytes=bytes, latency=latency):
            return work.by_rules(common=not isinstance(ranks, Mapping))
        if latency is not None:
            return work.within_latency(latency)
        return within_budget(
            model, work.requests, work.seen, most_parameters=parameters, most_macs=macs, most_bytes=bytes
        ), {}

    with ExitStack() as undo:
        report = factorize_by(model, select, undo, ranks, kinds, batches, optimizers, state)
        undo.pop_all()
    return report


Selected = tuple[Sequence[Choice], Mapping[str, Any]]
"""What becomes of each layer, and further arguments of the `Factorization`."""

Select = Callable[["Work"], Selected]
"""What is factorized → what becomes of each layer."""


@torch.no_grad()
def factorize_by(
    model: nn.Module,
    select: Select,
    undo: ExitStack,
    ranks: Rank | Mapping[str, Any] | None = None,
    kinds: str | Mapping[str, str] = "auto",
    batches: Iterable[Any] | None = None,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    state: State = "fresh",
) -> Factorization:
    """`factorize` with a choice of one's own.

    Args:
        model: as for `factorize`, like all below.
        select: the choice of kinds and ranks.
        undo: closing it puts everything back, also what was done before a failure.
        ranks: of the layers in question.
        kinds: of the layers in question.
        batches: inputs of the model.
        optimizers: of the model.
        state: of the optimizers for the factors.

    Returns:
        What became of each layer.

    Raises:
        FactorizationError, SpectrumError, TraceError: as `factorize`.
    """
    check_state(state)
    work = Work.of(model, ranks, kinds, batches, undo)
    choices, found = select(work)
    fitted = work.fitted(choices)
    report = Factorization(tuple(_reported(choice, fitted, work.moments) for choice in choices), **found)
    work.install(choices, fitted, as_list(optimizers), undo, state)
    return report


def _names(given: object) -> list[str]:
    return [str(name) for name in given] if isinstance(given, Mapping) else []


def _budgeted(ranks: object, **budgets: float | None) -> bool:
    """Whether there is a budget, checked."""
    found = [f"`{name}`" for name, limit in budgets.items() if limit is not None]
    if not found:
        return False
    if len(found) > 1:
        raise FactorizationError(
            f"Budget: expected one of {', '.join(f'`{name}`' for name in budgets)}, got {' and '.join(found)}."
        )
    given = list(ranks.values()) if isinstance(ranks, Mapping) else [ranks]
    if any(rank is not None for rank in given):
        raise FactorizationError(
            f"Factorize: expected no ranks with a budget, which chooses them, got {ranks!r}. "
            "To factorize some layers alone, pass {layer: None}."
        )
    return True


@dataclass(frozen=True, eq=False)
class Work:
    """What is factorized.

    Args:
        model: with whole layers, and its attentions split.
        requests: for its layers.
        splits: of its attentions.
        seen: what its layers got and put out; None without batches.
        first: the first batch; None without batches.
    """

    model: nn.Module
    requests: Sequence[Request]
    splits: Mapping[str, Split]
    seen: Observations | None
    first: Any = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        ranks: Any,
        kinds: Any,
        batches: Iterable[Any] | None,
        undo: ExitStack,
        limits: ReconstructionLimits = ONE_SHOT_LIMITS,
    ) -> Work:
        """Split the attentions, and observe the layers; arguments as for `factorize_by`, limits as for `observe`."""
        named = [*_names(ranks), *_names(kinds)] if isinstance(ranks, Mapping) else None
        splits = split_attentions(model, named, undo)
        requests = requested(model, of_projections(ranks, splits), of_projections(kinds, splits))
        layers = [request.target for request in requests if request.target.refusal is None]
        if batches is None or not layers:
            return cls(model, requests, splits, None)
        listed = batches if isinstance(batches, Tensor) else list(batches)
        seen = observe(model, layers, listed, limits)
        return cls(model, requests, splits, seen, listed[0])

    @property
    def moments(self) -> SecondMoments:
        """Of the layers' inputs."""
        return {} if self.seen is None else self.seen.moments

    def by_rules(self, common: bool) -> Selected:
        """Choices by the requests' ranks, and what belongs in the report; `common` if all have the same rank."""
        rules = [request.rank for request in self.requests if isinstance(request.rank, Within)]
        if not rules:
            return [choose(request, self.moments) for request in self.requests], {}
        search = ToleranceSearch(self.seen, self.metric)
        choices = search.common(self.requests, rules[0]) if common else search.one_by_one(self.requests)
        return choices, {"searches": tuple(search.searches), "evaluations": search.evaluations}

    def within_latency(self, limit: float, inputs: Any = None, loss: Loss = energy_loss) -> Selected:
        """Choices by measured time, and what belongs in the report.

        Args:
            limit: seconds of a forward pass.
            inputs: of that pass; the first batch by default.
            loss: of factors, see `budget.within_budget`.
        """
        if self.seen is None:
            raise FactorizationError(
                "Budget: expected batches with `latency`, got none. The first one is what is timed."
            )
        timed = self.first if inputs is None else inputs
        budget = LatencyBudget(self.model, timed, limit, self._with_any_values, fastest, loss, self.seen.gradients)
        choices, found = within_latency(budget, self.requests, self.seen)
        return choices, {"seconds": found}

    def fitted(self, choices: Sequence[Choice]) -> Fitted:
        """The factors of those choices that are not refused."""
        chosen = [choice for choice in choices if choice.refusal is None]
        if self.seen is None or not chosen:
            return Fitted({choice.target.name: decomposed(choice, None) for choice in chosen}, {}, {})
        return fit(self.model, chosen, self.seen)

    @contextmanager
    def installed(self, choices: Sequence[Choice], fitted: Fitted) -> Generator[None]:
        """The model with the factors inside, and as it was afterwards."""
        with ExitStack() as undo:
            self.install(choices, fitted, (), undo)
            yield

    def _with_any_values(self, choices: Sequence[Choice]) -> AbstractContextManager[None]:
        chosen = [choice for choice in choices if choice.refusal is None]
        return self.installed(choices, Fitted({choice.target.name: any_factors(choice) for choice in chosen}, {}, {}))

    def metric(self, evaluate: Evaluate, choices: Sequence[Choice]) -> float:
        """The metric of the model with the factors of some choices; the model is left as it was."""
        with self.installed(choices, self.fitted(choices)):
            saved = SavedState(self.model, with_buffers=False)
            # Compared by value: a batch norm writes its statistics without a new version of the tensors.
            buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
            versions = {name: version_of(parameter) for name, parameter in self.model.named_parameters()}
            try:
                found = float(evaluate(self.model))
            finally:
                saved.restore()
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            written = [name for name, each in self.model.named_parameters() if version_of(each) != versions[name]]
        if written:
            raise FactorizationError(
                f"Within: expected `evaluate` to leave the parameters as they are, got others for {', '.join(written)}. Train "
                "after the factorization."
            )
        return found

    def install(
        self,
        choices: Sequence[Choice],
        fitted: Fitted,
        optimizers: Sequence[Optimizer],
        undo: ExitStack,
        state: State = "fresh",
    ) -> None:
        """Put chains in the places of the layers; closing `undo` puts everything back."""
        tensors, _, _ = named_tensors(self.model)
        for name, value in fitted.values.items():
            undo.callback(_write, tensors[name], tensors[name].detach().clone())
            _write(tensors[name], value)
        exchanged: dict[nn.Module, nn.Module] = {}
        replaced: dict[Tensor, list[Tensor]] = {}
        states: dict[Tensor, NewStates] = {}
        for choice in choices:
            if choice.refusal is not None or choice.kind is None:
                continue
            target, kind = choice.target, choice.kind.name
            chain = factored(target.layer, kind, choice.ranks, fitted.factors[target.name])
            weights = [factor.get_parameter("weight") for factor in chain.factors]
            exchanged[target.layer] = chain
            for other in target.layers[1:]:
                exchanged[other] = factored(other, kind, choice.ranks, shared=weights)
            old = target.layer.get_parameter("weight")
            replaced[old], states[old] = list(weights), factor_states(chain, state)
        exchange_modules(self.model, exchanged, undo)
        for split in self.splits.values():
            if any(module in exchanged.values() for module in split.made.children()):
                composed = {
                    old: [new for part in parts for new in replaced.pop(part, [part])]
                    for old, parts in split.replaced.items()
                }
                replaced.update(composed)
            else:
                exchange_modules(self.model, {split.made: split.attention}, undo)
        replace_parameters(optimizers, replaced, parameter_names(self.model), undo, states)


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _reported(choice: Choice, fitted: Fitted, moments: SecondMoments) -> LayerReport:
    name, shape = choice.target.name, choice.target.shape
    if choice.refusal is not None or choice.kind is None:
        return LayerReport(name, None, (), shape.parameters, shape.parameters, reason=choice.refusal)
    merged = torch.stack([choice.kind.merged(group, shape.inputs) for group in fitted.factors[name]])
    error = fitted.errors.get(name)
    if error is None:
        error = relative_error(weights_of(choice.target), merged, moments.get(name))
    return LayerReport(name, choice.kind.name, choice.ranks, shape.parameters, choice.parameters, error)
