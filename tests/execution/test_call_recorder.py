"""`CallRecorder` records the inputs of a training step and the gradients at the network's outputs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from evolvenet.execution import call_recorder
from evolvenet.execution.call_recorder import CallRecorder


class Two(nn.Module):
    """Returns a dict of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": self.one(x), "other": self.other(x)}


def recorded(model: nn.Module, *batches: Tensor, most: int = 8) -> CallRecorder:
    """A recorder of one training step on each batch."""
    recorder = CallRecorder({"": model}, most)
    for x in batches:
        out = model(x)
        torch.stack([each.square().sum() for each in out.values()]).sum().backward()
    return recorder


def test_gradients_are_those_of_the_loss_at_each_output() -> None:
    model, x, y = Two(), torch.randn(5, 3), torch.randn(6, 3)
    calls = recorded(model, x, y).calls("")
    assert all(torch.equal(inputs, each) for (inputs, _), each in zip(calls, (x, y), strict=True))
    for inputs, gradients in calls:
        for gradient, output in zip(gradients, model(inputs).values(), strict=True):
            torch.testing.assert_close(gradient, 2 * output.detach())


def test_gradients_of_several_backward_passes_add_up_and_are_none_before_the_first() -> None:
    model = Two()
    recorder = CallRecorder({"": model})
    out = model(torch.randn(5, 3))
    assert recorder.calls("")[0][1] == [None, None]
    out["one"].sum().backward(retain_graph=True)
    ((one, other),) = [gradients for _, gradients in recorder.calls("")]
    assert one is not None
    assert other is None
    out["one"].sum().backward()
    torch.testing.assert_close(recorder.calls("")[0][1][0], 2 * torch.ones(5, 4))
    torch.testing.assert_close(one, torch.ones(5, 4))


def test_of_a_large_output_only_the_first_samples_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_recorder, "MAX_GRADIENT_ENTRIES", 12)
    ((one, other),) = [gradients for _, gradients in recorded(Two(), torch.randn(5, 3)).calls("")]
    assert one is not None
    assert other is not None
    assert (one.shape, other.shape) == ((3, 4), (3, 2))
    assert one.untyped_storage().nbytes() == 3 * 4 * 4


def test_no_gradient_is_recorded_without_a_graph_or_outside_training() -> None:
    model = Two()
    recorder = CallRecorder({"": model})
    with torch.no_grad():
        model(torch.randn(5, 3))
    assert recorder.calls("")[0][1] == [None, None]
    model.eval()(torch.randn(5, 3))["one"].sum().backward()
    assert [gradients for _, gradients in recorder.calls("")] == [[None, None]]


def test_close_removes_every_hook_and_copies_record_nothing() -> None:
    model = Two()
    recorder = CallRecorder({"": model})
    replica, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each in (replica, thawed):
        each(torch.randn(5, 3))["one"].sum().backward()
    assert recorder.calls("") == []
    recorder.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_neither_the_output_nor_its_graph_is_kept_alive() -> None:
    model = Two()
    recorder = CallRecorder({"": model})
    out = model(torch.randn(5, 3))
    out["one"].sum().backward()
    output = weakref.ref(out["one"])
    del out
    gc.collect()
    assert output() is None
    assert recorder.calls("")[0][1][0] is not None


def test_a_gradient_penalty_is_a_part_of_the_loss_and_not_its_gradient() -> None:
    layer = nn.Linear(2, 1)
    recorder = CallRecorder({"layer": layer})
    x = torch.ones(3, 2, requires_grad=True)
    out = layer(x)
    (penalty,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (0.25 * out.sum() + penalty.square().sum()).backward()
    ((_, (gradient,)),) = recorder.calls("layer")
    recorder.close()
    torch.testing.assert_close(gradient, torch.full((3, 1), 0.25))
