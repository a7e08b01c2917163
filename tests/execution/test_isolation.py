"""`isolated` restores everything that runs of the model inside it have changed."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn

from evolvenet.errors import TraceError
from evolvenet.execution.isolation import isolated
from tests.helpers import networks
from tests.helpers.cases import CASES, Case
from tests.helpers.states import State


class Keeper(nn.Module):
    """Keeps things of every kind, and does all sorts of things to them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.inner.weight
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("index", torch.arange(3))
        self.list, self.dict, self.set = [1, 2], {"a": 1}, {1}
        self.ordered, self.deque = OrderedDict(b=2), deque([1, 2, 3], maxlen=3)
        self.lock = threading.Lock()
        self.number, self.fail = 3, False

    def misbehave(self) -> None:
        self.number = 4
        self.new = "attribute"
        del self.lock
        self.list.append(3)
        self.list[0] = 9
        self.dict.clear()
        self.set.add(2)
        self.ordered["c"] = 3
        self.deque.append(4)
        self.inner.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("late", torch.zeros(1))
        self.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        self.add_module("child", nn.ReLU())
        self.inner.register_forward_hook(lambda *args: None)
        self.count = torch.ones(1)
        del self.tied
        self.drawn = (torch.rand(1), np.random.rand(), random.random())
        self.train(not self.training)
        if self.fail:
            raise KeyboardInterrupt


@pytest.mark.parametrize("device", ["meta", None])
def test_everything_is_restored(device: str | None) -> None:
    model = Keeper()
    model.inner.bias.grad = torch.ones(3)
    before, order = State.of(model), list(vars(model))
    with isolated(model, shadows=True, device=device):
        model.misbehave()
    assert before.differences(model) == []
    assert list(vars(model)) == order
    assert model.deque.maxlen == 3
    assert model.lock.acquire(blocking=False)


@pytest.mark.parametrize("device", ["meta", None])
def test_everything_is_restored_after_an_error(device: str | None) -> None:
    model = Keeper()
    model.fail = True
    before = State.of(model)
    with pytest.raises(KeyboardInterrupt), isolated(model, shadows=True, device=device):
        model.misbehave()
    assert before.differences(model) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_writes_to_shadows_do_not_reach_the_real_tensors(case: Case) -> None:
    model = case.model()
    before = State.of(model)
    with isolated(model, shadows=True), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)
            tensor.data = torch.zeros(0, dtype=tensor.dtype)
    assert before.differences(model) == []


def test_shadows_have_the_shape_dtype_and_ties_of_their_tensors() -> None:
    model = Keeper()
    model.inner.weight.requires_grad_(False)
    real = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for device in ("meta", None):
        with isolated(model, shadows=True, device=device):
            assert model.inner.weight is model.tied.weight
            assert not model.inner.weight.requires_grad
            assert model.inner.bias.requires_grad
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                assert tensor is not real[name]
                assert (tensor.shape, tensor.dtype, type(tensor)) == (
                    real[name].shape,
                    real[name].dtype,
                    type(real[name]),
                )
                assert tensor.is_meta == (device == "meta" and tensor.is_floating_point())
            # Whole numbers are indices, so their values count.
            assert torch.equal(model.get_buffer("index"), torch.arange(3))


def test_recurrent_modules_run_on_their_shadows() -> None:
    model = nn.LSTM(3, 4)
    flat = list(model._flat_weights)
    x = torch.randn(2, 1, 3)
    expected = model(x)[0]
    with isolated(model, shadows=True), torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert not model(x)[0].any()
    assert all(a is b for a, b in zip(flat, model._flat_weights, strict=True))
    assert torch.equal(model(x)[0], expected)


class Counts(nn.Module):
    """Counts its calls in a buffer, in an attribute and in a list, which all may have been made under inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_buffer", torch.zeros(2))
        self.as_attribute, self.inside = torch.zeros(2), [torch.zeros(2)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.in_buffer += 1
        self.as_attribute += 1
        return x + self.in_buffer + self.as_attribute

    def counts(self) -> list[float]:
        return [float(each.sum()) for each in (self.in_buffer, self.as_attribute, self.inside[0])]


@pytest.mark.parametrize("shadows", [True, False])
def test_tensors_made_under_inference_mode_are_written_to_inside_and_restored(shadows: bool) -> None:
    with torch.inference_mode():
        model = Counts()
        model(torch.zeros(2))
    kept = model.get_buffer("in_buffer")
    with isolated(model, shadows=shadows):
        assert model(torch.zeros(2)).tolist() == [4.0, 4.0]
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            model.inside[0].add_(1)
    assert model.counts() == [2.0, 2.0, 0.0], "the op has written before it raised"
    assert model.get_buffer("in_buffer") is kept
    assert kept.is_inference()


def test_a_model_with_a_lock_is_isolated_without_a_deep_copy() -> None:
    """A lock cannot be."""
    model = networks.Locked()
    with isolated(model, shadows=True, device="meta"):
        assert model(torch.zeros(2, 5, device="meta")).shape == (2, 3)
        assert (model.calls, len(model.seen)) == (1, 1)
    assert (model.calls, model.seen) == (0, [])


def test_lazy_parameters_are_refused_and_the_model_restored() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    weight = model[0].weight
    with pytest.raises(TraceError, match="got a lazy one"), isolated(model, shadows=True):
        pass
    assert model[0].weight is weight
    model(torch.zeros(1, 3))
    with isolated(model, shadows=True):
        assert model(torch.zeros(1, 3)).shape == (1, 2)


def test_shadows_without_copies_share_the_values_of_parameters_and_copy_buffers() -> None:
    model = nn.BatchNorm1d(3)
    mean = model.get_buffer("running_mean")
    weight, shared = model.weight, model.weight.data_ptr()
    with isolated(model, shadows=True, copied=False):
        assert model.weight is not weight
        assert model.weight.data_ptr() == shared
        assert model.get_buffer("running_mean").data_ptr() != mean.data_ptr()
    with isolated(model, shadows=True):
        assert model.weight.data_ptr() != shared
    assert model.weight is weight
