"""Removals of blocks at events: no more than a budget needs, none before `start`, and what failures and judgements leave."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.engine.distributed import process_group
from evolvenet.engine.failure_policy import FailurePolicy
from evolvenet.errors import stage


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


X: Tensor = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).double()


def network(blocks: int = 6, scale: float = 1e-4) -> Any:
    """Every block adds next to nothing; each has 110 parameters."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(blocks)), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for block in model[1:-1]:
            block.down.weight.mul_(scale)
            block.down.bias.zero_()
    return model


def run(policy: Any, model: Any) -> evolvenet.Evolver:
    evolver = evolvenet.Evolver(model, torch.optim.AdamW(model.parameters(), lr=1e-3), policy, X)
    evolver.observe(X)
    return evolver


def count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize(("share", "gone"), [(0.95, 1), (0.6, 3), (2.0, 0)])
def test_a_budget_removes_no_more_blocks_than_it_needs(kind: str, share: float, gone: int) -> None:
    model = network()
    whole = run(evolvenet.Threshold(), model).history.initial
    cost: Any = {kind: (whole.parameters if kind == "params" else whole.macs) * share}
    for policy in (
        budget := evolvenet.Budget(**cost, by=0.0, depth=True, growth=0.0),
        evolvenet.Front(points=[budget]),
    ):
        assert len(run(policy, network()).step(progress=0.5).removed_blocks) == gone


def test_before_the_start_a_threshold_leaves_even_blocks_that_add_nothing() -> None:
    evolver = run(evolvenet.Threshold(depth=True, start=0.25), network(2, scale=0.0))
    assert evolver.step(progress=0.1).removed_blocks == ()
    evolver.observe(X)
    assert len(evolver.step(progress=0.3).removed_blocks) == 2


def test_a_network_whose_blocks_came_back_is_saved_and_loaded_with_them(tmp_path: Path) -> None:
    policy = evolvenet.Tolerance(metric="acc", drop=0.0, validations=1, share=0.3, depth=True)
    model = network(2)
    evolver = run(policy, model)
    evolver.judge(0.9)
    assert evolver.step().removed_blocks
    event = evolver.judge(0.1)
    assert event is not None
    assert event.restored_blocks
    evolvenet.save(model, tmp_path / "back.pt")
    assert torch.equal(evolvenet.load(network(2), tmp_path / "back.pt")(X), model(X))
    evolver.observe(X)
    assert evolver.step().changes
    evolvenet.save(model, tmp_path / "cut.pt")
    assert torch.equal(evolvenet.load(network(2), tmp_path / "cut.pt")(X), model(X))


def test_a_removal_that_fails_again_is_switched_off_while_widths_go_on_changing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no trace")

    monkeypatch.setattr("evolvenet.engine.evolver_cuts.trace_for_training", fail)
    evolver = run(evolvenet.Threshold(depth=True, prune=0.3), network(2))
    caplog.set_level(logging.WARNING)
    for progress in (0.4, 0.5, 0.6):
        evolver.observe(X)
        event = evolver.step(progress=progress)
        assert (event.skipped, event.removed_blocks) == (None, ())
        again = run(evolvenet.Threshold(depth=True, prune=0.3), evolver.model)
        again.load_state_dict(evolver.state_dict())
        assert again._failures.may_remove_blocks == (progress < 0.5)
    assert evolver.off is None
    found = [each.getMessage() for each in caplog.records if "blocks are left as they are" in each.getMessage()]
    assert [" for the rest of the run" in each for each in found] == [False, True]


def test_failed_removals_do_not_count_as_failures_of_widths() -> None:
    policy, group = FailurePolicy(), process_group()
    with pytest.raises(RuntimeError) as caught, stage("surgery"):
        raise RuntimeError("no room")
    for moment in (1, 2):
        policy.explain_blocks(group, moment, caught.value)
    assert not policy.may_remove_blocks
    policy.explain(group, 3, caught.value)
    assert policy.off is None, "the first failure of widths"


def test_a_removal_whose_cost_cannot_be_counted_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    evolver = run(evolvenet.Threshold(depth=True, prune=1e-3), model := network(2))
    size, graph, cost = count(model), evolver.graph, evolver.history.latest.macs

    def fail(*_: Any) -> Any:
        raise RuntimeError("no count")

    monkeypatch.setattr("evolvenet.engine.evolver_cuts.macs", fail)
    with pytest.raises(RuntimeError, match="no count"):
        evolver.remove_blocks(share=0.01)
    assert (count(model), evolver.graph, evolver._macs) == (size, graph, cost)


def test_a_cut_is_judged_on_all_ranks_or_on_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        """Another process has switched evolution off."""

        rank, size = 0, 2

        def broadcast(self, value: Any) -> Any:
            return value

        def all_gather(self, value: Any) -> list[Any]:
            return [value, "off there"]

    policy = evolvenet.Tolerance(metric="acc", drop=0.0, validations=1, share=0.3, depth=True)
    evolver = run(policy, network(2))
    monkeypatch.setattr("evolvenet.engine.evolver_cuts.process_group", Two)
    assert evolver.judge(0.9) is None
    assert evolver.off == "off there"
