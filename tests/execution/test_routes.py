"""`runs_until_every_route` runs a model until every order of calls has occurred, and once where there can be one alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evolvenet.execution.routes import TRIES, runs_until_every_route


class Branching(nn.Module):
    """Calls the second layer where a function of the model says so, and counts its runs outside of it."""

    def __init__(self, second: Callable[[Branching], bool]) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.calls, self.seen = 0, [0]
        self.second, self.outside = second, SimpleNamespace(runs=0)

    def forward(self, x: Tensor) -> Tensor:
        self.outside.runs += 1
        x = self.norm(self.one(x))
        return self.two(x) if self.second(self) else x


def every_third_call(model: Branching) -> bool:
    model.calls += 1
    return model.calls % 3 == 0


def every_third_entry(model: Branching) -> bool:
    model.seen.append(1)
    return len(model.seen) % 4 == 0


def every_third_count(model: Branching) -> bool:
    assert isinstance(model.count, Tensor)
    model.count += 1
    return int(model.count) % 3 == 0


def chance(draw: Callable[[], float]) -> Callable[[Branching], bool]:
    return lambda model: draw() > 0.5


@pytest.mark.parametrize("second", [lambda model: False, lambda model: True])
def test_code_without_chance_runs_once(second: Callable[[Branching], bool]) -> None:
    model = Branching(second)
    assert runs_until_every_route(model, torch.randn(3, 2)) == 1
    assert model.outside.runs == 1


@pytest.mark.parametrize("second", [every_third_call, every_third_entry, every_third_count])
def test_a_branch_by_the_number_of_the_run_is_found(second: Callable[[Branching], bool]) -> None:
    model = Branching(second)
    assert runs_until_every_route(model, torch.randn(3, 2)) == 3
    assert model.outside.runs == TRIES


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_a_branch_by_chance_is_found_whoever_draws(draw: Callable[[], float]) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = Branching(chance(draw))
    assert runs_until_every_route(model, torch.randn(3, 2)) > 1
    assert model.outside.runs == TRIES
