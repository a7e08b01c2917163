"""FSDP2 under Lightning's `ModelParallelStrategy`: widths change on both ranks, and runs resume to the same bits."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from evolvenet import Budget, Threshold, UnsupportedStrategyError, WidthEvolution, trace
from evolvenet.graph.serialization import to_state_dict
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


def test_a_strategy_fits_the_module_that_it_has_and_reads_what_the_trainer_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class State:
        """An object of the user's, which no reading of weights alone allows."""

    monkeypatch.setattr(sys.modules[__name__], "State", State, raising=False)
    State.__qualname__ = "State"
    module, fitted, loaded = Classifier(), list[Any](), list[Any]()
    strategy: Any = object.__new__(ModelParallelStrategy)
    vars(strategy).update(_lightning_module=None, _optimizers=[])
    monkeypatch.setattr(ModelParallelStrategy, "load_checkpoint", lambda self, *given, **options: loaded.append(given))
    monkeypatch.setattr(ModelParallelStrategy, "broadcast", lambda self, given: given)
    monkeypatch.setattr("evolvenet.lightning.sharded.fit_shapes", lambda root, *_, **__: fitted.append(root))
    graph = to_state_dict(trace(module, torch.zeros(2, 6)))
    evolution, callbacks = WidthEvolution(Threshold()), SimpleNamespace(strategy=strategy, callbacks=[])
    evolution.setup(callbacks, Classifier(), "fit")  # type: ignore[arg-type]
    strategy._lightning_module = module
    state = {"evolver": {"graph": graph, "note": {}}, "root": ""}
    torch.save({"callbacks": {evolution.state_key: state}, "user": State()}, path := tmp_path / "run.ckpt")
    strategy.load_checkpoint(path, weights_only=False)
    assert fitted == [module]
    with pytest.raises(pickle.UnpicklingError):
        strategy.load_checkpoint(path, weights_only=True)
    evolution.teardown(callbacks, module, "fit")  # type: ignore[arg-type]
    assert "load_checkpoint" not in vars(strategy)
    assert len(loaded) == 1
