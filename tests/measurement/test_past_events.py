"""Averages over events, and the number of batches that an event measures on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evolvenet import Evolver, Threshold, WidthEvolution, trace
from evolvenet.measurement.calibration import LEAST, batches_needed, places_per_sample
from evolvenet.measurement.past_events import PastEvents
from evolvenet.measurement.running_energies import TIME, RunningEnergies


@given(st.integers(1, 40))
def test_the_average_over_a_span_does_not_depend_on_the_number_of_events(events: int) -> None:
    """After a step of the energies the average is as far as the time constant says, in one event or in many."""
    known = RunningEnergies().updated({"0": [4.0, 1.0]}, 0.5)
    for event in range(1, events + 1):
        known = known.updated({"0": [1.0, 0.25]}, 0.5 + TIME * event / events)
    expected = math.exp(math.log(4) * math.exp(-1))
    assert known.known["0"][1] == pytest.approx([expected, expected / 4])


def test_averages_follow_a_width_through_its_changes() -> None:
    known = RunningEnergies().updated({"0": [4.0, 2.0, 1.0]}, 0.5)
    pruned = known.updated({"0": [4.0, 2.0]}, 0.6).known["0"][1]
    assert pruned == pytest.approx([4.0, 2.0])
    grown = RunningEnergies({"0": (0.6, pruned)}).updated({"0": [4.0, 2.0, 0.5]}, 0.7).known["0"][1]
    assert grown == pytest.approx([4.0, 2.0, 0.5])


def test_past_events_go_through_a_checkpoint() -> None:
    past = PastEvents().next(0.25).with_energies({"0": (0.5, 0.25)}).changed_by({"0": 3}, {"0": 2})
    assert PastEvents.from_state_dict(past.state_dict()) == past


@pytest.mark.parametrize(("batch", "needed"), [(64, 8), (512, LEAST), (1, 512)])
def test_as_many_batches_are_gathered_as_the_widest_layer_needs(batch: int, needed: int) -> None:
    """The dense layer takes in one place a sample, each convolution has many."""
    model = nn.Sequential(
        nn.Conv2d(1, 600, 3), nn.ReLU(), nn.Conv2d(600, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 256), nn.Linear(256, 10)
    )
    inputs = torch.randn(2, 1, 8, 8)
    graph = trace(model, inputs)
    places = places_per_sample(model, graph, inputs)
    assert places == {"0": 36.0, "2": 16.0, "4": 1.0}
    assert batches_needed(graph, places, torch.zeros(batch, 1, 8, 8)) == needed
    assert batches_needed(graph, places, torch.zeros(64, 1, 8, 8), epoch=60) == 6


def test_an_evolver_gathers_what_its_widest_layer_needs_unless_it_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 2))
    for given_number, kept in ((None, 8), (3, 3)):
        evolver = Evolver(model, None, Threshold(), torch.zeros(1, 4), given_number)
        for _ in range(20):
            evolver.observe(torch.randn(32, 4))
        assert evolver.observed == kept
        resumed = Evolver(model, None, Threshold(), torch.zeros(1, 4), given_number)
        resumed.load_state_dict(evolver.state_dict())
        assert resumed.calibration_batches == evolver.calibration_batches == kept
    assert WidthEvolution(Threshold()).calibration_batches is None


def test_a_width_is_pruned_although_there_are_fewer_samples_than_units() -> None:
    """Of 256 units 248 are copies of eight; 64 samples show it, at a threshold above what they leave uncertain."""
    torch.manual_seed(0)
    model = nn.Sequential(first := nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 2))
    with torch.no_grad():
        first.weight[8:] = first.weight[:8].repeat(31, 1)
        first.bias[8:] = first.bias[:8].repeat(31)
    evolver = Evolver(model, None, Threshold(prune=0.15), torch.zeros(1, 4), 1)
    for _ in range(6):
        evolver.observe(torch.randn(64, 4))
        assert evolver.step().skipped is None
        evolver.forget()
    assert 8 <= evolver.graph.sizes["0"] <= 32
