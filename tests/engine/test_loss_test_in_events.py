"""Growth in real runs: where there is something to learn widths grow, where labels are noise they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet import Evolver, Threshold, WidthEvolution
from evolvenet.engine.batch_buffer import BatchBuffer
from tests.helpers.runs import Batches, Classifier, trainer


class Noise(Classifier):
    """Targets that have nothing to do with the inputs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        made = torch.Generator().manual_seed(int(x.sum().abs() * 1e4))
        return super().training_step((x, torch.randint(0, 3, y.shape, generator=made)), batch_idx)


class Curved(Classifier):
    """A target that three units cannot follow."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return super().training_step((x, ((x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0).long())), batch_idx)


def grown(module: Classifier, folder: Path, certain: float) -> int:
    """Growths in a run in which every width is saturated."""
    torch.manual_seed(0)
    policy = Threshold(prune=0.0, grow=0.0001, settle=1.0, cooldown=0, certain=certain)
    callback = WidthEvolution(policy, every_n_steps=4, stop=1.0, calibration_batches=4)
    fitting = trainer(folder, [callback], max_epochs=6)
    fitting.fit(module, Batches(16, size=64))
    assert callback.history is not None
    return sum(len(event.changes) for event in callback.history.events)


def test_noise_grows_nothing_but_by_chance_and_something_to_learn_does(tmp_path: Path) -> None:
    noise = grown(Noise(width=4), tmp_path / "noise", 2.0)
    real = grown(Curved(width=4), tmp_path / "real", 2.0)
    without = grown(Noise(width=4), tmp_path / "without", 0.0)
    assert noise <= 5 < real
    assert without > 2 * real


def test_a_plain_loop_that_shows_no_gradients_grows_by_the_spectrum() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    evolver = Evolver(model, None, Threshold(prune=0.0, grow=0.0001), torch.zeros(1, 6))
    evolver.observe(torch.randn(64, 6))
    assert evolver.step().sizes["0"] == 5


@pytest.mark.parametrize("wanted", [True, False])
def test_a_plain_loop_may_show_gradients(wanted: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    evolver = Evolver(model, None, Threshold(prune=0.0, grow=0.0001), torch.zeros(1, 6))
    x = torch.randn(2048, 6)
    evolver.observe(x, [-x[:, :1].abs() if wanted else torch.randn(2048, 1)])
    assert evolver.step().sizes["0"] == (5 if wanted else 4)


def test_gradients_go_through_a_checkpoint_with_their_batches() -> None:
    """Without them the width would grow by its spectrum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    policy = Threshold(prune=0.0, grow=0.0001)
    first, second = (Evolver(model, None, policy, torch.zeros(1, 6)) for _ in range(2))
    first.observe(torch.randn(2048, 6), [torch.randn(2048, 1)])
    second.load_state_dict(first.state_dict())
    assert second.step().sizes["0"] == 4


class Pair:
    """Rank 0 of two, the other of which has buffer what it has."""

    rank, size = 0, 2

    def all_gather(self, value: Any) -> list[Any]:
        return [value, value]

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_batches_of_all_processes_keep_their_gradients() -> None:
    buffer = BatchBuffer(torch.zeros(1, 2), 4)
    for number in range(3):
        x = torch.full((6, 2), float(number))
        buffer.add(x, [x[:, :1].clone(), None], ranks=2)
    buffer.add(torch.full((6, 2), 3.0), ranks=2)
    batches, gradients = buffer.gather(Pair())
    assert len(batches) == len(gradients) == 8
    for batch, found in zip(batches, gradients, strict=True):
        assert batch.shape == (3, 2)
        if batch[0, 0] == 3:
            assert tuple(found) == ()
        else:
            assert found[1] is None
            torch.testing.assert_close(found[0], batch[:, :1])
