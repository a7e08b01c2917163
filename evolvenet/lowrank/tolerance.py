"""The smallest ranks within a tolerance of a metric, by bisection, with a check that it is monotone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from evolvenet.errors import FactorizationError
from evolvenet.lowrank.budget import GRID, LayerCost, affordable
from evolvenet.lowrank.fit import Observations
from evolvenet.lowrank.plan import Choice, Request, SecondMoments, choose, possible
from evolvenet.lowrank.rank_choice import Energy, Within
from evolvenet.lowrank.report import RankSearch

log = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], float]
Trial = Callable[[Evaluate, Sequence[Choice]], float]
"""A metric and choices → the metric of the model with these factors."""


def bisected(count: int, value: Callable[[int], float], least: float) -> tuple[int | None, dict[int, float]]:
    """The first of some places, by bisection, whose value is at least so large, and every value that was computed.

    The last place is looked at first; if it is too small, so are all others by assumption. Then about log₂ of the places
    are, and two more below the one found, to see whether the assumption holds: the second one before, and the one half as far
    from the beginning. The first place of all these whose value is large enough is returned, None if there is none. NaN is
    not large enough.

    Args:
        count: of places.
        value: of a place; it should rise.
        least: that a value must have.

    >>> bisected(100, lambda place: place / 100, least=0.335)[0]
    34
    """
    known: dict[int, float] = {}

    def enough(place: int) -> bool:
        if place not in known:
            known[place] = value(place)
        return known[place] >= least

    low, high = -1, count
    if count and enough(count - 1):
        high = count - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
    for place in {high - 2, high // 2} - {high}:
        if 0 <= place < count:
            enough(place)
    return min((place for place in known if enough(place)), default=None), known


@dataclass(eq=False)
class ToleranceSearch:
    """Finds the smallest ranks within a tolerance, see `Within`.

    Args:
        seen: from `observe`, or None.
        trial: measures.

    Attributes:
        searches: what was done.
        evaluations: of metrics.
    """

    seen: Observations | None
    trial: Trial
    searches: list[RankSearch] = field(default_factory=list[RankSearch], init=False)
    evaluations: int = field(default=0, init=False)
    _before: dict[Evaluate, float] = field(default_factory=dict[Evaluate, float], init=False)

    @property
    def _moments(self) -> SecondMoments:
        return {} if self.seen is None else self.seen.moments

    def common(self, requests: Sequence[Request], rule: Within) -> list[Choice]:
        """Choices by one share of energy for all layers: the smallest of `budget.GRID` within the tolerance."""

        def at(place: int) -> list[Choice]:
            share = Energy(GRID[len(GRID) - 1 - place])
            return [choose(replace(request, rank=share), self._moments) for request in requests]

        place = self._search(None, rule, rule.drop, len(GRID), at)
        if place is not None:
            return at(place)
        reason = "no share of energy keeps the metric within the tolerance"
        return [Choice(each.target, refusal=each.target.refusal or reason) for each in requests]

    def one_by_one(self, requests: Sequence[Request]) -> list[Choice]:
        """Choices by the rank of each layer that has a tolerance, in the order of execution; others as they are requested."""
        found = {
            each.target: Choice(each.target, refusal=each.target.refusal or "not yet chosen")
            if isinstance(each.rank, Within)
            else choose(each, self._moments)
            for each in requests
        }
        drops: dict[Evaluate, float] = {}
        for request in self._in_order(requests):
            rule, target = request.rank, request.target
            assert isinstance(rule, Within)
            options = self._options(request)
            drops[rule.evaluate] = drops.get(rule.evaluate, 0.0) + rule.drop

            def at(place: int, options: Sequence[Choice] = options) -> list[Choice]:
                return list({**found, options[place].target: options[place]}.values())

            place = self._search(target.name, rule, drops[rule.evaluate], len(options), at)
            if place is not None:
                found[target] = options[place]
            elif options:
                reason = "none of its ranks that was measured keeps the metric within the tolerance"
                found[target] = Choice(target, refusal=reason)
            else:
                kinds = possible(request)
                reason = kinds if isinstance(kinds, str) else "no factors of it have fewer parameters"
                found[target] = Choice(target, refusal=reason)
        return list(found.values())

    def _in_order(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with a tolerance, in the order of execution where that was observed."""
        chosen = [each for each in requests if isinstance(each.rank, Within) and each.target.refusal is None]
        order = [] if self.seen is None else list(self.seen.extents)
        return sorted(chosen, key=lambda each: order.index(each.target.name) if order else 0)

    def _options(self, request: Request) -> list[Choice]:
        """Factors of a layer that are smaller than it, smallest first: every rank of a kind that has one, else a front."""
        target, kinds = request.target, possible(request)
        if isinstance(kinds, str):
            return []
        full = kinds[0].full_rank(target.shape)
        if len(kinds) == 1 and len(full) == 1:
            ranks = [kinds[0].checked_ranks(target.shape, rank) for rank in range(1, full[0] + 1)]
            every = (Choice(target, kinds[0], each) for each in ranks)
            return [choice for choice in every if choice.parameters < target.shape.parameters]
        whole = target.shape.parameters
        options = affordable(
            request, self.seen, LayerCost(whole, lambda kind, ranks: kind.parameters(target.shape, ranks))
        )
        # Larger ones that keep no more energy than a smaller one are left out.
        least, front = math.inf, list[Choice]()
        for option in options:
            if option.loss < least:
                least = option.loss
                front.append(Choice(target, option.kind, option.ranks))
        return front

    def _search(
        self, layer: str | None, rule: Within, drop: float, count: int, at: Callable[[int], Sequence[Choice]]
    ) -> int | None:
        """The smallest place within the tolerance; None if there is none."""
        sign = 1.0 if rule.mode == "max" else -1.0
        if rule.evaluate not in self._before:
            self._before[rule.evaluate] = self._value(rule, [])
        before = self._before[rule.evaluate]
        if math.isnan(before):
            raise FactorizationError("Within: expected a number as the metric of the model, got NaN.")
        tried: dict[int, Sequence[Choice]] = {}
        values: dict[object, float] = {}

        def value(place: int) -> float:
            choices = tried[place] = at(place)
            key = tuple((each.kind, each.ranks) for each in choices)
            if key not in values:
                values[key] = sign * self._value(rule, choices)
            return values[key]

        limit = sign * before - drop
        place, known = bisected(count, value, limit)
        measured = sorted({(_parameters(tried[each], layer), sign * metric) for each, metric in known.items()})
        found = None if place is None else sign * known[place]
        search = RankSearch(layer, before, sign * limit, rule.mode, measured, found)
        self.searches.append(search)
        if not search.monotone:
            log.warning(
                "%s: the metric is not monotone in the rank: %s (parameters, metric). The smallest rank that was measured "
                "within the tolerance is taken; evaluate on more samples to be sure of it.",
                layer or "All layers", ", ".join(f"{size:,}: {metric:.4g}" for size, metric in measured),
            )  # fmt: skip
        return place

    def _value(self, rule: Within, choices: Sequence[Choice]) -> float:
        self.evaluations += 1
        return self.trial(rule.evaluate, choices)


def _parameters(choices: Sequence[Choice], layer: str | None) -> int:
    """Of one layer, or of all."""
    return sum(choice.parameters for choice in choices if layer in (None, choice.target.name))
