"""What an event computes once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from evolvenet.engine import event_data
from evolvenet.engine.event_data import EventData
from evolvenet.measurement.past_events import PastEvents
from evolvenet.pruning.recording import record
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import convnet, images, mlp


def planned(model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], int]:
    """The values of a cut to two thirds, and in how many runs of their own outputs were recorded."""
    graph = trace(model, batches[0][:2])
    data, runs = EventData(model, graph, batches[0][:2], batches, (), PastEvents(), None, 0), list[Any]()
    with monkeypatch.context() as patched:
        patched.setattr(event_data, "record", lambda *given: runs.append(given) or record(*given))
        surgery = data.plan_pruning({width.name: -(-2 * width.size // 3) for width in graph.resizable})
    return {change.name: change.value for change in surgery.changes}, len(runs)


def normed() -> nn.Module:
    """Layers with weight norm: the last one is fitted, and its direction is no weight of its own."""
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), weight_norm(nn.Linear(12, 12)), nn.ReLU(), weight_norm(nn.Linear(12, 3))
    ).double()


@pytest.mark.parametrize("name", ["mlp", "convnet", "normed"])
def test_outputs_are_recorded_in_the_run_for_the_statistics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = {"mlp": lambda: mlp(6, 24, 24, 3), "convnet": convnet, "normed": normed}[name]()
    batches = [images(256) if name == "convnet" else torch.randn(256, 6, dtype=torch.float64) for _ in range(2)]
    found, runs = planned(model, batches, monkeypatch)
    assert runs == 0
    monkeypatch.setattr(EventData, "outputs", None)
    expected, runs = planned(model, batches, monkeypatch)
    assert runs == 1
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_of_its_own_records_outputs_on_joined_batches_and_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, wide = mlp(6, 24, 24, 3), [torch.randn(256, 6, dtype=torch.float64)]
    assert planned(model, [torch.randn(64, 6, dtype=torch.float64) for _ in range(2)], monkeypatch)[1] == 1
    monkeypatch.setattr(event_data, "KEPT", 1000)
    assert planned(model, wide, monkeypatch)[1] == 1
