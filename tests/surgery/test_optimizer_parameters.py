"""Replaced parameters keep their place in every optimizer, and start as if it had just been built."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import evolvenet
from evolvenet.lowrank.layers import FactoredLayer
from tests.helpers.optimizer_cases import OPTIMIZERS
from tests.helpers.states import same_bits

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 4, bias=False))


def step(model: nn.Module, optimizer: Optimizer) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sparse adam"])
def test_factors_start_like_new_parameters_and_the_others_keep_their_state(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    for _ in range(5):
        step(model, optimizer)
    kept = copy.deepcopy(optimizer.state.get(model[2].weight, {}))
    evolvenet.factorize(model, {"0": 3}, optimizers=optimizer)
    state = optimizer.state.get(model[2].weight, {})
    assert set(state) == set(kept)
    assert all(not isinstance(entry, torch.Tensor) or same_bits(entry, kept[key]) for key, entry in state.items())
    assert set(optimizer.state) <= set(model.parameters())
    fresh = copy.deepcopy(model)
    anew = OPTIMIZERS[name](fresh.parameters(), lr=0.01)
    step(fresh, anew)
    step(model, optimizer)
    for one, two in zip(model[0].parameters(), fresh[0].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    evolvenet.merge(model, optimizers=optimizer)
    for _ in range(3):
        step(model, optimizer)


def test_lbfgs_forgets_its_history_and_goes_on() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    step(model, optimizer)
    evolvenet.factorize(model, {"2": 2}, optimizers=optimizer)
    before = float(model(X).square().mean().detach())
    step(model, optimizer)
    assert float(model(X).square().mean().detach()) < before
    evolvenet.merge(model, optimizers=optimizer)
    step(model, optimizer)


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam])
def test_groups_keep_their_options_order_and_names(build: Callable[..., Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    groups = [
        {"params": [("0.weight", model[0].weight), ("2.weight", model[2].weight)], "lr": 0.5, "weight_decay": 0.1},
        {"params": [("0.bias", model[0].bias), ("2.bias", model[2].bias)], "lr": 0.25},
    ]
    optimizer = build(groups, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    lists = [group["params"] for group in optimizer.param_groups]
    evolvenet.factorize(model, {"0": 2}, optimizers=[optimizer])
    first, second = optimizer.param_groups
    chain = model[0]
    assert isinstance(chain, FactoredLayer)
    assert [id(p) for p in first["params"]] == [id(p) for p in (chain[0].weight, chain[1].weight, model[2].weight)]
    assert first["param_names"] == ["0.0.weight", "0.1.weight", "2.weight"]
    assert [id(p) for p in second["params"]] == [id(chain[1].bias), id(model[2].bias)]
    assert (first["lr"], first["weight_decay"], second["lr"]) == (0.5, 0.1, 0.25)
    assert [group["params"] for group in optimizer.param_groups] == lists
    step(model, optimizer)
    scheduler.step()
    assert first["lr"] == 0.05
    evolvenet.merge(model, optimizers=optimizer)
    assert first["param_names"] == ["0.weight", "2.weight"]
    assert [id(p) for p in first["params"]] == [id(model[0].weight), id(model[2].weight)]
