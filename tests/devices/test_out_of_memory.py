"""Memory that runs out says nothing about a network: an event is put off, no width is frozen, nothing grows, no rank waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet import Budget, Threshold, WidthEvolution
from evolvenet.engine import distributed
from evolvenet.engine.distributed import broadcast_surgery, gather_batches
from evolvenet.errors import EvolveNetError, TraceError, is_out_of_memory
from evolvenet.growth import loss_test
from evolvenet.pruning.selection import plan_prune
from evolvenet.tracing import numeric_proof
from tests.helpers.runs import Batches, batch, fresh, trainer
from tests.helpers.stages import failing

ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("CUDA error: out of memory"),
          MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]  # fmt: skip
STAGES = [
    "statistics",
    "spectra",
    "unit selection",
    "reconstruction",
    "policy",
    "tensor exchange",
    "surgery",
    "validation",
]


def evolver_of(policy: Any) -> tuple[evolvenet.Evolver, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    return evolvenet.Evolver(model, torch.optim.Adam(model.parameters()), policy, batch(0)[0][:2]), model


def step(evolver: evolvenet.Evolver, gradients: bool = False) -> evolvenet.Event:
    model: Any = evolver.model
    for index in range(3):
        x, y = batch(index, 64)
        outputs = model(x)
        outputs.retain_grad()
        nn.functional.cross_entropy(outputs, y).backward()
        evolver.observe(x, [outputs.grad] if gradients else ())
    return evolver.step()


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("stage", STAGES)
def test_events_are_skipped_as_often_as_that_happens_and_then_go_on(
    stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    evolver, _ = evolver_of(Budget(params=300))
    for _ in range(3):
        with failing(stage, error=torch.OutOfMemoryError):
            event = step(evolver)
        assert event.skipped is not None
        assert not event.changes
    assert evolver.off is None
    assert "widths are left as they are" in caplog.text
    assert len(evolver.graph.resizable) == 2
    event = step(evolver)
    assert event.skipped is None
    assert event.changes


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_loss_test_without_memory_is_no_leave_to_grow(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evolver, _ = evolver_of(Threshold(prune=0.0, grow=0.1))
    with monkeypatch.context() as patched:
        patched.setattr(loss_test._LossTest, "found", raising(error))
        event = step(evolver, gradients=True)
    assert event.skipped is not None
    assert "memory" in event.skipped.lower() or isinstance(error, MemoryError)
    assert not event.changes
    assert evolver.off is None


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_trial_of_the_trace_without_memory_freezes_nothing(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    runs = [numeric_proof.Comparison.run, raising(error)]
    calls = iter(runs[:1] + 9 * runs[1:])
    monkeypatch.setattr(numeric_proof.Comparison, "run", lambda *args: next(calls)(*args))
    with pytest.raises(TraceError, match="expected memory for a few runs") as caught:
        evolvenet.trace(model, torch.zeros(2, 6))
    assert is_out_of_memory(caught.value)


def test_a_fit_whose_network_cannot_be_traced_goes_on_without_events(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numeric_proof.Comparison, "run", raising(torch.OutOfMemoryError("CUDA out of memory")))
    evolving, model = WidthEvolution(Budget(params=300), every_n_steps=5), fresh()
    run = trainer(tmp_path, [evolving])
    run.fit(model, Batches())
    assert run.global_step == 24
    assert evolving.evolver is None


class Other:
    """A group of two as rank 0 or 1 meets it; what the other rank sends is scripted."""

    size = 2

    def __init__(self, rank: int, sent: list[Any]) -> None:
        self.rank, self.sent, self.calls = rank, sent, 0

    def _next(self) -> Any:
        self.calls += 1
        return self.sent.pop(0)

    def all_gather(self, value: Any) -> list[Any]:
        other = self._next()
        return [value, other] if self.rank == 0 else [other, value]

    def gather(self, value: Any) -> list[Any]:
        found = self.all_gather(value)
        return found if self.rank == 0 else []

    def broadcast(self, value: Any) -> Any:
        other = self._next()
        return value if self.rank == 0 else other


def test_ranks_meet_as_often_where_memory_runs_out_on_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = evolver_of(Budget(params=300))
    graph = evolvenet.trace(model, torch.zeros(2, 6))
    surgery = plan_prune(model, graph, {"0": 12})
    maps = {name: (each.indices, each.size) for name, each in surgery.maps.items()}
    plan = ((maps, surgery.bases, {change.name: change.value for change in surgery.changes}, False), None)
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "compile_surgery", raising(torch.OutOfMemoryError("CUDA out of memory")))
        failing_rank: Any = Other(1, [plan, None])
        with pytest.raises(torch.OutOfMemoryError):
            broadcast_surgery(failing_rank, model, graph, lambda: surgery)
    other_rank: Any = Other(0, [None, "OutOfMemoryError: CUDA out of memory"])
    with pytest.raises(EvolveNetError, match="rank 1: OutOfMemoryError") as caught:
        broadcast_surgery(other_rank, model, graph, lambda: surgery)
    assert is_out_of_memory(caught.value)
    assert (failing_rank.calls, other_rank.calls) == (2, 2)


def test_gathered_batches_that_do_not_fit_on_rank_0_are_given_up_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.zeros(4, 3)]
    other_rank: Any = Other(1, [None, None, "OutOfMemoryError: CUDA out of memory"])
    with pytest.raises(EvolveNetError, match="rank 0"):
        gather_batches(other_rank, x)
    monkeypatch.setattr(distributed, "to_device_of", raising(torch.OutOfMemoryError("CUDA out of memory")))
    rank_0: Any = Other(0, [None, x, None])
    with pytest.raises(torch.OutOfMemoryError):
        gather_batches(rank_0, x)
    assert (rank_0.calls, other_rank.calls) == (3, 3)


def test_what_runs_out_is_known_by_type_text_and_cause() -> None:
    assert all(map(is_out_of_memory, ERRORS))
    caused = EvolveNetError("boom")
    caused.__cause__ = ERRORS[1]
    assert is_out_of_memory(caused)
    assert not is_out_of_memory(ValueError("out of memory"))
