"""A cut that is judged by a validation is judged alike after a resume, or a warning says why it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from evolvenet import WidthEvolution
from evolvenet.policies.base import Judgement
from tests.helpers.policies import ShrinkThenGrow
from tests.helpers.resuming import Randomness, assert_same
from tests.helpers.runs import Batches, fresh, trainer


class Undone(ShrinkThenGrow):
    """Every change is undone by the next validation."""

    metric = "val/loss"

    def record(self, state: Any, widths: Sequence[str]) -> Any:
        return state

    def judge(self, state: Any, value: float) -> Judgement:
        return Judgement("undo", state, "all are")


def test_a_resume_judges_as_the_whole_run_or_says_why_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fit(folder: Path, ckpt: Path | None = None) -> tuple[Any, str]:
        caplog.clear()
        torch.manual_seed(5)
        model, evolution = fresh(), WidthEvolution(Undone(), every_n_steps=3, calibration_batches=1, stop=1.0)
        keeper = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fitting = trainer(folder, [Randomness(), evolution, keeper], max_epochs=2, val_check_interval=4)
        fitting.fit(model, Batches(8), Batches(2), ckpt_path=ckpt, weights_only=True)
        assert evolution.history is not None
        events = [(event.step, event.changes) for event in evolution.history.events]
        return (events, dict(model.state_dict())), caplog.text

    whole, _ = fit(tmp_path / "whole")
    warned = {}
    for step in (3, 4, 5, 7, 8, 12):
        resumed, said = fit(tmp_path / f"{step}", tmp_path / "whole" / f"step={step}.ckpt")
        warned[step] = "before the validation that follows it" in said
        if not warned[step]:
            assert_same(resumed, whole)
    assert any(warned.values())
    assert not any(warned[step] for step in (3, 5, 7))
