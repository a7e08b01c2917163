"""Ctrl-C at any moment of a change: it is raised once, and the model is as before the change or as after it, never between.

Two runs go through the same changes, one of them is interrupted in each: both stay the same to the last bit.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet import Evolver
from evolvenet.policies.base import Judgement
from tests.helpers.interrupts import at_call
from tests.helpers.policies import Walk
from tests.helpers.resuming import assert_same
from tests.helpers.states import State


@pytest.fixture(autouse=True)
def _interrupts_raise() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Judged(Walk):
    """Every change is judged, and undone if the value is positive."""

    metric = "loss"

    def record(self, state: Any, widths: Sequence[str]) -> Any:
        return (state or 0) + 1

    def judge(self, state: Any, value: float) -> Judgement:
        return Judgement("undo" if value > 0 else "keep", state, "as the test has it")


class Run:
    """A small network in a plain loop, with momenta and a moving average of its weights."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(
            nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 2)
        )
        self.average = deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, foreach=False)
        self.renewed = 0
        self.evolver = Evolver(
            self.model, self.optimizer, Judged((9, 6), (12, 4), (7, 8)), torch.zeros(2, 4), calibration_batches=2,
            copies=[self.average], after_change=self._renew,
        )  # fmt: skip

    def _renew(self) -> None:
        self.renewed += 1

    def train(self, seed: int) -> None:
        for k in range(2):
            batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(100 * seed + k))
            self.evolver.observe(batch)
            self.optimizer.zero_grad()
            self.model(batch).square().mean().backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Everything that the run goes on from; of the events the last two."""
        evolver = self.evolver.state_dict()
        evolver["history"]["events"] = [
            {**event, "seconds": 0, "stages": 0} for event in evolver["history"]["events"][-2:]
        ]
        found = {
            "evolver": evolver,
            "model": dict(self.model.state_dict()),
            "average": dict(self.average.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "gradients": [parameter.grad for parameter in self.model.parameters()],
            "sizes": [layer.out_features for layer in self.model if isinstance(layer, nn.Linear)],
            "renewed": self.renewed,
            "macs": self.evolver.history.latest.macs,
        }
        return deepcopy(found)


def is_same(one: Any, two: Any) -> bool:
    try:
        assert_same(one, two)
    except AssertionError:
        return False
    return True


class Interrupter:
    """Interrupts functions at random moments.

    Args:
        seed: of the moments.
    """

    def __init__(self, seed: int) -> None:
        self.moments = random.Random(seed)
        self.sent = self.raised = 0

    def during(self, function: Callable[[], Any], total: int) -> None:
        """Interrupt a function at one of so many calls and returns."""

        def send() -> None:
            self.sent += 1
            signal.raise_signal(signal.SIGINT)

        try:
            at_call(self.moments.randint(1, total), function, send)
        except KeyboardInterrupt:
            self.raised += 1


def calls_in(function: Callable[[], Any]) -> int:
    return at_call(0, function, lambda: None)


@pytest.mark.parametrize(
    ("rounds", "moments"), [(12, 1), *(pytest.param(50, 10 + k, marks=pytest.mark.long) for k in range(6))]
)
def test_events_and_undos_that_are_interrupted_are_whole(rounds: int, moments: int) -> None:
    """With the long ones, and those below, 1,000 interrupts."""
    interrupter, total, after = Interrupter(moments), dict[str, int](), 0
    one, other = Run(), Run()
    for seed in range(rounds):
        one.train(seed)
        other.train(seed)
        acts: dict[str, Callable[[Run], Any]] = {
            "event": lambda run: run.evolver.step(),
            "judgement": lambda run, value=float(seed % 3): run.evolver.judge(value),
        }
        for name, act in acts.items():
            before = one.state()
            act(other) if name in total else total.setdefault(name, calls_in(partial(act, other)))
            interrupter.during(partial(act, one), total[name])
            if is_same(one.state(), before):
                act(one)
            else:
                after += 1
            assert_same(one.state(), other.state())
    assert one.evolver.history.sizes(one.evolver.graph) == other.evolver.history.sizes(other.evolver.graph)
    assert interrupter.raised == interrupter.sent > 1.5 * rounds
    assert after > 1.5 * rounds
    assert {event.skipped for event in one.evolver.history.events} == {None}


@pytest.mark.parametrize("times", [6, pytest.param(240, marks=pytest.mark.long)])
def test_a_trace_that_is_interrupted_leaves_the_model_as_it_was(times: int) -> None:
    interrupter, run = Interrupter(2), Run()
    run.train(0)
    trace = partial(evolvenet.trace, run.model, torch.zeros(2, 4))
    before, total = State.of(run.model, [run.optimizer]), calls_in(trace)
    for _ in range(times):
        interrupter.during(trace, total)
        assert before.differences(run.model, [run.optimizer]) == []
    assert interrupter.raised == interrupter.sent == times


ONE_SHOT: dict[str, Callable[[nn.Module, torch.optim.Optimizer, Path], Any]] = {
    "load": lambda model, optimizer, path: evolvenet.load(model, path),
    "prune": lambda model, optimizer, path: evolvenet.prune(
        model, evolvenet.trace(model, torch.zeros(2, 4)), {"0": 5}, [torch.ones(8, 4)], optimizer
    ),
    "compress": lambda model, optimizer, path: evolvenet.compress(
        model, torch.zeros(2, 4), list(torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))),
        parameters=110, optimizers=optimizer,
    ),
    "factorize": lambda model, optimizer, path: evolvenet.factorize(model, {"3": 2}, optimizers=optimizer),
    "remove_blocks": lambda model, optimizer, path: evolvenet.remove_blocks(
        model, torch.ones(2, 4), share=1.0, optimizers=optimizer
    ),
}  # fmt: skip


OFTEN = {"load": 50, "prune": 40, "compress": 10, "factorize": 30, "remove_blocks": 30}
"""Interrupts of each in the long tests."""


@pytest.mark.parametrize(
    ("name", "times"),
    [(name, 1) for name in ONE_SHOT]
    + [pytest.param(name, times, marks=pytest.mark.long) for name, times in OFTEN.items()],
)
def test_what_is_done_once_is_done_or_not_done(name: str, times: int, tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        run = Run()
        run.train(0)
        return run.model, run.optimizer

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return deepcopy([dict(model.state_dict()), optimizer.state_dict(), str(model)])

    interrupter, change = Interrupter(3), ONE_SHOT[name]
    small, _ = fresh()
    evolvenet.prune(small, evolvenet.trace(small, torch.zeros(2, 4)), {"0": 6})
    evolvenet.save(small, tmp_path / "small.pt")

    def changed_once() -> tuple[Any, int, Any]:
        model, optimizer = fresh()
        before = state(model, optimizer)
        total = calls_in(partial(change, model, optimizer, tmp_path / "small.pt"))
        return before, total, state(model, optimizer)

    changed_once()  # the first time more is called, since nothing is cached
    before, total, after = changed_once()
    if name != "remove_blocks":
        assert not is_same(before, after)
    for _ in range(times):
        model, optimizer = fresh()
        assert is_same(state(model, optimizer), before)
        interrupter.during(partial(change, model, optimizer, tmp_path / "small.pt"), total)
        assert is_same(now := state(model, optimizer), before) or is_same(now, after)
    assert interrupter.raised == interrupter.sent == times
