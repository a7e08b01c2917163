"""The engine in a plain loop: events, the record, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from evolvenet import EvolveNetError, Evolver, History, IndexMap, Threshold, TraceError, resize, trace
from evolvenet.policies.base import PolicyContext, Proposal
from tests.helpers.policies import Fixed
from tests.helpers.stages import failing


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def batch() -> torch.Tensor:
    return torch.randn(64, 6, dtype=torch.float64)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, evolver: Evolver, steps: int) -> None:
    for _ in range(steps):
        inputs = batch()
        evolver.observe(inputs)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def test_a_plain_loop_shrinks_and_grows_and_goes_on() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    evolver = Evolver(model, optimizer, Fixed({"0": 5, "2": 14}), batch()[:1])
    train(model, optimizer, evolver, 3)
    kept = {id(parameter) for parameter in model.parameters()}
    event = evolver.step(at=3)
    assert [(c.width, c.before, c.after, c.reason) for c in event.changes] == [
        ("0", 12, 5, "fixed"),
        ("2", 10, 14, "fixed"),
    ]
    assert event.sizes == {"0": 5, "2": 14} == evolver.graph.sizes
    assert event.parameters == sum(p.numel() for p in model.parameters()) != event.parameters_before
    assert event.macs == 6 * 5 + 5 * 14 + 14 * 3
    assert {id(parameter) for parameter in model.parameters()} == kept
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    train(model, optimizer, evolver, 3)
    assert trace(model, batch()[:1]).sizes == event.sizes


def test_the_policy_is_told_what_happened_before() -> None:
    model = network()
    policy = Fixed({"0": 5, "2": 14})
    evolver = Evolver(model, None, policy, batch()[:1])
    evolver.observe(batch())
    evolver.step()
    evolver.step()
    evolver.step()
    first, second, third = policy.seen
    assert first["0"].last_change == 0
    assert first["0"].events_since_change > 1000
    assert (second["0"].events_since_change, second["0"].last_change, second["2"].last_change) == (1, -7, 4)
    assert third["0"].events_since_change == 2
    assert len(second["0"].spectrum) == 5


def test_growth_keeps_the_outputs() -> None:
    model = network()
    evolver = Evolver(model, None, Fixed({"0": 20, "2": 13}), batch()[:1])
    inputs = batch()
    before = model(inputs)
    evolver.observe(inputs)
    evolver.step()
    torch.testing.assert_close(model(inputs), before, rtol=1e-9, atol=1e-12)


def test_an_event_leaves_the_global_random_numbers_alone() -> None:
    evolver = Evolver(network(), None, Fixed({"0": 20}), batch()[:1])
    evolver.observe(batch())
    state = torch.random.get_rng_state()
    evolver.step()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nan_weights_skip_the_event_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    evolver = Evolver(model, None, Fixed({"0": 5}), batch()[:1])
    evolver.observe(batch())
    model.get_parameter("2.weight").data[0, 0] = float("nan")
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        event = evolver.step(at=7)
    assert event.changes == ()
    assert event.skipped is not None
    assert "2.weight" in event.skipped
    assert "step 7" in caplog.text
    assert event.sizes["0"] == 12
    model.get_parameter("2.weight").data[0, 0] = 0.0
    assert evolver.step(at=8).sizes["0"] == 5


def test_a_failing_surgery_skips_the_event_and_changes_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    evolver = Evolver(model, optimizer, Fixed({"0": 5}), batch()[:1])
    train(model, optimizer, evolver, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momenta = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}

    with failing("optimizer state check", at=2):
        event = evolver.step()
    assert event.skipped == "optimizer state check failed: boom"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], momenta[p]) for p in model.parameters())
    assert model[0].out_features == 12


def test_no_observed_batch_skips_the_event() -> None:
    event = Evolver(network(), None, Fixed({"0": 5}), batch()[:1]).step()
    assert event.skipped is not None
    assert "observe" in event.skipped


def test_targets_behind_the_inputs_are_ignored() -> None:
    evolver = Evolver(network(), None, Fixed({"0": 5}), batch()[:1])
    evolver.observe((batch(), torch.zeros(64)))
    assert evolver.step().skipped is None


def test_a_model_without_a_resizable_width_is_refused_with_the_reasons() -> None:
    with pytest.raises(TraceError, match=r"without any .*model's output"):
        Evolver(nn.Linear(4, 2), None, Threshold(prune=0.01, grow=0.9), torch.zeros(1, 4))


def test_the_record_survives_json_and_the_state_a_checkpoint(tmp_path: Path) -> None:
    model = network()
    evolver = Evolver(model, None, Fixed({"0": 5}), batch()[:1])
    evolver.observe(batch())
    evolver.step()
    again = History.from_dict(json.loads(json.dumps(evolver.history.to_dict())))
    assert again == evolver.history
    copy = network()
    resize(copy, trace(copy, batch()[:1]), {"0": IndexMap.keep(range(5), 12)})
    other = Evolver(copy, None, Fixed({"0": 5}), batch()[:1])
    file = tmp_path / "state.pt"
    torch.save(evolver.state_dict(), file)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.history == evolver.history
    assert other.graph == evolver.graph
    mine, theirs = evolver.state_dict(), other.state_dict()
    assert torch.equal(mine.pop("batches")[0][0], theirs.pop("batches")[0][0])
    assert mine == theirs


def test_several_optimizers_are_carried() -> None:
    model = network()
    first = torch.optim.Adam(model[0].parameters())
    second = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1, momentum=0.9)
    evolver = Evolver(model, [first, second], Fixed({"0": 5}), batch()[:1])
    evolver.observe(batch())
    model(batch()).sum().backward()
    first.step()
    second.step()
    evolver.step()
    assert first.state[model.get_parameter("0.weight")]["exp_avg"].shape == (5, 6)
    assert second.state[model.get_parameter("2.weight")]["momentum_buffer"].shape == (10, 5)


def test_errors_share_one_base() -> None:
    with pytest.raises(EvolveNetError):
        Threshold(prune=1.1)


def test_one_optimizer_may_be_given_bare() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(batch()).sum().backward()
    optimizer.step()
    resize(model, trace(model, batch()[:1]), {"0": IndexMap.keep(range(5), 12)}, optimizers=optimizer)
    assert optimizer.state[model.get_parameter("0.weight")]["momentum_buffer"].shape == (5, 6)


def test_a_growth_that_is_pruned_again_is_tried_later_and_later() -> None:
    """What the evolver tells the policy of reversals, in a run where nothing that grows comes to carry anything."""

    class Flaps:
        def __init__(self) -> None:
            self.reversals: list[int] = []

        def propose(self, context: PolicyContext) -> dict[str, Proposal]:
            measure = context.statistics["0"]
            self.reversals.append(measure.reversals)
            return {"0": Proposal(14 if measure.size == 12 else 12, "to and fro")}

    model, policy = network(), Flaps()
    evolver = Evolver(model, None, policy, batch()[:1])
    for _ in range(5):
        evolver.observe(batch())
        evolver.step()
    assert policy.reversals == [0, 0, 1, 2, 3]
    other = Evolver(network(), None, Flaps(), batch()[:1])
    resize(other.model, other.graph, {"0": IndexMap.grow(12, 2)})
    other.load_state_dict(evolver.state_dict())
    other.observe(batch())
    other.step()
    assert other.policy.reversals == [4]  # type: ignore[union-attr]


def test_a_width_that_sees_too_little_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """It stays as it is, which nobody would notice otherwise."""
    model = nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 3)
    ).double()
    evolver = Evolver(model, None, Threshold(prune=0.9, grow=1.0), batch()[:1, None])
    for _ in range(3):
        evolver.observe(batch()[:15, None])
        assert evolver.step().skipped is None
        evolver.forget()
    told = [record.message for record in caplog.records if "places" in record.message]
    assert len(told) == 1
    assert "got 15 for the 40 of 3. Observe more" in told[0]
    assert evolver.graph.sizes["3"] == 40


def test_a_policy_is_given_the_time_of_the_event_before_in_the_same_run() -> None:
    """A second fit begins at 0 again; without a share of the run no time is known."""

    class Watch:
        def __init__(self) -> None:
            self.seen: list[tuple[float, float | None]] = []

        def propose(self, context: PolicyContext) -> dict[str, Proposal]:
            self.seen.append((context.progress, context.previous))
            return {}

    evolver = Evolver(network(), None, policy := Watch(), batch()[:1])
    evolver.observe(batch())
    for progress in (0.2, 0.7, 0.1, 0.3, None):
        assert evolver.step(progress=progress).skipped is None
    assert policy.seen == [(0.2, 0.0), (0.7, 0.2), (0.1, 0.0), (0.3, 0.1), (1.0, None)]
