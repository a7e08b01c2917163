"""`polish` on inputs that are few, of several lengths, changed in place, or looked up, and under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import evolvenet


@pytest.mark.parametrize("count", [1, 2, 15])
def test_few_samples_are_enough(count: int) -> None:
    """With one sample to judge on there is no variance, and the error is over its mean square."""
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Linear(6, wide), nn.Tanh(), nn.Linear(wide, 3)) for wide in (16, 4))
    done = evolvenet.polish(model, teacher, [torch.randn(count, 6)], steps=20)
    assert done.steps >= 20
    assert 0 < done.before < 1e3


def test_features_of_batches_of_several_lengths_are_imitated() -> None:
    torch.manual_seed(0)
    teacher, model = (
        nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 3)) for wide in (16, 4)
    )
    batches = [torch.randint(9, (8, length)) for length in (5, 7, 9, 5)]
    assert evolvenet.polish(model, teacher, batches, steps=20, features=["1"]).kept


def test_inputs_that_are_changed_in_place_stay_as_they_were() -> None:
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Linear(6, wide), nn.Tanh(), nn.Linear(wide, 3)) for wide in (16, 4))
    batches = [torch.randn(4, length, 6) for length in (5, 7, 9)]
    before = [batch.clone() for batch in batches]
    evolvenet.polish(model, teacher, batches, steps=6, augment=lambda inputs: inputs.add_(1.0))
    assert all(map(torch.equal, batches, before))


def test_sparse_gradients_are_followed() -> None:
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)) for _ in range(2))
    assert evolvenet.polish(model, teacher, [torch.randint(9, (16,)) for _ in range(4)], steps=20).kept


def test_under_autocast_weights_are_trained_and_used_as_they_are() -> None:
    torch.manual_seed(0)
    whole, model = (nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)) for width in (32, 8))
    batches = [torch.randn(24, 6) for _ in range(4)]
    plain = evolvenet.polish(copy.deepcopy(model), whole, batches, steps=40)
    with torch.autocast("cpu", torch.bfloat16):
        model(batches[0])
        done = evolvenet.polish(model, whole, batches, steps=40)
        within = model(batches[0])
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert done.kept
    assert done.after == pytest.approx(plain.after, rel=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(batches[0]), within)
