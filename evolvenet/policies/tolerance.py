"""`Tolerance`: the smallest network whose validation metric stays within a tolerance of the best seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.width_spectra import WidthStatistics
from evolvenet.policies.base import Policy, PolicyContext, Proposal, check_fields
from evolvenet.policies.budget import Budget

Verdict = Literal["wait", "keep", "undo"]


@dataclass(frozen=True)
class Standing:
    """How far a run under a `Tolerance` has come. Immutable: every change makes a new one.

    Args:
        share: of the network's cost that the next cut takes.
        best: best value of the metric that a network which was kept had; None before the first one.
        waiting: widths of the cut that is not yet judged; empty if there is none.
        heard: validations since that cut.
        cuts: events so far at which something could have been cut.
        resting: {width: the number of those events from which on it may be cut again}.
        failed: {width: how often its cut was taken back}.
    """

    share: float
    best: float | None = None
    waiting: tuple[str, ...] = ()
    heard: int = 0
    cuts: int = 0
    resting: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """Cut while the validation metric allows it; take back what costs too much.

    Each cut takes a share of the network's cost, from the widths where that loses least. It is judged by the metric at the
    next `validations`: once one of them is within `drop` of the best value that a network had which was kept, it stays; where
    none is, weights, widths and optimizer state are again as they were before the cut, its widths are left alone for `patience`
    events, longer each time, and the next cut is half as large. Nothing is cut before the first validation.

    The best value is the largest of several, so it is luck in part; a cut gets several validations to reach it too. And training
    between a cut and its being taken back is lost, so cut where the metric is near what it will be at the end: late, or in the
    fine-tuning of a trained network.

    Args:
        metric: its name, as the module logs it in validation, for example "val/acc".
        drop: how far it may fall below the best (rise above it with mode="min"), in the metric's own units.
        mode: "max" if larger is better, "min" if smaller is.
        cost: what is to become small: "params", "macs" or "bytes".
        share: of the cost that one cut takes at most, 0 … 1.
        validations: how many a cut may take until the metric is back.
        patience: events for which a width is left alone after its cut was taken back, times how often it was.
        smallest: fewest units that a width keeps.
        trials: choose by trials on the network's outputs, see `Budget`.

    Raises:
        PolicyError: for a value outside its range.

    >>> policy = Tolerance(metric="val/acc", drop=0.002, validations=1)
    >>> standing = policy.after(policy.judged(policy.begin(), 0.99)[1], ["fc1"])
    >>> policy.judged(standing, 0.989)[0], policy.judged(standing, 0.98)[0]
    ('keep', 'undo')
    """

    metric: str
    drop: float
    mode: Literal["max", "min"] = "max"
    cost: Literal["params", "macs", "bytes"] = "params"
    share: float = 0.2
    validations: int = 3
    patience: int = 3
    smallest: int = 1
    trials: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, ("max", "min")),
            ("cost", self.cost, ("params", "macs", "bytes")),
        ):
            if value not in known:
                raise PolicyError(f"Tolerance: expected {name} to be one of {', '.join(known)}, got {value!r}.")
        if not isinstance(self.metric, str) or not self.metric:
            raise PolicyError(f'Tolerance: expected the name of a metric, for example "val/acc", got {self.metric!r}.')
        check_fields(self, shares=("share",), least={"drop": 0, "validations": 1, "patience": 0, "smallest": 1})

    def begin(self, state: Mapping[str, Any] | None = None) -> Standing:
        """The standing at the start of a run, or what `plain` made of one."""
        return Standing(self.share) if state is None else Standing(**{**state, "waiting": tuple(state["waiting"])})

    def plain(self, standing: Standing) -> dict[str, Any]:
        """A standing as dicts, lists and numbers, for a checkpoint."""
        return {**asdict(standing), "waiting": list(standing.waiting)}

    def after(self, standing: Standing, widths: Iterable[str]) -> Standing:
        """The standing after an event that cut these widths; none if it found nothing to cut."""
        return replace(standing, waiting=tuple(widths), heard=0, cuts=standing.cuts + 1)

    def at(self, moment: PolicyContext) -> Policy | None:
        """The next cut; None while one waits for its judgement, or before the first validation."""
        standing = moment.standing
        if standing is None or standing.best is None or standing.waiting:
            return None
        return _Cut(self, moment, standing)

    def judged(self, standing: Standing, value: float) -> tuple[Verdict, Standing]:
        """What a value of the metric means for the cut that waits, and the standing after it. NaN is worse than anything."""
        # NaN is not larger than anything, so it is never the best, and never within the drop.
        best = -math.inf if standing.best is None else standing.best * self._sign
        mine = value * self._sign
        better = replace(standing, best=self._sign * max(best, mine)) if max(best, mine) > -math.inf else standing
        if not standing.waiting:
            return "keep", better
        if mine >= best - self.drop:
            # Towards the share that it began with, where a failure had made it small.
            return "keep", replace(better, waiting=(), share=min(self.share, 1.5 * standing.share))
        if standing.heard + 1 < self.validations:
            return "wait", replace(standing, heard=standing.heard + 1)
        failed = {**standing.failed, **{name: standing.failed.get(name, 0) + 1 for name in standing.waiting}}
        until = {name: standing.cuts + self.patience * failed[name] for name in standing.waiting}
        return "undo", replace(
            standing, waiting=(), share=standing.share / 2, failed=failed, resting={**standing.resting, **until}
        )

    @property
    def _sign(self) -> int:
        return 1 if self.mode == "max" else -1


@dataclass(frozen=True)
class _Cut:
    """One cut, of the widths that are not left alone."""

    policy: Tolerance
    moment: PolicyContext
    standing: Standing

    def propose(self, measures: Mapping[str, WidthStatistics], graph: WidthGraph) -> dict[str, Proposal]:
        """What goes where it loses least, for the share of the cost that may go now."""
        awake = {
            name: measure
            for name, measure in measures.items()
            if self.standing.resting.get(name, 0) <= self.standing.cuts
        }
        now = self.moment.costs.at(self.policy.cost, {})
        target: dict[str, Any] = {self.policy.cost: now * (1 - self.standing.share)}
        budget = Budget(**target, by=0, growth=0, smallest=self.policy.smallest, trials=self.policy.trials)
        cut = budget.on_the_way(self.moment, now, 1.0)
        return {} if cut is None or not awake else cut.propose(awake, graph)
