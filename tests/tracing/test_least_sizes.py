"""`smallest` of a width is a size that the model's code runs with, and no larger than it has to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.execution.step import Step
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.reconciled import reconciled
from evolvenet.tracing.trace import trace
from tests.helpers.tracing import Between, Code

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def at_least(count: int) -> Code:
    """Code that raises with fewer units."""

    def code(model: Any, x: Tensor, h: Tensor) -> Tensor:
        if h.shape[1] < count:
            raise ValueError(f"expected {count} units")
        return h.relu()

    return code


CASES: dict[str, tuple[Code, int]] = {
    "nothing": (lambda m, x, h: h.relu(), 1),
    "norm": (lambda m, x, h: nn.functional.layer_norm(h, h.shape[1:]), 1),
    "squeeze": (lambda m, x, h: h.t().squeeze(0).t(), 2),
    "any squeeze": (lambda m, x, h: h[:, None].squeeze(), 2),
    "in train mode": (lambda m, x, h: h.t().squeeze(0).t() if m.training else h, 2),
    "three": (at_least(3), 3),
    "six": (at_least(6), 6),
    "all but one": (at_least(7), 7),
}


@pytest.mark.parametrize("name", CASES)
def test_a_width_keeps_the_fewest_units_that_the_code_runs_with(name: str) -> None:
    code, least = CASES[name]
    model = Between(code).double()
    width = trace(model, X).widths["a"]
    assert (width.frozen, width.smallest) == (None, least)
    fewest = evolvenet.resize(model, trace(model, X), {"a": IndexMap.keep(range(least), 8)})
    assert model.train()(X).shape == model.eval()(X).shape == (2, 3)
    assert fewest.widths["a"].smallest == least


class Blocks(nn.Module):
    """Layers in a row, of which one needs two units, and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 8)
        self.grouped, self.last = nn.Conv1d(8, 8, 1, groups=4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 5]` → `[batch, 3]`."""
        h = self.second(self.first(x).relu().t().squeeze(0).t()).relu()
        return self.last(self.grouped(self.third(h)[..., None])[..., 0])


def test_only_the_width_that_needs_two_units_keeps_two_and_groups_are_counted_as_before() -> None:
    graph = trace(Blocks().double(), X)
    found = {width.name: (width.size, width.smallest) for width in graph.resizable}
    assert found["first"] == (6, 2)
    assert found["second"] == (6, 1)
    assert {size for name, size in found.items() if name not in ("first", "second")} == {(4, 2)}


def test_all_runs_share_one_trial_where_the_model_runs_at_its_least_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from evolvenet.tracing import verification

    least: list[set[int]] = []
    original = verification._trial_failure

    def counted(*args: Any) -> str | None:
        maps = args[2]
        least.append({index_map.new_size for index_map in maps.values()})
        return original(*args)

    monkeypatch.setattr(verification, "_trial_failure", counted)
    trace(nn.Sequential(*(nn.Linear(9, 9) for _ in range(5))).double(), torch.randn(2, 9, dtype=torch.float64))
    assert sum(sizes == {1} for sizes in least) == 1
    assert least[-1] == {1}


def test_a_step_that_needs_two_units_is_reconciled_with_the_network_alone() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).double()

    def step(model: Any, x: Tensor) -> Tensor:
        return model(x).softmax(1).sum() + net[2](model[0](x).t().squeeze(0).t()).softmax(1).sum()

    alone, whole = trace(net, X), trace(net, Step(step, X))
    graph = reconciled(alone, whole)
    assert graph is not None
    assert [each.widths["0"].smallest for each in (alone, whole, graph)] == [1, 2, 2]
