"""Several processes under the transformers `Trainer` and accelerate: one plan, the same weights everywhere, resume, undo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.paths import HELPERS, ROOT
from tests.helpers.transformers_runs import HEADS, INNER, SIZES

SCRIPT = HELPERS / "transformers_ddp_run.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by run."""
    folder = tmp_path_factory.mktemp("pair")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(SCRIPT),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"found.{rank}.json").read_text("utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("run", ["whole", "accumulated", "accelerate"])
def test_two_processes_train_one_network(run: str, pair: list[dict[str, Any]]) -> None:
    """Compared after every step in the run itself, weights of the optimizer's moments too."""
    one, other = (rank[run] for rank in pair)
    assert one == other
    assert one["events"] == [[4, None, 3]]
    assert one["sizes"].items() >= SIZES.items()
    assert one["follows"]
    assert one["moved"]
    assert one["states"] > 10


def test_a_block_is_removed_on_every_process(pair: list[dict[str, Any]]) -> None:
    assert [rank["depth"] for rank in pair] == [{"removed": ["1"], "parameters": 40 + 18}] * 2


def test_a_loss_in_which_all_processes_take_part_does_not_wait_for_ever(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["gathered"]["skipped"] == [None]
        assert rank["gathered"]["sizes"].items() >= SIZES.items()


def test_two_processes_resume_as_if_nothing_had_happened(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["resumed"]["events"] == rank["whole"]["events"]
        assert rank["resumed"]["weights"] == rank["whole"]["weights"]
        assert (rank["whole"]["compared"], rank["resumed"]["compared"]) == (8, 2)


def test_cuts_are_judged_by_the_evaluation_and_undone_on_every_process_also_after_a_resume(
    pair: list[dict[str, Any]],
) -> None:
    for rank in pair:
        judged, again = rank["judged"], rank["judged again"]
        assert judged["compared"] == 8
        # A cut that is kept, one that is undone after two evaluations.
        assert [(step, skipped, changes > 0) for step, skipped, changes in judged["events"][:3]] == [
            (2, None, True), (4, None, True), (6, None, True),
        ]  # fmt: skip
        assert judged["follows"]
        assert again == {**judged, "compared": 2}
        assert judged["sizes"][HEADS] <= 8
        assert judged["sizes"][INNER] <= 48
    assert pair[0]["judged"] == pair[1]["judged"]
