"""Runs in which each recurrent layer keeps units of its own end as they do when they are stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from evolvenet import WidthEvolution
from tests.helpers.policies import Walk
from tests.helpers.resuming import Randomness, assert_same
from tests.helpers.runs import Batches, User, trainer


class Recurrent(User):
    """Six numbers as three steps of two, two layers in both directions, the last states."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.steps, self.last = nn.LSTM(2, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.steps(x.view(-1, 3, 2))[1][0]
        return self.last(torch.cat([states[-2], states[-1]], 1))


def run(folder: Path, resume: Path | None = None) -> tuple[dict[str, Any], WidthEvolution]:
    torch.manual_seed(0)
    model = Recurrent()
    evolution = WidthEvolution(Walk((6,), (7,), (5,)), every_n_steps=3, calibration_batches=2, stop=1.0)
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    fit = trainer(folder, [Randomness(), evolution, EMAWeightAveraging(decay=0.9), saved], max_epochs=2)
    fit.fit(model, Batches(6), ckpt_path=resume, weights_only=True)
    return {"model": dict(model.state_dict()), "optimizer": fit.optimizers[0].state_dict()}, evolution


def test_a_run_whose_layers_keep_units_of_their_own_resumes_to_the_same_end(tmp_path: Path) -> None:
    whole, evolution = run(tmp_path / "whole")
    assert evolution.history is not None
    assert evolution.evolver is not None
    assert [event.skipped for event in evolution.history.events if event.skipped] == []
    assert sum(bool(event.changes) for event in evolution.history.events) >= 3
    assert evolution.evolver.graph.widths["steps"].parts == 4
    assert len(set(evolution.evolver.original.origins["steps"].parts)) > 1
    resumed, again = run(tmp_path / "resumed", tmp_path / "whole" / "step=7.ckpt")
    assert_same(resumed, whole)
    assert again.evolver is not None
    assert again.evolver.original == evolution.evolver.original
