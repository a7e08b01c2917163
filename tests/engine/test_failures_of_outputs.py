"""Validations that fail by the outputs alone: the widths of the event are named, and bisected to the one at fault."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet import Evolver, Tolerance
from evolvenet.engine import invariants
from evolvenet.policies.base import PolicyContext, Proposal
from tests.helpers.policies import Fixed

NAMES = ["0", "2", "4", "6", "8"]
FEWER = dict.fromkeys(NAMES, 9)


class Judged(Tolerance):
    """Judges a cut that is given."""

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        return Fixed(FEWER).propose(context)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before in (6, 12, 12, 12, 12):
        layers += [nn.Linear(before, 12), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(12, 3))


def fails_where(patch: pytest.MonkeyPatch, is_wrong: Callable[[set[str]], bool], raises: bool = False) -> None:
    """Outputs become NaN where these widths have shrunk."""
    inner = invariants.model_outputs

    def outputs(model: Any, *args: Any) -> Any:
        found = inner(model, *args)
        if is_wrong({name for name in NAMES if model[int(name)].out_features < 12}):
            if raises:
                raise ZeroDivisionError("boom")
            return [torch.full_like(each, torch.nan) for each in found]
        return found

    patch.setattr(invariants, "model_outputs", outputs)


def evolver_of(model: nn.Module) -> Evolver:
    evolver = Evolver(model, torch.optim.Adam(model.parameters()), Fixed(FEWER), torch.zeros(1, 6))
    observe(evolver)
    return evolver


def observe(evolver: Evolver) -> None:
    evolver.observe(torch.randn(256, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("bad", [{"0"}, {"8"}, {"4"}, {"2", "6"}])
@pytest.mark.parametrize("raises", [False, True])
def test_the_widths_at_fault_rest_for_the_run_and_all_others_change_in_the_same_event(
    bad: set[str], raises: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails_where(monkeypatch, lambda changed: bool(changed & bad), raises)
    model = network()
    evolver = evolver_of(model)
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        event = evolver.step()
    assert event.skipped is None
    assert {change.width for change in event.changes} == set(NAMES) - bad
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(bad)
    for name in bad:
        assert any(f"{name} rests for the rest of the run while other widths change" in each for each in messages)
        assert ("boom" if raises else "finite outputs") in evolver.graph.reasons[name]
    assert set(evolver.graph.reasons) & set(NAMES) == bad
    assert evolver.off is None


def test_where_the_outputs_are_wrong_with_two_together_one_changes_and_the_others_in_a_later_event(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails_where(monkeypatch, lambda changed: {"2", "6"} <= changed and not is_later)
    is_later = False
    model = network()
    evolver = evolver_of(model)
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        event = evolver.step()
    assert event.skipped is None
    (change,) = event.changes
    (warning,) = [record.message for record in caplog.records]
    assert f"after a change of 0, 2, 4, 6, 8; {change.width} alone can change" in warning
    assert not set(evolver.graph.reasons) & set(NAMES)
    is_later = True
    observe(evolver)
    assert {change.width for change in evolver.step().changes} == set(NAMES) - {change.width}


def test_where_every_change_fails_the_event_is_skipped_and_all_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_where(monkeypatch, bool)
    model = network()
    evolver = evolver_of(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    event = evolver.step()
    assert event.changes == ()
    assert "finite outputs" in str(event.skipped)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert not set(evolver.graph.reasons) & set(NAMES)


def test_a_repetition_that_is_taken_back_leaves_no_cut_to_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_where(monkeypatch, lambda changed: "8" in changed)
    model = network()
    policy = Judged(metric="loss", drop=0.1, mode="min", validations=1)
    evolver = Evolver(model, torch.optim.Adam(model.parameters()), policy, torch.zeros(1, 6))
    evolver.judge(1.0)
    observe(evolver)
    assert {change.width for change in evolver.step().changes} == set(NAMES) - {"8"}
    taken_back = evolver.judge(9.0)
    assert taken_back is not None
    assert {change.width for change in taken_back.changes} == set(NAMES) - {"8"}
    assert {layer.out_features for layer in model if isinstance(layer, nn.Linear)} == {12, 3}
