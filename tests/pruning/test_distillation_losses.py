"""What `polish` makes less: the divergence of what two networks predict, in the place of the squared error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import DistillationError


def network(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


def samples(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(24, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_the_step_is_that_of_adam_on_the_divergence_of_what_is_predicted() -> None:
    teacher, model = network(16), network(4)
    (batch,) = samples(1)
    fitted, judged = batch[:-3], batch[-3:]
    slow = copy.deepcopy(model)

    def divergence(inputs: Tensor) -> Tensor:
        p, q = teacher(inputs).detach().softmax(1), slow(inputs).softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    adam = torch.optim.Adam(slow.parameters(), lr=1e-3)
    divergence(fitted[torch.randperm(21, generator=torch.Generator().manual_seed(5))]).backward()
    adam.step()
    done = evolvenet.polish(model, teacher, [batch], steps=1, rate=1e-3, batch_size=21, loss="kl", seed=5)
    assert done.kept
    assert "divergence" in str(done)
    assert "nats" in str(done)
    for one, two in zip(slow.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert done.after == pytest.approx(divergence(judged).item(), rel=1e-9)


def test_the_divergence_is_the_same_over_several_batches_and_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.weight, x[:, None].repeat(1, 2, 1) @ self.weight

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))

    torch.manual_seed(0)
    teacher, model = Two(), Two()
    whole = torch.cat(samples(4))
    judged = whole[-12:]
    with torch.no_grad():
        pairs = [
            (one.log_softmax(-1), two.log_softmax(-1)) for one, two in zip(teacher(judged), model(judged), strict=True)
        ]
        expected = sum((one.exp() * (one - two)).sum(-1).mean().item() for one, two in pairs)
    # Twelve samples in three parts, of five, five and two.
    done = evolvenet.polish(model, teacher, list(whole.split(24)), steps=0, batch_size=5, loss="kl")
    assert done.before == pytest.approx(expected, rel=1e-10)


def test_outputs_that_are_no_logits_have_no_divergence() -> None:
    teacher, model = nn.Linear(6, 1).double(), nn.Linear(6, 1).double()
    with pytest.raises(DistillationError, match=r"Expected logits .* got outputs of the shapes \[\(12, 1\)\]"):
        evolvenet.polish(model, teacher, samples(4), steps=1, loss="kl")
    wrong: Any = "ce"
    with pytest.raises(DistillationError, match="expected loss to be"):
        evolvenet.polish(model, teacher, samples(4), steps=1, loss=wrong)
