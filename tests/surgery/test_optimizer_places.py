"""Factors in the place of weights, in optimizers with copies, other optimizers or tensors of their own."""

# nn.Module types its children and attributes loosely, and optimizers are written here as people write them.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import evolvenet
from evolvenet.engine.snapshot import Snapshot
from evolvenet.errors import OptimizerStateError
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.surgery.optimizer_parameters import check_replaceable
from evolvenet.surgery.optimizer_tensors import with_inner
from evolvenet.surgery.optimizer_values import optimizer_values
from tests.helpers.policies import FixedRanks
from tests.helpers.resuming import assert_same
from tests.helpers.wrapping_optimizers import WRAPPING, ByName, Filled, Listed, Lone, Tuples

EVERY = {**WRAPPING, "filled": Filled, "listed": Listed, "by name": ByName}
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 2)).double()


def parameters_of(model: nn.Module) -> Any:
    """With their names, which optimizers without use for them leave alone."""
    return model.named_parameters()


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    def closure() -> Tensor:
        model.zero_grad()
        with torch.enable_grad():
            loss = (model(X) - X[:, :2].sin()).square().mean()
            loss.backward()
        return loss.detach()

    for _ in range(steps):
        closure()
        optimizer.step(closure)


def all_values(optimizer: Optimizer) -> list[Any]:
    return [optimizer_values(each) for each in with_inner([optimizer])]


@pytest.mark.parametrize("name", EVERY)
def test_factors_start_as_in_an_optimizer_made_for_them_and_training_goes_on(name: str) -> None:
    model = network()
    optimizer = EVERY[name](parameters_of(model))
    train(model, optimizer, 4)
    evolvenet.factorize(model, {"0": 3, "2": ("svd", 4)}, batches=[X], optimizers=optimizer)
    fresh = deepcopy(model)
    for parameter in fresh.parameters():
        vars(parameter).clear()
    other = EVERY[name](parameters_of(fresh))
    # Counts of the whole optimizer go on; in what they do, 4 steps are as none.
    vars(other).update({"count": 4} if "count" in vars(other) else {})
    for group in other.param_groups:
        group.update({"k": 4} if "k" in group else {})
    train(model, optimizer, 1)
    train(fresh, other, 1)
    for layer in (0, 2):
        for factor, expected in zip(model[layer].factors, fresh[layer].factors, strict=True):
            # Its average is made after its first step.
            atol = 1e-3 if name == "averaging" else 1e-12
            torch.testing.assert_close(factor.weight, expected.weight, rtol=0, atol=atol)
    for group in (group for each in with_inner([optimizer]) for group in each.param_groups):
        assert len(group["params"]) == 8
    evolvenet.prune(model, evolvenet.trace(model, X[:2]), {"0.0": 2, "2.0": 3}, [X], optimizer)
    train(model, optimizer, 2)
    evolvenet.grow(model, evolvenet.trace(model, X[:2]), {"0.0": 4}, optimizers=optimizer)
    train(model, optimizer, 2)
    evolvenet.merge(model, optimizers=optimizer)
    train(model, optimizer, 2)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not any(isinstance(module, FactoredLayer) for module in model.modules())


@pytest.mark.parametrize("name", EVERY)
def test_what_belongs_to_other_parameters_stays(name: str) -> None:
    model = network()
    optimizer = EVERY[name](parameters_of(model))
    train(model, optimizer, 3)
    whole, same = deepcopy(model[4]), deepcopy(model[0])
    before = all_values(optimizer)
    evolvenet.factorize(model, {"2": ("svd", 3)}, optimizers=optimizer)
    assert_same_where_not_replaced(before, all_values(optimizer), replaced=2)
    assert torch.equal(whole.weight, model[4].weight)
    assert torch.equal(same.weight, model[0].weight)


def assert_same_where_not_replaced(before: list[Any], after: list[Any], replaced: int) -> None:
    """The state of every parameter is there, one place later behind the replaced one."""
    for one, two in zip(before, after, strict=True):
        for place, state in one["state"].items():
            if place != replaced:
                assert_same(state, two["state"][place + (place > replaced)])


@pytest.mark.parametrize("name", EVERY)
def test_a_factorization_that_fails_or_is_taken_back_leaves_all_as_it_was(name: str) -> None:
    def run(change: Callable[[nn.Module, Optimizer], None]) -> list[Tensor]:
        model = network()
        optimizer = EVERY[name](parameters_of(model))
        train(model, optimizer, 3)
        change(model, optimizer)
        train(model, optimizer, 3)
        return [p.detach() for p in model.parameters()]

    def fails(model: nn.Module, optimizer: Optimizer) -> None:
        other = SGD([model[2].weight], lr=0.1, momentum=0.9)
        other.momenta = (torch.zeros_like(model[2].weight),)
        with pytest.raises(OptimizerStateError):
            evolvenet.factorize(model, {"2": 4}, optimizers=[optimizer, other])

    def taken_back(model: nn.Module, optimizer: Optimizer) -> None:
        past = Snapshot.of(model, evolvenet.trace(model, X[:2]), [optimizer])
        marks = [dict(vars(p)) for p in model.parameters()]
        count, ks = vars(optimizer).get("count"), [group.get("k") for group in optimizer.param_groups]
        evolvenet.factorize(model, {"0": 3, "2": 4}, optimizers=optimizer)
        train(model, optimizer, 2)
        past.restore(model, [optimizer])
        for parameter, mark in zip(model.parameters(), marks, strict=True):
            vars(parameter).update({key: value for key, value in mark.items() if not isinstance(value, Tensor)})
        vars(optimizer).update({"count": count} if count is not None else {})
        for group, k in zip(optimizer.param_groups, ks, strict=True):
            group.update({"k": k} if k is not None else {})

    expected = run(lambda model, optimizer: None)
    for change in (fails, taken_back):
        for one, two in zip(run(change), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_layers_become_chains_in_a_run_and_their_ranks_change(name: str) -> None:
    model = network()
    optimizer = EVERY[name](parameters_of(model))
    evolver = evolvenet.Evolver(model, optimizer, FixedRanks({"2.0": 4}), X[:2])
    assert evolver.lowrank is not None
    for sizes in ({"2.0": 4}, {"2.0": 3, "0": 9}, {"2.0": 4}):
        evolver.policy = FixedRanks(sizes)
        train(model, optimizer, 2)
        evolver.observe(X)
        assert evolver.step().skipped is None
        train(model, optimizer, 2)
    assert model[2].ranks == (4,)
    assert model[2][0].weight.shape == (4, 9)


REFUSED: dict[str, tuple[Callable[[nn.Module], Optimizer], str]] = {
    "tuples": (lambda model: Tuples(model.parameters()), r"Tuples\.momenta: expected .* got a tuple"),
    "lone": (lambda model: Lone(model), r"Lone\.momentum: expected .* got a tensor by itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_places_that_factors_cannot_take_are_named_before_training_and_layers_stay_whole(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, named = REFUSED[name]
    model = network()
    optimizer = make(model)
    with pytest.raises(OptimizerStateError, match=named):
        check_replaceable([optimizer], model)
    with caplog.at_level("WARNING", logger="evolvenet"):
        evolver = evolvenet.Evolver(model, optimizer, FixedRanks({"2.0": 4, "0": 8}), X[:2])
    (warning,) = [record.message for record in caplog.records if "not factorized" in record.message]
    assert type(optimizer).__name__ in warning
    train(model, optimizer, 2)
    evolver.observe(X)
    assert evolver.step().skipped is None
    assert isinstance(model[2], nn.Linear)
    train(model, optimizer, 2)
    with pytest.raises(OptimizerStateError, match=type(optimizer).__name__):
        evolvenet.factorize(model, {"2": 3}, optimizers=optimizer)
    train(model, optimizer, 1)


def test_checking_before_training_changes_nothing() -> None:
    for name, make in EVERY.items():
        model = network()
        optimizer = make(parameters_of(model))
        train(model, optimizer, 2)
        before, own = all_values(optimizer), [id(p) for p in model.parameters()]
        check_replaceable([optimizer], model)
        assert_same(all_values(optimizer), before)
        assert own == [id(p) for group in optimizer.param_groups for p in group["params"]] or name == "outer masters"
        train(model, optimizer, 1)
