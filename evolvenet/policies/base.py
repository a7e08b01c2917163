"""The protocol of policies: from the measurements of an event to new sizes, without the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.growth.loss_test import Evidence
from evolvenet.measurement.cost import Costs
from evolvenet.measurement.width_statistics import WidthStatistics

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""{width: [(size, loss)], by size}."""


@dataclass(frozen=True)
class Proposal:
    """A new size for a width, and why, for a person to read."""

    size: int
    reason: str


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may look at in one event. Everything that takes time is computed when it is first accessed, and kept.

    Args:
        graph: the widths.
        progress: share of the run that is done, 0 … 1.
        initial: {width: size} when the run began.
        state: what `JudgingPolicy.judge` and `record` returned last; None before that, and for all other policies.
        previous: the share that was done at the event before this one, 0 at the first; None where the run's length is unknown.
        measure: computes `statistics`.
        count_costs: computes `costs`.
        run_trials: computes `trials`, with `shares` as a keyword argument.
        run_loss_tests: computes `loss_tests`.
    """

    graph: WidthGraph
    progress: float
    initial: Mapping[str, int]
    state: Any = None
    previous: float | None = None
    measure: Callable[[], Mapping[str, WidthStatistics]] = dict
    count_costs: Callable[[], Costs] | None = None
    run_trials: Callable[..., Curves] = lambda **_: {}
    run_loss_tests: Callable[[Mapping[str, int]], Mapping[str, Evidence]] = lambda _: {}
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def statistics(self) -> Mapping[str, WidthStatistics]:
        """{width: its statistics}, of every resizable width that has a weight.

        Takes a forward pass on each observed batch, and the eigenvalues of one covariance a consumer.
        """
        return self.measure()

    @cached_property
    def costs(self) -> Costs:
        """The cost of the network at other sizes. Takes two forward passes without data."""
        if self.count_costs is None:
            raise PolicyError("PolicyContext: expected count_costs where a policy accesses costs, got None.")
        return self.count_costs()

    def trials(self, shares: Sequence[float] | None = None) -> Curves:
        """The error of the network's outputs when each width alone is cut and its consumers are fitted anew.

        Takes one reconstruction for each width and share.

        Args:
            shares: of a width's units that stay in a trial, 0 … 1, descending; None for those of `allocate`.

        Returns:
            {width: [(size, Σ‖y' − y‖² / Σ‖y − mean‖²)]}, by size, from 0 to the present one.
        """
        options = {} if shares is None else {"shares": tuple(shares)}
        return self._once(("trials", *options.items()), lambda: self.run_trials(**options))

    def loss_tests(self, sizes: Mapping[str, int]) -> Mapping[str, Evidence]:
        """A t-test for each width that would grow: do new units reduce the loss on samples they were not fitted on?

        Takes a backward pass and some forward passes for each width, see `evolvenet.growth.loss_test`.

        Args:
            sizes: {width: new size}, above the present ones.

        Returns:
            {width: the test's result}; {} where the gradients of the loss are not known.
        """
        return self._once(("loss_tests", *sizes.items()), lambda: self.run_loss_tests(sizes))

    def only(self, widths: Container[str]) -> PolicyContext:
        """The same context with the statistics of some widths only."""
        return replace(
            self,
            measure=lambda: {name: each for name, each in self.statistics.items() if name in widths},
            count_costs=lambda: self.costs,
            run_trials=self.trials,
            run_loss_tests=self.loss_tests,
        )

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


class DepthPolicy(Protocol):
    """What a policy has besides `propose` that removes residual blocks whole: `depth`, and `block_loss`.

    At an event those blocks and branches are removed, the outermost first, without which the outputs have moved by no more than
    `block_loss` says, each by itself and all of the event together.
    """

    @property
    def depth(self) -> bool:
        """Whether blocks are removed at all."""
        ...

    def block_loss(
        self, context: PolicyContext, path: str, saved: Callable[[str], float], accepted: Callable[[str], float]
    ) -> float:
        """The largest Σ‖y' − y‖² / Σ‖y − mean‖² of the network's outputs that may be lost; −∞ where the block stays.

        Called twice for a block: for what it alone loses and saves, and for all of the event together with it.

        Args:
            context: of the event; its costs are those before any removal.
            path: of the block.
            saved: kind of cost ("params", "macs", "bytes", "latency") → what the network costs less without what is in
                question, the block alone or all of the event.
            accepted: kind of cost → what it costs less without the blocks that the event has given up before; 0 where all
                of the event is in question.
        """
        ...


class Policy(Protocol):
    """Anything with a method `propose`: from the context of an event to the sizes that change.

    It should depend on its context alone: then a resumed run is the uninterrupted one, and all ranks agree.

    A policy with an aim may have two methods more, each of which returns a warning or None: `unreachable(context)`, called
    when a run starts, and `missed(context)`, called at its end. `context` is of that moment, without measurements.

    >>> import torch
    >>> from evolvenet import Evolver, Proposal
    >>> class Halve:
    ...     '''Halve every width of which half the directions carry 99 % of the energy.'''
    ...
    ...     def propose(self, context):
    ...         found = {}
    ...         for name, width in context.statistics.items():
    ...             energy, half = [value**2 for value in width.spectrum], width.size // 2
    ...             if half and sum(energy[:half]) >= 0.99 * sum(energy):
    ...                 found[name] = Proposal(half, f"{half} of {width.size} directions carry 99 % of the energy")
    ...         return found
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 2))
    >>> evolver = Evolver(model, None, Halve(), torch.zeros(1, 4))
    >>> evolver.observe(torch.randn(256, 4))
    >>> evolver.step().sizes
    {'0': 32}
    """

    def propose(self, context: PolicyContext) -> Mapping[str, Proposal]:
        """New sizes for the widths that change; the others are left out."""
        ...


Verdict = Literal["keep", "wait", "undo"]


@dataclass(frozen=True)
class Judgement:
    """What a value of the metric means for the pending cut.

    Args:
        verdict: "keep" and "undo" end the cut's being pending, "wait" leaves it pending until the next validation.
        state: the policy's state from now on, plain data (dicts, lists, tuples, numbers, strings): it goes into checkpoints.
        reason: for a person to read, where a cut is undone.
    """

    verdict: Verdict
    state: Any
    reason: str = ""


class JudgingPolicy(Policy, Protocol):
    """A policy with a `metric` as well: its changes are pending until `judge` keeps or undoes them after a validation.

    While a change is pending, `propose` is not called. State is plain data, None at first, and never changed in place.

    >>> from evolvenet import Evolver, Threshold
    >>> class Cautious:
    ...     '''Threshold, but every change after which the accuracy is below 0.9 is undone.'''
    ...
    ...     metric = "val/acc"
    ...
    ...     def propose(self, context):
    ...         return Threshold(prune=0.01, grow=0.9).propose(context)
    ...
    ...     def record(self, state, widths):
    ...         return state
    ...
    ...     def judge(self, state, value):
    ...         return Judgement("keep" if value >= 0.9 else "undo", state, f"{value} is below 0.9")
    >>> judged_metric(Cautious())
    'val/acc'
    """

    @property
    def metric(self) -> str:
        """The metric's name, as the module logs it in validation."""
        ...

    def record(self, state: Any, widths: Sequence[str]) -> Any:
        """The state after an event that changed these widths, () if `propose` found nothing to change."""
        ...

    def judge(self, state: Any, value: float) -> Judgement:
        """What a value of the metric means for the pending cut, if there is one, and the state afterwards."""
        ...


def judged_metric(policy: object) -> str | None:
    """The metric by which a policy judges its changes (see `JudgingPolicy`); None for a policy that does not.

    Raises:
        PolicyError: for what is no policy.

    >>> from evolvenet import Threshold, Tolerance
    >>> judged_metric(Threshold(prune=0.01, grow=0.9)), judged_metric(Tolerance(metric="val/acc", drop=0.002))
    (None, 'val/acc')
    """
    kind = policy.__name__ if isinstance(policy, type) else type(policy).__name__
    if isinstance(policy, type) or not callable(getattr(policy, "propose", None)):
        got = f"the class {kind} itself" if isinstance(policy, type) else f"{policy!r} of type {kind}"
        raise PolicyError(
            f"Policy: expected an object with a method propose(context), got {got}. "
            "Take for example policy=Threshold(prune=0.01, grow=0.9)."
        )
    if not callable(getattr(policy, "judge", None)):
        return None
    metric = getattr(policy, "metric", None)
    if not isinstance(metric, str) or not callable(getattr(policy, "record", None)):
        raise PolicyError(
            f"Policy: expected {kind}, which has a method judge, to have metric: str and record(state, widths) as well, got "
            f"metric={metric!r}. See evolvenet.policies.base.JudgingPolicy."
        )
    return metric


NEGLIGIBLE = 1e-3
"""Loss of blocks, as a share of the outputs' variance, that a policy without a measure of its own for it removes at an event."""

RESTS = "rests "
"""How the reason of a width begins that is frozen since an event has failed on it: proposals for it are passed over."""


def check_proposals(proposals: Mapping[str, Proposal], graph: WidthGraph) -> dict[str, Proposal]:
    """The proposals by the widths' own names, after refusing those for a width that is unknown or frozen.

    Args:
        proposals: what `Policy.propose` returned; a width may go by any name that `graph.widths` accepts.
        graph: the widths.

    Raises:
        PolicyError: for the first unknown or frozen width, and for a width that was named twice.

    >>> import torch
    >>> from evolvenet import trace
    >>> graph = trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.zeros(1, 4))
    >>> check_proposals({"0": Proposal(4, "half")}, graph)
    {'0': Proposal(size=4, reason='half')}
    """
    found: dict[str, Proposal] = {}
    for name, proposal in proposals.items():
        width = graph.widths[name] if name in graph.widths else None  # noqa: SIM401  what raises in get is no KeyError
        if width is None:
            problem = "which is no width"
        elif width.frozen is not None and width.frozen.startswith(RESTS):
            continue
        elif width.frozen is not None:
            problem = f"which is frozen ({width.frozen})"
        elif width.name in found:
            problem = f"another name of {width.name!r}, which has a proposal already"
        else:
            found[width.name] = proposal
            continue
        raise PolicyError(
            f"Policy: expected at most one proposal for each resizable width, got one for {name!r}, {problem}. "
            f"Take the names from context.graph.sizes: {', '.join(graph.sizes) or 'none'}."
        )
    return found


def rounded(proposals: Mapping[str, Proposal], graph: WidthGraph) -> dict[str, Proposal]:
    """The proposals in sizes that their widths may have; those whose rounded size is the present one are left out.

    Args:
        proposals: by the widths' own names.
        graph: the widths, see `Width.rounded`.
    """
    found: dict[str, Proposal] = {}
    for name, proposal in proposals.items():
        width = graph.widths[name]
        size = width.rounded(proposal.size) if proposal.size != width.size else width.size
        if size == proposal.size:
            found[name] = proposal
        elif size != width.size:
            step = width.step_to(proposal.size)
            found[name] = Proposal(size, f"{proposal.reason}; {proposal.size} rounded up to a multiple of {step}")
    return found


def fewest_units(width: Width, smallest: int, step: int) -> int:
    """The smallest size that a width may have at the end of a run.

    Args:
        width: as it is now.
        smallest: fewest units that a policy leaves, where there are as many.
        step: sizes are multiples of it, where there are as many units.

    >>> fewest_units(Width("0", 64), 2, 1), fewest_units(Width("0", 64), 2, 8), fewest_units(Width("0", 6), 2, 8)
    (2, 8, 6)
    """
    if width.size < step:
        return width.size
    return -(-max(1, width.smallest, min(smallest, width.size)) // step) * step


def lowest(size: int, share: float, step: int = 1) -> int:
    """The smallest size after a cut of at most a share of a width's units, or of one step where that is longer.

    Args:
        size: of the width now.
        share: of its units, 0 … 1; 0 for no cut at all.
        step: sizes are multiples of it.

    >>> lowest(64, 0.5), lowest(64, 0.1, step=16), lowest(60, 0.01, step=16), lowest(64, 0.0, step=16)
    (32, 48, 48, 64)
    """
    least = size - math.floor(share * size)
    return min(least, (size - 1) // step * step) if share and step > 1 else least


def enlarged(statistics: WidthStatistics, growth: float) -> int:
    """The size of a width after it grew by a share of itself, rounded up.

    >>> enlarged(WidthStatistics("0", 8, spectrum=(1.0,) * 8, events_since_change=9, growable=True), 0.3)
    11
    """
    return statistics.size + math.ceil(growth * statistics.size)


def check_fields(policy: object, shares: Iterable[str], least: Mapping[str, float]) -> None:
    """Refuse a policy with shares outside of 0 … 1, or numbers below the least that they may be.

    Raises:
        PolicyError: for the first such field.
    """
    for name, low, high in (
        *((name, 0, 1) for name in shares),
        *((name, low, math.inf) for name, low in least.items()),
    ):
        check_number(type(policy).__name__, name, getattr(policy, name), low, high)


def check_number(policy: str, name: str, value: object, low: float, high: float) -> None:
    """Refuse what is not a number in `low … high`; NaN is in no range.

    Raises:
        PolicyError: with the names of the policy and of the argument.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        expected = f"a number in {low} … {high}" if high < math.inf else f"a number of {low} or more"
        raise PolicyError(f"{policy}: expected {name} to be {expected}, got {value!r}.")
