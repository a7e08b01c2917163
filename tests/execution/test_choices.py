"""Choices of routers are repeated while most are the same, with the values that are there now."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evolvenet.execution.choices import Choices

topk = torch.ops.aten.topk.default


def rerun(first: Tensor, second: Tensor) -> tuple[list[Tensor], bool]:
    """What a second run gets from `topk` after a first one, and whether its choices count as the same."""
    choices: Any = Choices()
    choices.run(topk, (first, 1), {})
    choices.replay()
    return list(choices.run(topk, (second, 1), {})), choices.same


def test_choices_are_repeated_with_the_values_that_are_there_now() -> None:
    first = torch.eye(20)
    second = 2 * first
    second[0] = second[0].roll(3)
    (values, places), same = rerun(first, second)
    assert same
    assert places[:, 0].tolist() == list(range(20))
    assert values[:, 0].tolist() == [0.0] + 19 * [2.0]


def test_other_choices_stand_where_few_are_the_same() -> None:
    second = torch.eye(20)
    second[:3] = second[:3].roll(5, 1)
    (_, places), same = rerun(torch.eye(20), second)
    assert not same
    assert places[:3, 0].tolist() == [5, 6, 7]


@pytest.mark.parametrize("second", [torch.eye(4, 3), torch.eye(5, 4)], ids=["units", "samples"])
def test_of_other_units_or_samples_nothing_is_repeated(second: Tensor) -> None:
    (_, places), same = rerun(torch.eye(4), second)
    assert not same
    assert torch.equal(places, second.topk(1)[1])
