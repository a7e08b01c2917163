"""What an event computes once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from evolvenet.engine import event_data
from evolvenet.engine.decision import decide
from evolvenet.engine.event_data import EventData
from evolvenet.measurement.past_events import PastEvents
from evolvenet.policies.base import PolicyContext, Proposal
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
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


def test_outputs_count_in_bytes_of_their_type_and_are_recorded_for_cuts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(6, 24, 24, 3), torch.randn(256, 6, dtype=torch.float64)
    graph = trace(model, x[:2])
    data = lambda model, x: EventData(model, graph, x[:2], [x], (), PastEvents(), None, 0)  # noqa: E731
    for sizes, recorded in (({"0": 30}, False), ({"0": 24, "unknown": 3}, False), ({"0": 30, "2": 12}, True)):
        event = data(model, x)
        event.expect(sizes)
        assert event.moments
        assert (event.outputs is not None) == recorded
        event.expect({"0": 30})
        assert event.outputs is None
    event = data(model, x)
    assert event.outputs is not None
    assert event.moments
    size = sum(target.outputs.nbytes for targets in event.outputs.targets.values() for target in targets)
    rows = TRAINING_LIMITS.rows_for(24)
    assert size == 8 * (24 + 3) * min(256, rows)
    monkeypatch.setattr(event_data, "KEPT", 4 * (24 + 3) * rows)
    assert data(model, x).outputs is None
    assert data(model.float(), x.float()).outputs is not None


class OneMore:
    """Grows a width at each event; looks at the statistics before or not."""

    def __init__(self, looks: bool) -> None:
        self.looks = looks

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        assert not self.looks or context.statistics
        return {"0": Proposal(context.graph.widths["0"].size + 1, "one more")}


@pytest.mark.parametrize("looks", [False, True])
def test_an_event_that_only_grows_keeps_no_outputs(looks: bool) -> None:
    model, x = mlp(6, 8, 3), torch.randn(256, 6, dtype=torch.float64)
    graph = trace(model, x[:2])
    event = EventData(model, graph, x[:2], [x], (), PastEvents(), None, 0)
    decide(OneMore(looks), event, graph.sizes, None)
    assert event.outputs is None
