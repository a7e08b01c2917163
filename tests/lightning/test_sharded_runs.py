"""FSDP2 under Lightning's `ModelParallelStrategy`: widths change on both ranks, and runs resume to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from evolvenet import Budget, Threshold, UnsupportedStrategyError, WidthEvolution
from evolvenet.lightning.sharded import check_shards
from tests.helpers.paths import HELPERS
from tests.helpers.runs import Classifier


def run(folder: Path, *checkpoints: str) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    command = [sys.executable, str(HELPERS / "fsdp_run.py"), str(folder / "found"), *checkpoints]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"found.{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def assert_resumed(ranks: list[dict[str, Any]]) -> None:
    """Both ranks have the same weights and moments of the planned widths, sharded as before, in each run."""
    assert ranks[0] == ranks[1]
    for whole, *again in ranks[0].values():
        assert whole["events"] == [[8, 1, None], [13, 1, None]]
        assert whole["sizes"] == {"net.0": 9, "net.4": 20}
        assert whole["layers"] == [9, 20]
        assert whole["sharded"] == ["FSDPSequential", "FSDPLinear", "FSDPLinear"]
        assert again == [whole] * len(again)


def test_widths_change_under_fsdp2_and_a_run_resumes_amid_the_gathering_of_batches(tmp_path: Path) -> None:
    assert_resumed(run(tmp_path, "file:7"))


@pytest.mark.long
def test_checkpoints_of_one_file_and_of_one_a_rank_resume_from_every_part_of_a_run(tmp_path: Path) -> None:
    assert_resumed(run(tmp_path, "file:3,6,9,11,14", "files:3,6,7,9,11,14"))


def test_the_strategy_is_accepted_and_a_module_that_is_not_sharded_is_left_alone() -> None:
    strategy = object.__new__(ModelParallelStrategy)
    WidthEvolution(Threshold()).setup(SimpleNamespace(strategy=strategy, callbacks=[]), Classifier(), "fit")  # type: ignore[arg-type]
    check_shards(Classifier(), Budget(params=100, lowrank=True))


def test_policies_that_replace_modules_are_refused_for_sharded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolvenet.lightning.sharded.is_sharded", lambda module: True)
    with pytest.raises(UnsupportedStrategyError, match=r'neither lowrank=True .* strategy="ddp"'):
        check_shards(Classifier(), Budget(params=100, lowrank=True))
