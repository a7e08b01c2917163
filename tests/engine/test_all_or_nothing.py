"""An event that fails anywhere leaves everything as it was, and training goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet import Evolver
from evolvenet.errors import SpectrumError
from tests.helpers.cases import CASES
from tests.helpers.policies import Fixed
from tests.helpers.states import State

BY_NAME = {case.name: case for case in CASES}


class Run:
    """A network in the middle of a run, with momenta, gradients and a moving average of its weights."""

    def __init__(self, name: str = "resnet") -> None:
        self.case = BY_NAME[name]
        self.model = self.case.model().train()
        self.average = deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.rebuilt = 0
        graph_sizes = Evolver(self.model, None, Fixed({}), self.case.inputs()).graph.sizes
        sizes = {name: size + 2 if k % 2 else size - 1 for k, (name, size) in enumerate(graph_sizes.items())}
        self.policy = Fixed(sizes)
        self.evolver = Evolver(
            self.model,
            self.optimizer,
            self.policy,
            self.case.inputs(),
            copies=[self.average],
            after_change=self.rebuild,
        )
        for seed in range(3):
            self.train(seed)

    def rebuild(self) -> None:
        self.rebuilt += 1

    def train(self, seed: int) -> None:
        inputs = torch.cat([self.case.inputs(8 * seed + k) for k in range(8)])
        self.evolver.observe(inputs)
        self.optimizer.zero_grad()
        self.model(inputs).square().mean().backward()
        self.optimizer.step()
        assert all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def states(self) -> tuple[State, State]:
        return State.of(self.model, [self.optimizer]), State.of(self.average)


class Fails:
    """A function that raises at its n-th call and otherwise does what it did."""

    def __init__(self, function: Callable[..., Any], at: int = 1, error: Exception | None = None) -> None:
        self.function, self.at, self.calls = function, at, 0
        self.error = error or ZeroDivisionError("boom")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*args, **kwargs)


def inject(monkeypatch: pytest.MonkeyPatch, where: str, at: int = 1, error: Exception | None = None) -> Fails:
    module, name = where.split(":")
    fails = Fails(getattr(sys.modules[module], name), at, error)
    monkeypatch.setattr(sys.modules[module], name, fails)
    return fails


STAGES = {
    "evolvenet.engine.evolver:collect": "statistics",
    "evolvenet.engine.evolver:measures_of": "spectra",
    "evolvenet.engine.evolver:plan_prune": "choosing units",
    "evolvenet.engine.evolver:reconstruct": "compensation",
    "evolvenet.engine.evolver:plan_replica_update": "weight averages",
    "evolvenet.engine.functional:compile_state": "surgery",
    "evolvenet.surgery.resize_model:_gradient": "surgery|compensation",
    "evolvenet.surgery.resize_model:refresh": "surgery|compensation",
    "evolvenet.engine.functional:apply_state": "surgery",
    "evolvenet.surgery.optimizer_state:_assign": "surgery",
    "evolvenet.engine.functional:validate_state": "surgery",
    "evolvenet.engine.evolver:plan_growth": "growth",
    "evolvenet.engine.evolver:validate": "validation",
    "evolvenet.engine.evolver:macs": "counting costs",
}


def assert_nothing_happened(run: Run, before: tuple[State, State], graph: object, caplog: Any, stage: str) -> None:
    assert before[0].differences(run.model, [run.optimizer]) == []
    assert before[1].differences(run.average) == []
    assert run.evolver.graph is graph
    event = run.evolver.history.events[-1]
    assert event.changes == ()
    assert event.skipped in {f"{each} failed: boom" for each in stage.split("|")}
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert f"widths are left as they are: {event.skipped}" in warnings[0].message


@pytest.mark.parametrize("where", STAGES)
def test_a_failure_anywhere_leaves_all_as_it_was(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    before, graph = run.states(), run.evolver.graph
    fails = inject(monkeypatch, where)
    run.evolver.step()
    assert fails.calls
    assert_nothing_happened(run, before, graph, caplog, STAGES[where])
    run.train(7)
    assert len(run.evolver.step().changes) == len(run.policy.sizes)
    run.train(8)


def calls_of_a_good_event(monkeypatch: pytest.MonkeyPatch, where: str) -> int:
    with monkeypatch.context() as context:
        counter = inject(context, where, at=0)
        run = Run("mlp")
        counter.calls = 0
        assert run.evolver.step().skipped is None
        return counter.calls


@pytest.mark.parametrize(
    "where", ["evolvenet.surgery.resize_model:exchange", "evolvenet.surgery.optimizer_state:_carried"]
)
def test_a_failure_at_any_tensor_leaves_all_as_it_was(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    total = calls_of_a_good_event(monkeypatch, where)
    assert total >= 16
    run = Run("mlp")
    before, graph = run.states(), run.evolver.graph
    for at in range(1, total + 1):
        caplog.clear()
        run.evolver._failures.counts.clear()
        with monkeypatch.context() as context:
            inject(context, where, at)
            run.evolver.step()
        assert_nothing_happened(run, before, graph, caplog, "surgery|compensation|weight averages")


def test_a_policy_or_what_follows_a_change_may_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    before, graph = run.states(), run.evolver.graph
    monkeypatch.setattr(run.policy, "propose", Fails(run.policy.propose))
    run.evolver.step()
    assert_nothing_happened(run, before, graph, caplog, "policy")
    caplog.clear()
    run.evolver.after_change = Fails(run.rebuild)
    run.evolver.step()
    assert_nothing_happened(run, before, graph, caplog, "what follows a change")
    assert run.rebuilt == 1, "what wraps the model is made anew for the shapes that are back"


def test_a_wrong_result_is_found_and_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each thing that `validate` looks at, spoiled after a surgery that itself went well."""

    def another_object(run: Run) -> None:
        owner = run.model.get_submodule("stem")
        owner.weight = nn.Parameter(owner.weight.detach().clone())  # type: ignore[assignment]

    def number(run: Run) -> None:
        run.model.get_submodule("stem").out_channels += 1  # type: ignore[operator]

    def state(run: Run) -> None:
        weight = run.model.get_parameter("stem.weight")
        run.optimizer.state[weight]["exp_avg"] = torch.zeros(3)

    def shape(run: Run) -> None:
        norm = run.model.get_submodule("blocks.0.norm1")
        norm.running_mean = norm.running_mean[:-1]  # type: ignore[index,assignment]

    def nan(run: Run) -> None:
        run.model.get_parameter("head.bias").data[0] = float("nan")

    expected = {
        another_object: "the object that it was",
        number: "out_channels of Conv2d",
        state: "'exp_avg' to fit",
        shape: "running_mean of shape",
        nan: "finite outputs",
    }
    module = sys.modules["evolvenet.engine.evolver"]
    honest = module.apply  # type: ignore[attr-defined]
    for spoil, message in expected.items():
        run = Run()
        graph = run.evolver.graph

        def spoiled(model: nn.Module, *args: Any, run: Run = run, spoil: Any = spoil) -> None:
            honest(model, *args)
            last = any(index_map.new_units for index_map in args[0].maps.values())
            if model is run.model and last:
                spoil(run)

        with monkeypatch.context() as context:
            context.setattr(module, "apply", spoiled)
            event = run.evolver.step()
        assert event.changes == ()
        assert event.skipped is not None
        assert message in event.skipped, spoil.__name__
        assert run.evolver.graph is graph


def test_the_same_stage_failing_twice_switches_evolution_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    before = run.states()
    monkeypatch.setattr(sys.modules["evolvenet.engine.evolver"], "reconstruct", Fails(lambda *args: 1 / 0, at=0))
    for _ in range(5):
        run.evolver.step()
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "compensation failed: division by zero. It was not the first time" in caplog.text
    assert run.evolver.off is not None
    assert len(run.evolver.history.events) == 2
    assert before[0].differences(run.model, [run.optimizer]) == []
    run.train(9)


def test_two_stages_failing_once_each_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    inject(monkeypatch, "evolvenet.engine.evolver:collect")
    inject(monkeypatch, "evolvenet.engine.evolver:reconstruct")
    run.evolver.step()
    run.evolver.step()
    assert run.evolver.off is None
    assert run.evolver.step().changes


def test_what_is_wrong_with_the_data_of_the_moment_never_switches_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    monkeypatch.setattr(
        sys.modules["evolvenet.engine.evolver"], "collect", Fails(lambda *args: None, error=SpectrumError("NaN"))
    )
    event = run.evolver.step()
    assert event.skipped == "NaN"
    run.model.get_parameter("stem.weight").data[0] = float("nan")
    for _ in range(4):
        assert "Expected finite weights" in (run.evolver.step().skipped or "")
    assert run.evolver.off is None


def test_an_interrupt_is_passed_on_and_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    before = run.states()
    inject(monkeypatch, "evolvenet.surgery.resize_model:exchange", at=9, error=KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run.evolver.step()
    assert before[0].differences(run.model, [run.optimizer]) == []
    assert before[1].differences(run.average) == []


def test_a_wrong_policy_is_named() -> None:
    run = Run()
    run.policy.sizes = {"nowhere": 4}
    run.policy.propose = lambda measures, graph: {"nowhere": None}  # type: ignore[method-assign,assignment,return-value]
    event = run.evolver.step()
    assert (event.skipped or "").startswith("policy failed")


def test_copies_keep_their_function_as_the_model_does() -> None:
    """A cut average is fitted to its own answers; a copy that is the model to the last bit ends up as the model does."""
    run = Run()
    replica = deepcopy(run.model)
    run.evolver.copies = [run.average, replica]
    run.evolver.step()
    ours, theirs = run.model.state_dict(), replica.state_dict()
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [p.shape for p in run.average.parameters()] == [p.shape for p in run.model.parameters()]


def test_an_unlike_copy_skips_the_event() -> None:
    run = Run()
    run.evolver.copies = [nn.Linear(2, 2)]
    before = run.states()
    assert "weight averages failed" in (run.evolver.step().skipped or "")
    assert before[0].differences(run.model, [run.optimizer]) == []
