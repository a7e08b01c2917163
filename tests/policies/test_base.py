"""The protocol: what a policy of one's own needs, what is refused, and what is computed when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet import Budget, Evolver, Front, PolicyError, Price, Proposal, Threshold, Tolerance, WidthEvolution
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import Judgement, PolicyContext, check_proposals, judged_metric
from evolvenet.tracing.trace import trace
from tests.helpers.runs import Batches, Classifier, fresh, trainer

GRAPH = trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(1, 4))


class OneLess:
    """Removes one unit of every width above a size; looks at nothing but sizes and counts its events."""

    def __init__(self, least: int = 8) -> None:
        self.least, self.events = least, 0

    def propose(self, context: PolicyContext) -> Mapping[str, Proposal]:
        self.events += 1
        sizes = context.graph.sizes
        return {name: Proposal(size - 1, "one less") for name, size in sizes.items() if size > self.least}


class Undone(OneLess):
    """As `OneLess`, and undoes every change after which the metric is below 0."""

    metric = "val/score"

    def record(self, state: Any, widths: Any) -> Any:
        return {"events": (state or {"events": 0})["events"] + 1, "pending": list(widths)}

    def judge(self, state: Any, value: float) -> Judgement:
        return Judgement("keep" if value >= 0 else "undo", state, f"{value} is below 0")


def evolver(policy: Any) -> Evolver:
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    made = Evolver(model, torch.optim.Adam(model.parameters()), policy, torch.zeros(1, 4))
    made.observe(torch.randn(64, 4))
    return made


def test_a_policy_of_ones_own_changes_widths_in_a_plain_loop() -> None:
    made = evolver(OneLess())
    assert [made.step().sizes["0"] for _ in range(4)] == [9, 8, 8, 8]


def test_a_policy_of_ones_own_changes_widths_in_a_lightning_run(tmp_path: Path) -> None:
    callback, model = WidthEvolution(OneLess(least=14), every_n_epochs=1, stop=1.0), fresh(width=16)
    trainer(tmp_path, [callback], max_epochs=4).fit(model, Batches())
    assert callback.history is not None
    assert set(callback.history.events[-1].sizes.values()) == {14}
    assert [part.out_features for part in model.net if isinstance(part, nn.Linear)] == [14, 14, 3]


def test_the_changes_of_a_judging_policy_are_pending_until_they_are_judged() -> None:
    policy = Undone()
    made = evolver(policy)
    assert made.step().sizes["0"] == 9
    assert made.step().sizes["0"] == 9, "pending"
    assert policy.events == 1, "propose is not called while a change is pending"
    undone = made.judge(-1.0)
    assert undone is not None
    assert undone.sizes["0"] == 10
    assert undone.changes[0].reason == "taken back: -1.0 is below 0"
    assert made.step().sizes["0"] == 9
    assert made.judge(1.0) is None
    assert made.state_dict()["pending_cut"]["state"] == {"events": 2, "pending": ["0"]}


class Scored(Classifier):
    """Its validation metric is negative in the second epoch only."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/score", -1.0 if self.current_epoch == 1 else 1.0)

    def val_dataloader(self) -> Batches:
        return Batches(1)


def test_a_judging_policy_of_ones_own_undoes_its_change_in_a_lightning_run(tmp_path: Path) -> None:
    callback = WidthEvolution(Undone(), every_n_epochs=1, stop=1.0, calibration_batches=2)
    trainer(tmp_path, [callback], max_epochs=3).fit(Scored(), Batches())
    assert callback.history is not None
    changes = [event.changes for event in callback.history.events if event.changes]
    assert [{change.after - change.before for change in each} for each in changes] == [{-1}, {1}, {-1}]


@pytest.mark.parametrize(
    "build",
    [
        lambda policy: Evolver(nn.Linear(2, 2), None, policy, torch.zeros(1, 2)),
        lambda policy: WidthEvolution(policy),
    ],
    ids=["Evolver", "WidthEvolution"],
)
@pytest.mark.parametrize(
    ("policy", "got"),
    [
        (None, "None of type NoneType"),
        (0.5, "0.5 of type float"),
        (type("Empty", (), {"propose": 3})(), "of type Empty"),
        (Threshold, "the class Threshold itself"),
    ],
    ids=["none", "number", "not callable", "class"],
)
def test_what_is_no_policy_is_refused_at_once(build: Callable[[Any], Any], policy: Any, got: str) -> None:
    with pytest.raises(PolicyError, match=rf"expected an object with a method propose\(context\), got .*{got}.*Take"):
        build(policy)


@pytest.mark.parametrize("missing", ["metric", "record"])
def test_a_policy_that_can_judge_but_lacks_a_part_is_refused(missing: str) -> None:
    parts: dict[str, Any] = {"metric": "acc", "propose": dict, "record": dict, "judge": dict}
    del parts[missing]
    with pytest.raises(PolicyError, match="Half, which has a method judge, to have metric"):
        judged_metric(type("Half", (), parts)())


def test_only_a_tolerance_judges_by_a_metric() -> None:
    budget = Budget(params=5)
    assert judged_metric(Tolerance(metric="val/acc", drop=0.1)) == "val/acc"
    for policy in (Threshold(prune=0.01, grow=0.9), budget, Price(price=1.0), Front([budget]), OneLess()):
        assert judged_metric(policy) is None


class Counted:
    """A context's measurements, and how often each was made."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def context(self, **rest: Any) -> PolicyContext:
        return PolicyContext(
            GRAPH,
            0.5,
            GRAPH.sizes,
            measure=lambda: self.made("statistics", {"0": WidthStatistics("0", 6, (1.0,) * 6, 9, True)}),
            count_costs=lambda: self.made("costs", None),
            run_trials=lambda **options: self.made(("trials", options), {}),
            run_loss_tests=lambda sizes: self.made(("loss tests", dict(sizes)), {}),
            **rest,
        )

    def made(self, what: Any, result: Any) -> Any:
        self.calls.append(what)
        return result


def test_a_context_measures_on_first_access_and_only_once() -> None:
    counted = Counted()
    context = counted.context()
    assert counted.calls == []
    for _ in range(2):
        assert set(context.statistics) == {"0"}
        assert context.costs is None
        context.trials()
        context.trials(shares=[0.5])
        context.loss_tests({"0": 8})
    assert counted.calls == [
        "statistics",
        "costs",
        ("trials", {}),
        ("trials", {"shares": (0.5,)}),
        ("loss tests", {"0": 8}),
    ]


def test_a_restricted_context_shares_what_was_computed() -> None:
    counted = Counted()
    context = counted.context()
    rest = context.only(["other"])
    context.trials()
    rest.trials()
    assert rest.statistics == {}
    assert rest.costs is context.costs
    assert set(context.statistics) == {"0"}
    assert counted.calls == [("trials", {}), "statistics", "costs"]


def test_an_event_in_which_the_policy_looks_at_nothing_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = evolver(OneLess(least=99))
    monkeypatch.setattr("evolvenet.engine.event_data.collect", lambda *_: pytest.fail("activations were collected"))
    event = made.step()
    assert event.skipped is None
    assert event.effective_rank == {}


class Residual(nn.Module):
    """A width with two names, `first` and `second`, and the frozen width of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + torch.relu(self.second(x)))


HALF = Proposal(3, "half")


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (["frist"], "got one for 'frist', which is no width"),
        (["first", "last"], r"got one for 'last', which is frozen \(.+\)"),
        (["first", "second"], "got one for 'second', another name of 'first', which has a proposal already"),
    ],
    ids=["unknown", "frozen", "twice"],
)
def test_a_proposal_that_no_width_can_take_is_refused_with_the_names_that_can(names: list[str], got: str) -> None:
    graph = trace(Residual(), torch.zeros(1, 4))
    with pytest.raises(PolicyError, match=rf"expected .* resizable width, {got}\. Take the names .*: first\."):
        check_proposals(dict.fromkeys(names, HALF), graph)


def test_a_proposal_under_another_name_of_a_width_counts_for_the_width() -> None:
    graph = trace(Residual(), torch.zeros(1, 4))
    assert check_proposals({"second": HALF}, graph) == {"first": HALF}
    assert check_proposals({}, graph) == {}
