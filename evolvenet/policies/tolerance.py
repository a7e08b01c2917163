"""`Tolerance`: the smallest network whose validation metric stays within a tolerance of the best seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from evolvenet.errors import PolicyError
from evolvenet.policies.base import Judgement, PolicyContext, Proposal, check_fields
from evolvenet.policies.budget import Budget


class ToleranceState(TypedDict):
    """The state of a run under a `Tolerance`, plain data.

    Args:
        share: of the network's cost, removed by the next cut.
        best: best value of the metric so far, of networks that were kept; None before the first one.
        pending: widths of the cut that is not judged yet, [] if there is none.
        validations: since that cut.
        events: at which no cut was pending, so far.
        free_from: {width: the number of such events from which on it may be cut again}.
        undone: {width: how often a cut of it was undone}.
    """

    share: float
    best: float | None
    pending: list[str]
    validations: int
    events: int
    free_from: Mapping[str, int]
    undone: Mapping[str, int]


@dataclass(frozen=True)
class Tolerance:
    """Cut while the validation metric allows it; undo cuts after which it stays too low.

    Each cut removes a share of the network's cost, from the widths where that loses least. It is pending for up to
    `validations` validations: once the metric is within `drop` of the best value of any network that was kept, the cut is kept;
    otherwise weights, widths and optimizer state are restored to what they were before the cut, its widths stay for `patience`
    events, longer each time, and the next cut is half as large. Nothing is cut before the first validation.

    The best value is the largest of several, so chance raises it; with several validations chance raises a cut's values too. And
    training between a cut and its undoing is lost, so cut where the metric is near its final value: late in a run, or in the
    fine-tuning of a trained network.

    Args:
        metric: its name, as the module logs it in validation, for example "val/acc".
        drop: how far it may fall below the best (rise above it with mode="min"), in the metric's own units.
        mode: "max" if larger is better, "min" if smaller is.
        cost: what is to become small: "params", "macs" or "bytes".
        share: of the cost, removed by one cut at most, 0 … 1.
        validations: in how many of them the metric of a cut network may come back.
        patience: events for which a width stays after a cut of it was undone, times how often it was.
        smallest: fewest units that a width keeps.
        trials: take losses from trials on the network's outputs, see `Budget`.
        lowrank: ranks of layers are in question beside widths, see `Budget`.
        depth: residual blocks and their branches are removed whole, as a cut of its own, where the outputs then move by at most
            a twentieth of `share` of their variance; less after cuts were undone. The metric decides whether they stay away.

    Raises:
        PolicyError: for a value outside its range.

    >>> policy = Tolerance(metric="val/acc", drop=0.002, validations=1)
    >>> state = policy.record(policy.judge(None, 0.99).state, ["fc1"])
    >>> policy.judge(state, 0.989).verdict, policy.judge(state, 0.98).verdict
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
    lowrank: bool = False
    depth: bool = False

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

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        """The next cut, of the widths that are free to be cut; {} before the first validation."""
        state = self._state(context.state)
        free = [name for name in context.graph.sizes if state["free_from"].get(name, 0) <= state["events"]]
        if state["best"] is None or state["pending"] or not free:
            return {}
        target: dict[str, Any] = {self.cost: context.costs.at(self.cost, {}) * (1 - state["share"])}
        budget = Budget(**target, by=0, growth=0, smallest=self.smallest, trials=self.trials, lowrank=self.lowrank)
        return budget.propose(context.only(free))

    def block_loss(
        self, context: PolicyContext, path: str, saved: Callable[[str], float], accepted: Callable[[str], float]
    ) -> float:
        """See `evolvenet.policies.base.DepthPolicy`."""
        state = self._state(context.state)
        free = state["free_from"].get(path, 0) <= state["events"]
        return state["share"] / 20 if free and state["best"] is not None and not state["pending"] else -math.inf

    def renamed(self, state: ToleranceState, known: Mapping[str, str]) -> ToleranceState:
        """The state by other names of widths.

        Args:
            state: before.
            known: {new name: name before}.
        """

        def move(entries: Mapping[str, int]) -> dict[str, int]:
            others = {
                name: entry for name, entry in entries.items() if name not in known and name not in known.values()
            }
            return others | {new: entries[name] for new, name in known.items() if name in entries}

        return {**state, "free_from": move(state["free_from"]), "undone": move(state["undone"])}

    def record(self, state: ToleranceState | None, widths: Sequence[str]) -> ToleranceState:
        """The state after an event that cut these widths; none if there was nothing to cut."""
        state = self._state(state)
        return {**state, "pending": list(widths), "validations": 0, "events": state["events"] + 1}

    def judge(self, state: ToleranceState | None, value: float) -> Judgement:
        """What a value of the metric means for the pending cut. NaN is worse than any number."""
        state = self._state(state)
        # NaN is not larger than anything, so it is never the best, and never within the drop.
        best = -math.inf if state["best"] is None else state["best"] * self._sign
        now = value * self._sign
        better: ToleranceState = {**state, "best": self._sign * max(best, now)} if max(best, now) > -math.inf else state
        if not state["pending"]:
            return Judgement("keep", better)
        if now >= best - self.drop:
            # Towards the share at the beginning, where undone cuts had made it small.
            return Judgement("keep", {**better, "pending": [], "share": min(self.share, 1.5 * state["share"])})
        if state["validations"] + 1 < self.validations:
            return Judgement("wait", {**state, "validations": state["validations"] + 1})
        return Judgement("undo", self._undone(state), f"{value:.6g} after the cut, {state['best']:.6g} before")

    def _undone(self, state: ToleranceState) -> ToleranceState:
        undone = {**state["undone"], **{name: state["undone"].get(name, 0) + 1 for name in state["pending"]}}
        until = {name: state["events"] + self.patience * undone[name] for name in state["pending"]}
        free_from = {**state["free_from"], **until}
        return {**state, "pending": [], "share": state["share"] / 2, "undone": undone, "free_from": free_from}

    def _state(self, state: ToleranceState | None) -> ToleranceState:
        """The state, or that at the start of a run."""
        if state is not None:
            return state
        return {
            "share": self.share, "best": None, "pending": [], "validations": 0, "events": 0, "free_from": {}, "undone": {}
        }  # fmt: skip

    @property
    def _sign(self) -> int:
        return 1 if self.mode == "max" else -1
