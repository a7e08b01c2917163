"""Damaged or edited checkpoints: a clear error and everything as it was, or a load of exactly what the file holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet import EvolveNetError, Evolver
from evolvenet.policies.base import Judgement
from tests.helpers.corruption import damaged, edited
from tests.helpers.policies import ShrinkThenGrow
from tests.helpers.resuming import assert_same
from tests.helpers.states import State


class Net(nn.Module):
    """Two layers with a norm, a number of its own and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.c, self.heads = nn.Linear(16, 2), 4
        self.register_buffer("mask", torch.ones(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Two outputs."""
        hidden = self.norm(self.a(x)).relu() * self.mask
        return self.c(self.b(hidden).unflatten(1, (self.heads, -1)).flatten(1))


class Judged(ShrinkThenGrow):
    """Every change is undone when it is judged."""

    metric = "loss"

    def record(self, state: Any, widths: Sequence[str]) -> Any:
        return [*(state or ()), *widths]

    def judge(self, state: Any, value: float) -> Judgement:
        return Judgement("undo", [], f"{len(state)} widths")


class Run:
    """In the middle of a run: batches and their gradients are kept, widths have changed."""

    def __init__(self, policy: Any = ShrinkThenGrow) -> None:
        torch.manual_seed(1)
        self.model = Net()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.evolver = Evolver(self.model, self.optimizer, policy(), torch.zeros(2, 6), calibration_batches=2)
        for _ in range(3):
            self.train()
            self.evolver.step()
        self.train()

    def train(self) -> None:
        for _ in range(2):
            batch = torch.randn(8, 6)
            output = self.model(batch)
            output.retain_grad()
            self.optimizer.zero_grad()
            output.square().sum().backward()
            self.evolver.observe(batch, [output.grad])
            self.optimizer.step()


def refused(act: Callable[[], Any], where: str) -> bool:
    """Whether an action raises one of EvolveNet's errors, with a message; no other one is raised."""
    try:
        act()
    except EvolveNetError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    else:
        return False
    assert len(message) > 40, where
    return True


def is_loaded(model: nn.Module, path: Path) -> bool:
    """Whether every tensor of a model has the shape and the values that a file has for it."""
    found = torch.load(path, weights_only=True)
    own = model.state_dict()
    return all(
        tuple(found[name].shape) == tuple(tensor.shape)
        and torch.equal(found[name].to_dense().to(tensor.dtype).nan_to_num(), tensor.nan_to_num())
        for name, tensor in own.items()
        if name in found
    )


LOADS = [pytest.param(range(15), id="few"), *(
    pytest.param(range(first, first + 45), id=f"from {first}", marks=pytest.mark.long) for first in range(15, 150, 45)
)]  # fmt: skip


@pytest.mark.parametrize("seeds", LOADS)
def test_a_damaged_file_is_refused_or_loaded_as_it_is(seeds: range, tmp_path: Path) -> None:
    run = Run()
    whole = tmp_path / "whole.pt"
    evolvenet.save(run.model, whole)
    results = [0, 0]
    for seed in seeds:
        moments, path, model = random.Random(seed), tmp_path / f"{seed}.pt", Net()
        if seed % 2:
            where = "the file's bytes"
            path.write_bytes(damaged(whole.read_bytes(), moments))
        else:
            state, where = edited(torch.load(whole, weights_only=True), moments)
            torch.save(state, path)
        before = State.of(model)
        no = refused(lambda: evolvenet.load(model, path), f"{seed}: {where}")  # noqa: B023
        results[no] += 1
        if no:
            assert before.differences(model) == [], f"{seed}: {where}"
        else:
            assert is_loaded(model, path), f"{seed}: {where}"
            model.eval()(torch.zeros(2, 6))
    assert min(results) > 0, results


def values(evolver: Evolver) -> dict[str, Any]:
    return deepcopy(evolver.state_dict())


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("seeds", LOADS)
def test_a_damaged_state_of_an_evolver_is_refused_or_taken_up(seeds: range) -> None:
    runs = [Run(), Run(Judged)]
    good = [each.evolver.state_dict() for each in runs]
    results = [0, 0]
    for seed in seeds:
        state, where = edited(good[seed % 2], random.Random(1000 + seed))
        run = deepcopy(runs[seed % 2])
        before, known = State.of(run.model, [run.optimizer]), values(run.evolver)
        no = refused(lambda: run.evolver.load_state_dict(state), f"{seed}: {where}")  # noqa: B023
        results[no] += 1
        assert before.differences(run.model, [run.optimizer]) == [], f"{seed}: {where}"
        if no:
            assert_same(values(run.evolver), known)
        else:
            # Whatever was taken up: events are skipped or done, and training goes on.
            run.evolver.judge(1.0)
            run.evolver.step()
            run.train()
    assert min(results) > 0, results
