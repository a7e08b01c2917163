"""What is heard of a training step: its inputs, and the gradients of what the network answered."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from evolvenet.execution import call_recorder as listen
from evolvenet.execution.call_recorder import CallRecorder


class Two(nn.Module):
    """Answers with a dict of two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": self.one(x), "other": self.other(x)}


def heard(model: nn.Module, *batches: Tensor, most: int = 8) -> CallRecorder:
    """A listener that has heard one training step on each batch."""
    listener = CallRecorder({"": model}, most)
    for x in batches:
        out = model(x)
        torch.stack([each.square().sum() for each in out.values()]).sum().backward()
    return listener


def test_gradients_are_those_of_the_loss_at_each_output() -> None:
    model, x, y = Two(), torch.randn(5, 3), torch.randn(6, 3)
    calls = heard(model, x, y).calls("")
    assert [inputs is each for (inputs, _), each in zip(calls, (x, y), strict=True)] == [True, True]
    for inputs, gradients in calls:
        for gradient, answer in zip(gradients, model(inputs).values(), strict=True):
            torch.testing.assert_close(gradient, 2 * answer.detach())


def test_several_backward_passes_add_up_and_those_to_come_are_not_known() -> None:
    model = Two()
    listener = CallRecorder({"": model})
    out = model(torch.randn(5, 3))
    assert listener.calls("")[0][1] == [None, None]
    out["one"].sum().backward(retain_graph=True)
    ((one, other),) = [gradients for _, gradients in listener.calls("")]
    assert one is not None
    assert other is None
    out["one"].sum().backward()
    torch.testing.assert_close(listener.calls("")[0][1][0], 2 * torch.ones(5, 4))
    torch.testing.assert_close(one, torch.ones(5, 4))


def test_of_a_large_answer_the_first_samples_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "NUMBERS", 12)
    ((one, other),) = [gradients for _, gradients in heard(Two(), torch.randn(5, 3)).calls("")]
    assert one is not None
    assert other is not None
    assert (one.shape, other.shape) == ((3, 4), (3, 2))
    assert one.untyped_storage().nbytes() == 3 * 4 * 4


def test_no_gradient_is_waited_for_without_a_graph_or_outside_of_training() -> None:
    model = Two()
    listener = CallRecorder({"": model})
    with torch.no_grad():
        model(torch.randn(5, 3))
    assert listener.calls("")[0][1] == [None, None]
    model.eval()(torch.randn(5, 3))["one"].sum().backward()
    assert [gradients for _, gradients in listener.calls("")] == [[None, None]]


def test_no_hook_is_left_behind_and_copies_hear_nothing() -> None:
    model = Two()
    listener = CallRecorder({"": model})
    replica, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each in (replica, thawed):
        each(torch.randn(5, 3))["one"].sum().backward()
    assert listener.calls("") == []
    listener.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_neither_the_answer_nor_its_graph_is_kept_alive() -> None:
    model = Two()
    listener = CallRecorder({"": model})
    out = model(torch.randn(5, 3))
    out["one"].sum().backward()
    answer = weakref.ref(out["one"])
    del out
    gc.collect()
    assert answer() is None
    assert listener.calls("")[0][1][0] is not None
