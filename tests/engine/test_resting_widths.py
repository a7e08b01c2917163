"""A width on which an event fails rests, with the reason, while the others change; nothing else is lost."""

# nn.Module types its children and attributes loosely, and optimizers are written here as people write them.
# pyright: reportOperatorIssue=false
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet import Budget, Evolver, Front, Price, Threshold, WidthEvolution
from evolvenet.errors import OptimizerStateError, SpectrumError, concerning, places_of
from evolvenet.growth import initializers
from evolvenet.measurement import width_statistics
from evolvenet.policies.base import Policy
from evolvenet.pruning import reconstruction, selection, trials
from evolvenet.surgery import resize_model
from evolvenet.surgery.module_handlers import attributes
from tests.helpers.policies import Fixed
from tests.helpers.runs import Batches, Classifier, trainer
from tests.helpers.states import State

BAD = 13
"""The width of this size is the bad one."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, BAD), nn.Tanh(), nn.Linear(BAD, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def fails_for(module: Any, name: str, concerns: Callable[..., bool], error: type[Exception] = ZeroDivisionError) -> Any:
    """A context in which a function of a module raises where the bad width is worked on."""

    @contextmanager
    def context(patch: pytest.MonkeyPatch) -> Iterator[None]:
        inner = getattr(module, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if concerns(*args, **kwargs):
                raise error("boom")
            return inner(*args, **kwargs)

        with patch.context() as inside:
            inside.setattr(module, name, function)
            yield

    return context


FAILURES: dict[str, Any] = {
    "measurement": fails_for(width_statistics, "unit_energies", lambda model, width, parts: width.size == BAD),
    "unit selection": fails_for(selection, "_choose_units", lambda model, graph, width, *rest: width.size == BAD),
    "reconstruction": fails_for(
        reconstruction, "refit_or_keep", lambda columns, targets, weight, *rest: weight.shape[-1] == BAD - 3
    ),
}


def statistics_of_all(model: nn.Module, policy: Policy, failure: Any, patch: pytest.MonkeyPatch) -> tuple[Evolver, Any]:
    evolver = Evolver(model, torch.optim.Adam(model.parameters()), policy, torch.zeros(1, 6))
    evolver.observe(torch.randn(512, 6, generator=torch.Generator().manual_seed(1)))
    with failure(patch):
        return evolver, evolver.step(progress=0.5)


@pytest.mark.parametrize("failure", FAILURES)
def test_the_width_rests_with_the_reason_and_the_others_change(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        policy = Fixed({"0": 18, "2": BAD - 3, "4": 11})
        evolver, event = statistics_of_all(model, policy, FAILURES[failure], monkeypatch)
    assert event.skipped is None
    assert {change.width for change in event.changes} == {"0", "4"}
    assert evolver.off is None
    assert "boom" in evolver.graph.reasons["2"]
    assert evolver.history.frozen["2"] == evolver.graph.reasons["2"]
    (warning,) = [record.message for record in caplog.records if "rest" in record.message]
    assert "2 rests for the rest of the run while other widths change" in warning
    # Without the failure, too: it rests for good, and others go on.
    evolver.policy = Fixed({"0": 12, "2": 5, "4": 8})
    evolver.observe(torch.randn(512, 6))
    event = evolver.step()
    assert event.skipped is None
    assert (model[0].out_features, model[2].out_features, model[4].out_features) == (12, BAD, 8)


@pytest.mark.parametrize(
    "policy",
    [
        Threshold(prune=0.9, grow=1.0),
        Budget(params=200),
        Budget(params=200, trials=True),
        Price(1e6),
        Front([Budget(params=200)]),
    ],
    ids=["threshold", "budget", "budget with trials", "price", "front"],
)
def test_every_policy_goes_on_without_the_width(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    evolver, event = statistics_of_all(model, policy, FAILURES["measurement"], monkeypatch)
    assert event.skipped is None
    assert event.changes
    assert model[2].out_features == BAD
    assert evolver.graph.widths["2"].frozen is not None


@pytest.mark.parametrize("policy", [Budget(params=200, trials=True), Price(1e6)], ids=["budget", "price"])
def test_a_trial_of_a_width_that_fails_lets_it_rest(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = fails_for(trials, "plan_prune", lambda model, graph, sizes, *rest: set(sizes) == {"2"})
    model = network()
    evolver, event = statistics_of_all(model, policy, failure, monkeypatch)
    assert event.skipped is None
    assert event.changes
    assert "boom" in evolver.graph.reasons["2"]
    assert model[2].out_features == BAD


def test_an_initializer_that_fails_lets_the_width_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = fails_for(initializers, "orthogonal", lambda rows, *rest: len(rows) == BAD)
    model = network()
    evolver, event = statistics_of_all(model, Fixed({"0": 30, "2": 20, "4": 20}), failure, monkeypatch)
    assert event.skipped is None
    assert (model[0].out_features, model[2].out_features, model[4].out_features) == (30, BAD, 20)
    assert "growth failed: boom" in evolver.graph.reasons["2"]


def test_a_module_that_refuses_its_new_size_lets_the_width_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(module: nn.Module, shapes: Any) -> dict[str, Any]:
        if shapes.get("weight", (0,))[0] == BAD - 3:
            raise ZeroDivisionError("boom")
        return attributes(module, shapes)

    monkeypatch.setattr(resize_model, "attributes", refuses)
    model = network()
    evolver = Evolver(model, None, Fixed({"2": BAD - 3, "4": 11}), torch.zeros(1, 6))
    evolver.observe(torch.randn(512, 6))
    event = evolver.step()
    assert event.skipped is None
    assert (model[2].out_features, model[4].out_features) == (BAD, 11)


def test_a_problem_that_may_pass_lets_the_width_rest_in_this_event_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = fails_for(
        width_statistics, "unit_energies", lambda model, width, parts: width.size == BAD, error=SpectrumError
    )
    model = network()
    evolver, event = statistics_of_all(model, Fixed({"0": 18, "2": 8}), failure, monkeypatch)
    assert {change.width for change in event.changes} == {"0"}
    assert evolver.graph.widths["2"].frozen is None
    evolver.observe(torch.randn(512, 6))
    assert {change.width for change in evolver.step().changes} == {"2"}


def test_where_all_widths_fail_or_none_is_known_the_event_is_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    every = fails_for(width_statistics, "unit_energies", lambda *rest: True)
    unknown = fails_for(width_statistics, "_statistics", lambda model, graph, name, *rest: name == "2")
    for failure in (every, unknown):
        model = network()
        before = State.of(model)
        evolver, event = statistics_of_all(model, Fixed({"0": 18}), failure, monkeypatch)
        assert "spectra failed: boom" in str(event.skipped)
        assert event.changes == ()
        assert before.differences(model) == []
        assert evolver.off is None
        assert "2" in evolver.graph.sizes
        assert "rest" not in caplog.text


def test_a_resumed_run_leaves_the_width_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    evolver, _ = statistics_of_all(model, Fixed({"0": 18, "2": 8}), FAILURES["measurement"], monkeypatch)
    resumed = Evolver(model, None, Fixed({"2": 8, "4": 10}), torch.zeros(1, 6))
    resumed.load_state_dict(evolver.state_dict())
    resumed.observe(torch.randn(512, 6))
    event = resumed.step()
    assert event.skipped is None
    assert {change.width for change in event.changes} == {"4"}
    assert "boom" in resumed.graph.reasons["2"]


def test_in_lightning_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Classifier(width=16)
    module.net[4] = nn.Linear(16, BAD)
    module.net[6] = nn.Linear(BAD, 3)
    evolution = WidthEvolution(policy=Threshold(prune=0.9, grow=1.0), every_n_epochs=1)
    with FAILURES["measurement"](monkeypatch):
        trainer(tmp_path, [evolution]).fit(module, Batches())
    assert evolution.history is not None
    assert all(event.skipped is None for event in evolution.history.events)
    assert module.net[0].out_features < 16
    assert module.net[4].out_features == BAD


def test_the_innermost_place_is_that_of_the_failure() -> None:
    with pytest.raises(OptimizerStateError) as caught, concerning("outer"), concerning(("inner.weight", 1)):
        raise OptimizerStateError("boom")
    assert places_of(caught.value) == (("inner.weight", 1),)
