"""Runs in which repeated ops return former results put out, to the bit, what they put out otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.execution.isolation import isolated, model_outputs, op_by_op
from evolvenet.execution.op_cache import OpCache
from evolvenet.graph.naming import named_tensors
from tests.helpers.cases import CASES, Case


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_after_a_change_of_one_tensor_are_those_without_a_cache(case: Case) -> None:
    model, inputs, cache = case.model(), case.inputs(), OpCache()
    whole = model_outputs(model, inputs)
    tensors, _, _ = named_tensors(model)
    names = list(tensors)
    for name in (None, None, names[0], names[len(names) // 2], names[-1]):
        before = tensors[name].detach().clone() if name else None
        if name:
            tensors[name].data.mul_(1.5)
        slow = model_outputs(model, inputs)
        assert equal(model_outputs(model, inputs, mode=cache.on(model, inputs, [name] if name else [])), slow)
        if name and before is not None:
            tensors[name].data.copy_(before)
    assert cache.hits
    assert equal(model_outputs(model, inputs, mode=cache.on(model, inputs, [])), whole)


class Function(nn.Module):
    """A layer, a function of its outputs, a layer; input `[b, 4]`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 4).double(), nn.Linear(4, 3).double(), function
        self.register_buffer("level", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def overwritten_view(x: Tensor) -> Tensor:
    y = torch.relu(x)
    y[:, 1:3] += 1
    return y + torch.relu(x)


def twice(x: Tensor) -> Tensor:
    one, two = torch.relu(x), torch.relu(x)
    return one.add_(1) * two


def filled(x: Tensor) -> Tensor:
    out = torch.empty(2, *x.shape, dtype=x.dtype)
    out[0], out[1] = x, -x
    return out.relu_().sum(0)


def read_between(x: Tensor) -> Tensor:
    y = x * 2
    z = y.sum()
    y.clamp_(min=0)
    return y + z + float(y.max())


def in_training(x: Tensor) -> Tensor:
    mean, variance = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    functional.batch_norm(x, mean, variance, training=True)
    return functional.batch_norm(x, mean, variance)


def shifted(x: Tensor) -> Tensor:
    x.sub_(1)
    return x.to(torch.float32).to(x.dtype)


FUNCTIONS = (overwritten_view, twice, filled, read_between, in_training, shifted)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_writes_in_place_reach_no_other_run(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x, cache = Function(function), torch.randn(5, 4, dtype=torch.float64), OpCache()
    for changed in ([], ["last.weight"], ["last.weight"], ["first.bias"], []):
        for name in changed:
            model.get_parameter(name).data.mul_(1.1)
        slow = model_outputs(model, x)
        assert equal(model_outputs(model, x, mode=cache.on(model, x, changed)), slow)
        assert changed != ["last.weight"] or cache.hits
        if changed == ["first.bias"]:
            model.get_parameter("first.bias").data.div_(1.1)
            cache = OpCache()


def test_random_ops_are_drawn_anew() -> None:
    model, x, cache = Function(lambda x: functional.dropout(x, training=True)), torch.ones(50, 4).double(), OpCache()
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        found.append(model_outputs(model, x, mode=cache.on(model, x, []))[0])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_a_buffer_that_a_run_writes_to_and_inputs_that_it_overwrites_are_not_taken_for_the_same() -> None:
    model, cache = Function(lambda x: x), OpCache()
    model.function = lambda x: x * model.level.add_(1)  # type: ignore[operator]
    x = torch.ones(2, 4).double()
    for _ in range(3):
        with torch.no_grad():
            expected = model.last(model.first(x) * (model.level + 1))  # type: ignore[operator]
            with op_by_op(cache.on(model, x, [])):
                assert torch.equal(model(x), expected)
    model.function = lambda y: y + x.mul_(2).sum()
    for _ in range(3):
        with torch.no_grad():
            expected = model.last(model.first(x) + 2 * x.sum())
            with op_by_op(cache.on(model, x, [])):
                assert torch.equal(model(x), expected)


def test_without_room_nothing_is_kept_and_another_batch_is_another_input() -> None:
    model, cache = Function(torch.relu), OpCache(memory=0)
    x = torch.randn(3, 4).double()
    slow = [model_outputs(model, each) for each in (x, x + 1)]
    for _ in range(2):
        assert equal(model_outputs(model, x, mode=cache.on(model, x, [])), slow[0])
    assert cache.hits == 0
    cache = OpCache()
    for _ in range(2):
        for each, expected in zip((x, x + 1), slow, strict=True):
            assert equal(model_outputs(model, each, mode=cache.on(model, each, [])), expected)
    assert cache.hits


def test_a_run_of_copies_of_the_tensors_may_write_to_these() -> None:
    model, x, cache = Function(torch.relu), torch.randn(3, 4).double(), OpCache()
    slow = model_outputs(model, x)
    model_outputs(model, x, mode=cache.on(model, x, []))

    def negate(module: nn.Module, args: Any) -> None:
        module.get_parameter("weight").neg_()

    hook = model.last.register_forward_pre_hook(negate)
    with isolated(model, shadows=True):
        with op_by_op(cache.on(model, x, [], copies=True)):
            moved = model(x)
        assert torch.allclose(moved + slow[0], 2 * model.last.bias)
    hook.remove()
    hits = cache.hits
    assert equal(model_outputs(model, x, mode=cache.on(model, x, [])), slow)
    assert cache.hits > hits + 2
