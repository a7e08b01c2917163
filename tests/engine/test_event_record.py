"""What an event leaves in the history for a report: spectra, the change of the outputs, and the seconds of its parts."""

import json

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet.engine.event_record import POINTS, predicted_change
from evolvenet.engine.history import History
from evolvenet.errors import stage, stage_times
from evolvenet.policies.base import Proposal


class Sizes:
    """Proposes given sizes."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def propose(self, context):
        assert context.statistics
        return {name.removeprefix("w"): Proposal(size, "asked for") for name, size in self.sizes.items()}


def run(policy, width=64, batches=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).double()
    x = [torch.randn(64, 6, dtype=torch.float64) for _ in range(batches)]
    evolver = evolvenet.Evolver(model, None, policy, x[0][:2])
    for each in x:
        evolver.observe(each)
    before = model(x[0]).detach()
    event = evolver.step()
    return evolver, event, before, model(x[0]).detach()


def test_the_measured_change_is_that_of_the_outputs():
    _, event, before, after = run(Sizes(w0=20))
    plain = (before - after).square().sum() / (before - before.mean(0)).square().sum()
    assert event.measured_change == pytest.approx(float(plain), rel=1e-9)
    assert 0 < (event.measured_change or 0) < (event.predicted_change or 0)


def test_a_growth_moves_nothing_and_is_predicted_to():
    _, event, _, _ = run(Sizes(w0=80))
    assert event.predicted_change == 0
    assert event.measured_change is not None
    assert event.measured_change < 1e-20


def test_without_a_change_nothing_is_compared():
    _, event, _, _ = run(Sizes())
    assert (event.predicted_change, event.measured_change) == (None, None)
    assert len(event.spectra["0"]) == POINTS


def test_the_spectra_are_those_that_the_policy_was_given():
    seen = {}

    class Watch(Sizes):
        def propose(self, context):
            seen.update(context.statistics)
            return super().propose(context)

    _, event, _, _ = run(Watch(w0=8), width=16)
    mean = sum(seen["0"].energies) / 16
    assert mean == pytest.approx(1 / 16, rel=0.5)
    assert event.spectra["0"] == pytest.approx([each * 16 for each in seen["0"].energies], rel=5e-3)
    assert event.predicted_change == predicted_change(seen, {"0": 8}) == sum(seen["0"].energies[8:])


def test_the_seconds_of_the_parts_add_up_to_less_than_the_event():
    _, event, _, _ = run(Sizes(w0=20))
    assert {"statistics", "reconstruction", "surgery", "validation", "output change"} <= set(event.stages)
    assert min(event.stages.values()) >= 0
    assert sum(event.stages.values()) <= event.seconds


def test_nested_stages_are_counted_once(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("evolvenet.errors.time.perf_counter", lambda: next(now))
    with stage_times() as seconds, stage("outer"), stage("inner"):
        pass
    assert seconds == {"outer": 7.0, "inner": 3.0}


def test_a_failed_stage_is_counted_and_leaves_the_measurement():
    with stage_times() as seconds:
        with pytest.raises(ValueError, match="no"), stage("outer"), stage("inner"):
            raise ValueError("no")
        with stage("outer"):
            pass
    assert list(seconds) == ["inner", "outer"]
    with stage("unmeasured"):
        pass
    assert "unmeasured" not in seconds


def test_records_of_before_are_read_and_new_ones_survive_json():
    evolver, event, _, _ = run(Sizes(w0=20))
    plain = json.loads(json.dumps(evolver.history.to_dict()))
    assert History.from_dict(plain).events == [event]
    for entry in (plain["initial"], *plain["events"]):
        for name in ("spectra", "predicted_change", "measured_change", "stages"):
            del entry[name]
    assert History.from_dict(plain).events[0].changes == event.changes
    assert History.from_dict(plain).events[0].spectra == {}


def test_outputs_that_cannot_be_compared_leave_the_event_as_it_is(monkeypatch):
    def failing(*unused):
        raise MemoryError

    monkeypatch.setattr("evolvenet.engine.event_record.outputs_on", failing)
    _, event, _, _ = run(Sizes(w0=20))
    assert event.skipped is None
    assert event.sizes["0"] == 20
    assert event.measured_change is None
