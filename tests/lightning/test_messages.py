"""What a person sees of a run: lines, a table, and the size in the progress bar."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar

from evolvenet import Proposal, WidthEvolution
from tests.helpers.paths import ROOT
from tests.helpers.runs import Batches, User, trainer

SCRIPT = """
import evolvenet
import lightning
from tests.helpers.runs import Batches, User

evolution = evolvenet.WidthEvolution(evolvenet.Threshold(prune=0.02, grow=0.95), every_n_epochs=1)
trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", callbacks=[evolution], enable_checkpointing=False)
trainer.fit(User(width=32), Batches(8))
"""


class Halve:
    def propose(self, context):
        return {name: Proposal(size // 2, "half") for name, size in context.graph.sizes.items()}


def test_a_run_with_default_settings_shows_its_events_and_ends_with_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("evolvenet: step ")]
    assert len(lines) >= 2
    assert all(" parameters, " in line for line in lines)
    table = done.stderr[done.stderr.index("evolvenet: widths at the end of the run:") :]
    assert "MACs per sample" in table
    assert "keep their size" in table


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_has_a_short_name_and_loggers_the_long_ones(tmp_path: Path, kind: type[Callback]) -> None:
    seen: list[Mapping[str, object]] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
        ) -> None:
            assert trainer.progress_bar_callback is not None
            seen.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))
            assert "evolve/parameters" in trainer.callback_metrics or len(seen) == 1

    evolution = WidthEvolution(Halve(), every_n_epochs=1)
    bar = kind()
    trainer(tmp_path, [evolution, Watch(), bar], enable_progress_bar=True).fit(User(width=64), Batches(8))
    assert evolution.history is not None
    assert seen[4]["params"] == "4.93k"
    assert seen[-1]["params"] == str(evolution.history.latest.parameters)
    assert not any(name.startswith("evolve/") for name in seen[-1])
    assert "get_metrics" not in vars(bar)


def test_the_table_of_a_fit_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evolution = WidthEvolution(Halve(), every_n_epochs=1)
    with caplog.at_level(logging.INFO, "evolvenet"):
        trainer(tmp_path, [evolution]).fit(User(), Batches(8))
    tables = [record.getMessage() for record in caplog.records if "at the end of the run" in record.getMessage()]
    assert tables == [f"widths at the end of the run:\n{evolution.history}"]
