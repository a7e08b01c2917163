"""From a request to the kind and the ranks of every layer: a pure function of weights and second moments."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from evolvenet.errors import FactorizationError, SpectrumError
from evolvenet.linalg.precision import in_float64
from evolvenet.lowrank.base import Kind, Ranks
from evolvenet.lowrank.kinds import KINDS, candidates, kind_named
from evolvenet.lowrank.layers import canonical
from evolvenet.lowrank.rank_choice import EVBMF, Energy, GavishDonoho, RankRule, Spectrum, Within
from evolvenet.lowrank.targets import Target, find_targets

Rank = int | Sequence[int] | float | str | RankRule | Within
"""A rank, one for each of the kind's ranks, a share of energy, "evbmf" or "gavish_donoho", a rule, or a tolerance."""

RULES: Mapping[str, Callable[[], RankRule]] = {"evbmf": EVBMF, "gavish_donoho": GavishDonoho}
"""Rules that are given by a name."""

SecondMoments = Mapping[str, Sequence[Tensor]]
"""{name of a target: the second moment of its inputs for each channel group}, see `Kind.decompose`."""


@dataclass(frozen=True, eq=False)
class Request:
    """What is to become of one layer.

    Args:
        target: the layer.
        kind: name of a kind, or "auto".
        rank: fixed, a rule, or a tolerance, which `evolvenet.lowrank.tolerance` replaces by others.
    """

    target: Target
    kind: str
    rank: int | tuple[int, ...] | RankRule | Within


@dataclass(frozen=True, eq=False)
class Choice:
    """The factors of one layer, or why it stays whole.

    Args:
        target: the layer.
        kind: of the factors.
        ranks: of the factors.
        refusal: why the layer stays whole; None if it is factorized.
    """

    target: Target
    kind: Kind | None = None
    ranks: Ranks = ()
    refusal: str | None = None

    @property
    def parameters(self) -> int:
        """Entries of the layer's weight, or of its factors."""
        if self.refusal is not None or self.kind is None:
            return self.target.shape.parameters
        return self.kind.parameters(self.target.shape, self.ranks)


def requested(
    model: nn.Module, ranks: Rank | Mapping[str, object] | None, kinds: str | Mapping[str, str]
) -> list[Request]:
    """A request for each layer that is to be factorized; arguments as in `factorize`.

    Raises:
        FactorizationError: for layers that do not exist, or that are named and cannot be factorized; for malformed ranks.
    """
    targets = find_targets(model)
    for name in (*(ranks if isinstance(ranks, Mapping) else ()), *(kinds if isinstance(kinds, Mapping) else ())):
        if name not in targets:
            raise FactorizationError(
                f"Layers: expected names of dense layers or convolutions of the model, got {name!r}. It has "
                f"{', '.join(targets) or 'none'}."
            )
        if (reason := targets[name].refusal) is not None:
            raise FactorizationError(f"{name} cannot be factorized: {reason}.")
    wanted: Mapping[str, object] = ranks if isinstance(ranks, Mapping) else dict.fromkeys(targets, ranks)
    found: dict[Target, Request] = {}
    for name, rank in wanted.items():
        target = targets[name]
        kind = kinds if isinstance(kinds, str) else kinds.get(name, "auto")
        if isinstance(rank, tuple) and rank and rank[0] in KINDS:
            kind, rank = str(rank[0]), rank[1] if len(rank) == 2 else tuple(rank[1:])
        if kind != "auto":
            kind_named(kind)
        request = Request(target, kind, _rank(rank))
        if isinstance(ranks, Mapping) and kind != "auto" and (reason := kind_named(kind).refusal(target.shape)):
            raise FactorizationError(f"{name} cannot be factorized by {kind!r}: {reason}.")
        if isinstance(ranks, Mapping) and found.get(target, request).rank != request.rank:
            raise FactorizationError(f"{name} shares its weight with {target.name}: expected the same rank for both.")
        found[target] = request
    return list(found.values())


def _rank(given: object) -> int | tuple[int, ...] | RankRule | Within:
    """A rank of a request, checked."""
    if given is None:
        return Energy()
    if isinstance(given, float):
        return Energy(given)
    if isinstance(given, str) and given in RULES:
        return RULES[given]()
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if isinstance(given, (tuple, list)) and given and all(isinstance(each, int) for each in given):
        return tuple(int(each) for each in given)
    if isinstance(given, Within):
        return given
    if hasattr(given, "rank") and hasattr(given, "uses_data"):
        return given  # type: ignore[return-value]
    raise FactorizationError(
        f"Ranks: expected an int, one for each of the kind's ranks, a share of energy between 0 and 1, "
        f"{', '.join(map(repr, RULES))} or a rule of evolvenet.lowrank.rank_choice, got {given!r}."
    )


def choose(request: Request, moments: SecondMoments) -> Choice:
    """The kind and the ranks of one layer; of several kinds, that with the fewest parameters at its rank.

    Args:
        request: for the layer.
        moments: of the layers' inputs; empty to go by the weights.

    Raises:
        SpectrumError: if the weight has NaN or infinite entries.
    """
    target = request.target
    if target.refusal is not None:
        return Choice(target, refusal=target.refusal)
    kinds = possible(request)
    if isinstance(kinds, str):
        return Choice(target, refusal=kinds)
    if isinstance(request.rank, int | tuple):
        kinds = kinds[:1]
    found = [Choice(target, kind, _ranks(kind, request, moments)) for kind in kinds]
    return if_smaller(min(found, key=lambda choice: choice.parameters))


def possible(request: Request) -> tuple[Kind, ...] | str:
    """The kinds that come into question for a layer, or why there are none."""
    shape = request.target.shape
    if request.kind == "auto":
        return candidates(shape)
    reason = kind_named(request.kind).refusal(shape)
    return reason if reason is not None else (kind_named(request.kind),)


def if_smaller(choice: Choice) -> Choice:
    """The choice, or the whole layer where factors do not have fewer parameters."""
    assert choice.kind is not None
    whole, factored = choice.target.shape.parameters, choice.parameters
    if factored < whole:
        return choice
    ranks = ", ".join(map(str, choice.ranks))
    return replace(
        choice, refusal=f"{choice.kind.name} of rank {ranks} has {factored:,} parameters, no fewer than {whole:,}"
    )


def _ranks(kind: Kind, request: Request, moments: SecondMoments) -> Ranks:
    rule, shape = request.rank, request.target.shape
    assert not isinstance(rule, Within)
    if isinstance(rule, int | tuple):
        return kind.checked_ranks(shape, rule)
    own = moments.get(request.target.name) if rule.uses_data else None
    return kind.checked_ranks(shape, kind.combined([rule.rank(each) for each in spectra(kind, request.target, own)]))


def spectra(kind: Kind, target: Target, moments: Sequence[Tensor] | None) -> list[Spectrum]:
    """The spectrum of each of a kind's unfoldings."""
    weights = weights_of(target)
    each = [
        kind.unfoldings(weight, moment) for weight, moment in zip(weights, _per_group(weights, moments), strict=True)
    ]
    return [Spectrum.of(list(matrices), len(each[0])) for matrices in zip(*each, strict=True)]


def decomposed(choice: Choice, moments: Sequence[Tensor] | None) -> list[list[Tensor]]:
    """The factors of each channel group, float64."""
    assert choice.kind is not None
    weights = weights_of(choice.target)
    pairs = zip(weights, _per_group(weights, moments), strict=True)
    return [choice.kind.decompose(weight, choice.ranks, moment) for weight, moment in pairs]


def weights_of(target: Target) -> Tensor:
    """The weight `[groups, out, in, k…]`, float64, on the CPU.

    Raises:
        SpectrumError: if it has NaN or infinite entries.
    """
    weight = target.layer.get_parameter("weight").detach()
    if not bool(weight.isfinite().all()):
        raise SpectrumError(
            f"{target.name}: expected finite weights, got NaN or infinite ones. Training has diverged: lower the learning "
            "rate, clip gradients, or load an earlier checkpoint."
        )
    return in_float64(canonical(target.layer, weight, target.shape.groups), "cpu")


def relative_error(weights: Tensor, merged: Tensor, moments: Sequence[Tensor] | None) -> float:
    """Relative squared error of the outputs, Σ‖(W − Ŵ)x‖² / Σ‖Wx‖², for inputs of a second moment; of the weight without one."""
    lost = kept = 0.0
    for weight, other, moment in zip(weights, merged, _per_group(weights, moments), strict=True):
        whole, apart = weight.flatten(1), (weight - other).flatten(1)
        lost += float((apart * (apart if moment is None else apart @ moment)).sum())
        kept += float((whole * (whole if moment is None else whole @ moment)).sum())
    return max(lost, 0.0) / kept if kept > 0 else 0.0


def _per_group(weights: Tensor, moments: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
    return [None] * len(weights) if moments is None else moments
