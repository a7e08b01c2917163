"""Runs that are stopped and resumed: the evolution that they share, their random numbers, and the comparison bit for bit."""

from __future__ import annotations

import random
from typing import Any

import lightning
import torch
from torch import Tensor

from evolvenet import WidthEvolution
from tests.helpers.policies import Walk

WALK = Walk((9, 16), (9, 20), (12, 7), (6, 11))


def evolution() -> WidthEvolution:
    """An event every 5 steps, on 3 batches."""
    return WidthEvolution(WALK, every_n_steps=5, calibration_batches=3, stop=1.0)


class Randomness(lightning.Callback):
    """Saves and restores the states of torch's and Python's random generators, which Lightning leaves to its users."""

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.random.get_rng_state(), "python": random.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict

    def on_train_start(self, *args: Any, **_: Any) -> None:
        if hasattr(self, "state"):
            torch.random.set_rng_state(self.state["cpu"])
            random.setstate(self.state["python"])


def assert_same(one: Any, two: Any) -> None:
    """Both are of the same types and equal, tensors bit for bit."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    elif isinstance(one, Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two
