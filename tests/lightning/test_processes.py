"""Several processes: one plan, the same weights everywhere, and a clear end where they disagree."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import nn

import evolvenet
from evolvenet import WidthEvolution, trace
from evolvenet.engine.distributed import (
    SingleProcess,
    broadcast_surgery,
    check_agreement,
    fingerprint,
    gather_batches,
    run_on_all_ranks,
    run_on_rank_0,
    share_of,
)
from evolvenet.errors import EvolveNetError, RankMismatchError, TraceError
from evolvenet.execution.step import Step
from evolvenet.graph.index_map import IndexMap
from evolvenet.lightning.loading import EXTRA, _reshaping, _with_states
from evolvenet.pruning.selection import plan_prune
from evolvenet.surgery.resize_model import compile_surgery, install
from tests.helpers.cases import CASES
from tests.helpers.paths import HELPERS
from tests.helpers.policies import Fixed

SCRIPT = HELPERS / "ddp_run.py"
HEALTHY = ("plain", "unused", "static", "buckets", "manual", "accumulated", "skips", "powersgd")
FAILURES = {
    "fails on one rank": ("surgery failed: rank 1: RuntimeError: boom", "surgery failed: boom"),
    "fails on rank 0": ("reconstruction failed: boom", "reconstruction failed: rank 0: RuntimeError: boom"),
}
"""The record's messages on rank 0 and on rank 1."""
DISAGREEMENTS = ("other weights", "other widths", "other times")

Ranks = list[dict[str, Any]]
"""What each process found, by rank, in each variant of the run."""


def launch(folder: Path, devices: int, start: str, *variants: str) -> Ranks:
    """Run the variants one after the other; where the main process spawns the others, it alone reports."""
    command = [sys.executable, str(SCRIPT), str(folder / "found"), "--devices", str(devices), "--start", start]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *variants], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("found.*.json"))]


def assert_healthy(found: dict[str, Any], least: int = 10) -> None:
    """So many events or more changed what they were meant to, and the module has the sizes that the record says."""
    assert len(found["events"]) >= least
    assert all(changes and skipped is None for _, changes, skipped in found["events"])
    assert found["layers"] == list(found["sizes"].values())
    assert found["finite"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Two processes that run every variant, those that end with an error last."""
    ranks = launch(
        tmp_path_factory.mktemp("pair"), 2, "popen", *HEALTHY, "resumed", *FAILURES, "judged", "chains", *DISAGREEMENTS
    )
    assert len(ranks) == 2
    return ranks


@pytest.mark.parametrize("variant", HEALTHY)
def test_two_processes_train_one_network_in_every_kind_of_wrapper(variant: str, pair: Ranks) -> None:
    for rank in pair:
        assert rank[variant]["compared"] == 24
        assert_healthy(rank[variant], 5 if variant == "accumulated" else 10)
    assert pair[0][variant] == pair[1][variant]


def test_two_processes_resume_from_every_step_to_the_same_bits(pair: Ranks) -> None:
    """Batches for an event are gathered at some of these steps: those of both ranks are in the checkpoint."""
    for rank in pair:
        resumed = rank["resumed"]
        assert resumed["gathering"] >= 2
        assert resumed["again"] == [resumed["whole"]] * 3
    assert pair[0]["resumed"] == pair[1]["resumed"]


@pytest.mark.parametrize("variant", FAILURES)
def test_an_event_that_fails_on_one_rank_is_skipped_on_both(variant: str, pair: Ranks) -> None:
    for rank, message in zip(pair, FAILURES[variant], strict=True):
        found = rank[variant]
        assert found["compared"] == 24
        assert [(changes, skipped) for _, changes, skipped in found["events"] if skipped] == [(0, message)]
        assert len(found["events"]) >= 10
    assert pair[0][variant]["shapes"] == pair[1][variant]["shapes"]


def test_cuts_are_judged_and_taken_back_on_every_process(pair: Ranks) -> None:
    for rank in pair:
        found = rank["judged"]
        assert found["compared"] == 24
        kinds = [(changes > 0, skipped) for _, changes, skipped in found["events"]]
        assert kinds == [(True, None)] * 3, "a cut, a cut, taken back"
        assert found["layers"] == list(found["sizes"].values())
    assert pair[0]["judged"] == pair[1]["judged"]


def test_layers_become_chains_and_whole_again_on_every_process(pair: Ranks) -> None:
    for rank in pair:
        found = rank["chains"]
        assert found["compared"] == 24
        assert len(found["events"]) >= 10
        assert all(skipped is None for _, _, skipped in found["events"])
        assert found["changes"] == ["factorized", "to and fro", "whole again"]
        assert found["finite"]
    assert pair[0]["chains"] == pair[1]["chains"]


@pytest.mark.parametrize("variant", DISAGREEMENTS)
def test_ranks_that_disagree_stop_with_a_clear_error(variant: str, pair: Ranks) -> None:
    for rank in pair:
        assert "on all 2 processes, got rank 0: " in rank[variant]["error"]
        assert "the run stops" in rank[variant]["error"]


@pytest.mark.long
def test_four_processes_train_one_network(tmp_path: Path) -> None:
    ranks = launch(tmp_path, 4, "popen", "plain", "unused", "static")
    assert len(ranks) == 4
    for found in ranks:
        for variant in ("plain", "unused", "static"):
            assert found[variant]["compared"] == 24
            assert_healthy(found[variant])
        assert found == ranks[0]


@pytest.mark.parametrize(
    ("devices", "variants"),
    [
        (2, ("plain",)),
        pytest.param(2, ("unused", "static"), marks=pytest.mark.long),
        pytest.param(4, ("plain",), marks=pytest.mark.long),
    ],
)
def test_spawned_processes_hand_weights_and_events_back(
    devices: int, variants: tuple[str, ...], tmp_path: Path
) -> None:
    """The main process, whose module never trained, ends with the trained widths, and its callback with the events.

    That weights are the same after every step is asserted in the spawned processes, an error of which ends the run.
    """
    (found,) = launch(tmp_path, devices, "spawn", *variants)
    for variant in variants:
        assert_healthy(found[variant])


class Scripted:
    """One rank of two, played: the other one's part is known beforehand."""

    def __init__(self, rank: int, other: Callable[[Any], Any]) -> None:
        self.rank, self.size, self.other = rank, 2, other

    def all_gather(self, value: Any) -> list[Any]:
        found = [value, self.other(value)]
        return found if self.rank == 0 else found[::-1]

    def gather(self, value: Any) -> list[Any]:
        return self.all_gather(value) if self.rank == 0 else []

    def broadcast(self, value: Any) -> Any:
        return value if self.rank == 0 else self.other(value)


def test_rank_0_measures_on_a_share_of_everybodys_batches() -> None:
    whole = [torch.zeros(10, 3), {"x": torch.zeros(5), "flag": True}]
    mine = [share_of(batch, ranks=2) for batch in whole]
    theirs = [torch.ones(5, 3), {"x": torch.ones(3), "flag": True}]
    everyone = gather_batches(Scripted(0, lambda value: value and theirs), mine)
    assert mine[0].untyped_storage().nbytes() == mine[0].numel() * 4
    assert [len(everyone[0]), len(everyone[1]["x"]), float(everyone[2].sum())] == [5, 3, 15.0]
    assert gather_batches(Scripted(1, lambda value: value and mine), theirs) == []
    assert gather_batches(SingleProcess(), mine)[0] is mine[0]
    assert len(gather_batches(Scripted(0, lambda value: value if value is None else theirs), [])) == 2


def test_what_one_rank_decides_or_fails_at_holds_for_all() -> None:
    assert run_on_rank_0(Scripted(0, lambda value: None), lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        run_on_rank_0(Scripted(0, lambda value: None), lambda: 1 // 0)
    with pytest.raises(EvolveNetError, match="rank 0: ZeroDivisionError: no"):
        run_on_rank_0(Scripted(1, lambda value: (None, "ZeroDivisionError: no")), lambda: 7)
    assert run_on_all_ranks(Scripted(0, lambda value: None), lambda: 7) == 7
    with pytest.raises(EvolveNetError, match="rank 1: ValueError: no"):
        run_on_all_ranks(Scripted(0, lambda value: "ValueError: no"), lambda: 7)
    with pytest.raises(ZeroDivisionError):
        run_on_all_ranks(Scripted(0, lambda value: None), lambda: 1 // 0)
    with pytest.raises(TraceError, match="rank 1: TraceError: no"):
        run_on_all_ranks(Scripted(0, lambda value: "TraceError: no"), lambda: 7)


def test_disagreement_names_who_has_what() -> None:
    check_agreement(Scripted(0, lambda value: value), "widths", "a")
    with pytest.raises(RankMismatchError, match="same widths on all 2 processes, got rank 0: a; rank 1: b"):
        check_agreement(Scripted(0, lambda value: "b"), "widths", "a")


@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_another_rank_gets_rank_0s_values(case: Any) -> None:
    """Sent as plain maps and values, put into that rank's own model."""
    model, replica = case.model(seed=1), case.model(seed=1)
    graph = trace(model, case.inputs())
    sizes = {width.name: max(width.smallest, width.size - 1) for width in graph.resizable}
    surgery = plan_prune(model, graph, sizes)
    sent: list[Any] = []

    def keep(value: Any) -> Any:
        sent.append(value)
        return value

    group = Scripted(0, keep)
    group.broadcast = keep  # type: ignore[method-assign]
    assert broadcast_surgery(group, model, graph, lambda: surgery) is surgery
    theirs = broadcast_surgery(Scripted(1, lambda value: value and sent[0]), replica, graph, lambda: surgery)
    install(model, surgery)
    install(replica, theirs)
    assert fingerprint(model) == fingerprint(replica)
    assert theirs.graph == surgery.graph
    assert trace(replica, case.inputs()).sizes == theirs.graph.sizes


def test_another_rank_gets_the_units_of_each_layer_of_an_lstm() -> None:
    """Of a width with parts, in which the layers keep other units."""
    torch.manual_seed(0)
    model = nn.LSTM(3, 6, 2, batch_first=True)
    replica, x = copy.deepcopy(model), torch.randn(4, 5, 3)
    sent: list[Any] = []

    def keep(value: Any) -> Any:
        sent.append(value)
        return value

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x)[0].square().sum()

    graph = trace(model, Step(loss, x))
    (name,) = graph.sizes
    orders = IndexMap.of_parts([[0, 2, 5], [4, 3, 1]], 6)
    surgery = compile_surgery(model, graph, {name: orders})
    group = Scripted(0, keep)
    group.broadcast = keep  # type: ignore[method-assign]
    assert broadcast_surgery(group, model, graph, lambda: surgery) is surgery
    plain = pickle.loads(pickle.dumps(sent[0]))
    theirs = broadcast_surgery(Scripted(1, lambda value: value and plain), replica, graph, lambda: surgery)
    assert theirs.maps == {name: orders}
    assert theirs.graph == surgery.graph
    install(model, surgery)
    install(replica, theirs)
    assert fingerprint(model) == fingerprint(replica)


def test_another_rank_gets_the_rotation_of_a_rank_for_its_optimizer() -> None:
    model, replica = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    sent: list[Any] = []

    def keep(value: Any) -> Any:
        sent.append(value)
        return value

    for each in (model, replica):
        evolvenet.factorize(each, {"0": 3})
    graph = trace(model, torch.zeros(1, 8))
    surgery = plan_prune(model, graph, {"0.0": 2})
    group = Scripted(0, keep)
    group.broadcast = keep  # type: ignore[method-assign]
    assert broadcast_surgery(group, model, graph, lambda: surgery) is surgery
    theirs = broadcast_surgery(Scripted(1, lambda value: value and sent[0]), replica, graph, lambda: surgery)
    for one, two in zip(surgery.changes, theirs.changes, strict=True):
        assert torch.equal(one.value, two.value)
        assert list(one.bases) == list(two.bases)
        assert all(torch.equal(one.bases[dim].gradients, two.bases[dim].gradients) for dim in one.bases)
    assert theirs.changes[0].bases


def test_spawned_runs_without_evolution_are_left_alone() -> None:
    """Their processes may never have imported what is wrapped here, so nothing of ours comes back from them."""
    other = SimpleNamespace(callbacks=[lightning.Callback()])
    wrapped = _with_states(lambda self, trainer: {"metrics": b""})
    assert wrapped(None, other) == {"metrics": b""}
    seen: list[Any] = []
    _reshaping(lambda self, output, trainer: seen.append(output))(None, SimpleNamespace(extra={"metrics": b""}), other)
    assert len(seen) == 1
    evolving = SimpleNamespace(callbacks=[WidthEvolution(Fixed({}))])
    assert wrapped(None, evolving).keys() == {"metrics", EXTRA}


def test_a_fingerprint_changes_with_any_bit() -> None:
    model = nn.Linear(3, 2)
    before = fingerprint(model)
    model.weight.data[0, 0] = torch.nextafter(model.weight.data[0, 0], torch.tensor(9.0))
    assert fingerprint(model) != before
    model.weight.data[0, 0] = torch.nextafter(model.weight.data[0, 0], torch.tensor(-9.0))
    assert fingerprint(model) == before
    model.weight.data[:, :2] = model.weight.data[:, :2].flip(1)
    assert fingerprint(model) != before
    assert fingerprint(nn.Linear(3, 2).bfloat16()) != before
