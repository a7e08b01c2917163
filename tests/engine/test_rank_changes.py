"""Layers become chains at events, and whole again: in the budget, in the optimizers and replicas, all or nothing."""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet import Budget, Evolver, Price, Tolerance, trace
from evolvenet.engine.invariants import ModelReference
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.measurement.cost import macs, parameters
from evolvenet.surgery.optimizer_state import validate_state
from tests.helpers.low_rank import convolutions, dense, images, vectors, without_names
from tests.helpers.policies import Fixed, FixedRanks
from tests.helpers.resuming import assert_same
from tests.helpers.stages import at_boundary, failing
from tests.helpers.states import State


class Loop:
    """A training loop on a fixed teacher, with an average of the weights that goes along."""

    def __init__(self, policy: Any, model: Any = None, make: Any = torch.optim.AdamW, **options: Any) -> None:
        self.model = dense() if model is None else model
        self.x = vectors() if isinstance(self.model[0], nn.Linear) else images()
        self.y = copy.deepcopy(self.model)(self.x).detach() * 1.1
        self.average = copy.deepcopy(self.model)
        parts = [
            {"params": [p for p in self.model.parameters() if (p.dim() > 1) == decays], "weight_decay": 0.01 * decays}
            for decays in (False, True)
        ]
        self.optimizer = make(parts, **{"lr": 1e-3, **options})
        self.rebuilt = 0
        self.evolver = Evolver(
            self.model, self.optimizer, policy, self.x[:2], copies=[self.average], after_change=self.rebuild
        )
        self.train()

    def rebuild(self) -> None:
        self.rebuilt += 1

    def train(self, steps: int = 2) -> None:
        for _ in range(steps):
            self.evolver.observe(self.x)
            self.optimizer.zero_grad()
            (self.model(self.x) - self.y).square().mean().backward()
            self.optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)

    def step(self, progress: float = 1.0) -> Any:
        event = self.evolver.step(progress=progress)
        assert event.skipped is None
        return event

    def states(self) -> tuple[State, State]:
        return State.of(self.model, [self.optimizer]), State.of(self.average)

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "average": dict(self.average.state_dict()),
                "state": self.optimizer.state_dict()["state"],
                "groups": [
                    [[name for name, p in self.model.named_parameters() if p is each] for each in group["params"]]
                    for group in self.optimizer.param_groups
                ],
            }
        )


def with_low_rank(model: Any) -> Any:
    """The model with little but three directions in the weights of its layers, turned so that no unit is small."""
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dim() > 1:
            u, s, v = torch.linalg.svd(weight.data.flatten(1), full_matrices=False)
            s[3:] *= 1e-2
            weight.data = (u @ torch.diag(s) @ v).reshape(weight.shape)
    return model


def chains(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, FactoredLayer)]


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("make", [dense, convolutions])
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_budget_with_ranks_is_reached_by_chains_and_widths(make: Any, kind: str) -> None:
    model = with_low_rank(make())

    def count() -> float:
        return parameters(model) if kind == "params" else macs(model, loop.x[:2]) or 0

    loop = Loop(Fixed({}), model)
    most = 0.5 * count()
    loop = Loop(Budget(**{kind: most}, by=0.75, lowrank=True, growth=0), model)  # type: ignore[arg-type]
    for event in range(5):
        loop.step(event / 4)
        loop.train()
        assert without_names(trace(loop.model, loop.x[:2])) == without_names(loop.evolver.graph)
    assert 0.8 * most <= count() <= most
    assert chains(loop.model)
    assert chains(loop.model) == chains(loop.average)
    named = {change.width for event in loop.evolver.history.events for change in event.changes}
    assert {f"{path}.0" for path in chains(loop.model)} <= named
    assert loop.evolver.history.initial.sizes.keys() >= named
    assert str(loop.evolver.history)
    assert (
        "2.0" in str(loop.evolver.history) or "0.0" in str(loop.evolver.history) or "3.0" in str(loop.evolver.history)
    )
    validate_state(loop.optimizer)


def test_a_chain_that_no_longer_pays_is_whole_again_with_the_same_outputs() -> None:
    loop = Loop(FixedRanks({"2.0": 10}))
    loop.step()
    assert chains(loop.model) == ["2"]
    loop.train()
    loop.evolver.policy = FixedRanks({"0": 8})
    with at_boundary("merge", lambda: before.append(copy.deepcopy(loop.model)), at=1) as _:
        before: list[Any] = []
        event = loop.step()
    assert chains(loop.model) == chains(loop.average) == []
    assert [(c.width, c.before, c.after) for c in event.changes][-1][:2] == ("2.0", 10)
    assert "whole again" in event.changes[-1].reason
    torch.testing.assert_close(outputs(loop.model, loop.x), outputs(before[0], loop.x), rtol=1e-9, atol=1e-9)
    assert without_names(trace(loop.model, loop.x[:2])) == without_names(loop.evolver.graph)
    loop.train()
    validate_state(loop.optimizer)


@cache
def boundaries(merges: bool) -> Counter[str]:
    loop = about_to_change(merges)
    with at_boundary("none", act=lambda: None) as passed:
        loop.step()
    return passed


def about_to_change(merges: bool) -> Loop:
    """A run whose next event makes a chain and cuts a width, or makes a layer whole again."""
    loop = Loop(FixedRanks({"2.0": 10} if merges else {"2.0": 5, "0": 22}))
    if merges:
        loop.step()
        loop.train()
        loop.evolver.policy = FixedRanks({"0": 8})
    return loop


@pytest.mark.parametrize("merges", [False, True])
def test_a_failure_at_any_boundary_of_any_stage_leaves_all_as_it_was(merges: bool) -> None:
    stages = boundaries(merges)
    assert {"merge", *(() if merges else ("factorization",))} <= stages.keys()
    loop = about_to_change(merges)
    before, graph, initial = loop.states(), loop.evolver.graph, dict(loop.evolver.history.initial.sizes)
    original = loop.evolver.original
    for stage, total in stages.items():
        for at in sorted({*range(1, min(total, 8) + 1), total // 2 + 1, total}):
            loop.evolver._failures.counts.clear()
            with failing(stage, at):
                event = loop.evolver.step(progress=1.0)
            assert event.skipped == f"{stage} failed: boom"
            assert before[0].differences(loop.model, [loop.optimizer]) == []
            assert before[1].differences(loop.average) == []
            assert loop.evolver.graph is graph
            assert loop.evolver.original is original
            assert loop.evolver.history.initial.sizes == initial
            assert event.changes == ()
    loop.train()
    assert loop.step().changes
    loop.train()


def test_a_wrong_chain_is_found_and_reverted() -> None:
    loop = about_to_change(merges=False)
    before = loop.states()

    def spoil() -> None:
        loop.model[2][0].weight.data[0] = float("nan")

    with at_boundary("cost count", lambda: None), at_boundary("merge", spoil, boundaries(False)["merge"]):
        event = loop.evolver.step(progress=1.0)
    assert "finite outputs" in (event.skipped or "")
    assert before[0].differences(loop.model, [loop.optimizer]) == []
    assert before[1].differences(loop.average) == []


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.Adam, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
    ids=["adamw", "fused", "foreach", "sgd"],
)
def test_factors_lie_in_the_group_of_their_weight_and_a_scheduler_goes_on(make: Any, options: dict[str, Any]) -> None:
    loop = Loop(FixedRanks({"2.0": 10}), make=make, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1, 0.5)
    scheduler.step()
    biases = loop.optimizer.param_groups[0]["params"]
    kept = loop.optimizer.state[loop.model[0].weight]
    loop.step()
    no_decay, decay = (group["params"] for group in loop.optimizer.param_groups)
    assert [id(each) for each in no_decay] == [id(each) for each in biases]
    wanted = [loop.model[0].weight, loop.model[2][0].weight, loop.model[2][1].weight, loop.model[4].weight]
    assert [id(each) for each in decay] == [id(each) for each in wanted]
    assert loop.optimizer.state[loop.model[0].weight] is kept
    loop.train()
    validate_state(loop.optimizer)
    scheduler.step()
    assert [group["lr"] for group in loop.optimizer.param_groups] == [2.5e-4] * 2
    loop.evolver.policy = FixedRanks({"0": 8})
    loop.step()
    loop.train()
    assert chains(loop.model) == []
    assert len(loop.optimizer.param_groups[1]["params"]) == 3
    validate_state(loop.optimizer)


def test_an_average_has_the_chains_of_the_model_in_the_same_basis() -> None:
    loop = Loop(FixedRanks({"2.0": 10}))
    average = torch.optim.swa_utils.AveragedModel(
        loop.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    target = copy.deepcopy(loop.model)
    target[4] = loop.model[4]
    loop.evolver.copies = [loop.average, average.module, target]
    loop.train(3)
    average.update_parameters(loop.model)
    before = [outputs(each, loop.x) for each in (loop.average, average.module, target)]
    loop.step()
    for each, old in zip((loop.average, average.module, target), before, strict=True):
        assert chains(each) == ["2"]
        torch.testing.assert_close(each.get_parameter("2.0.weight"), loop.model[2][0].weight, rtol=0, atol=0)
        assert each.get_parameter("2.0.weight") is not loop.model[2][0].weight
        assert float((outputs(each, loop.x) - old).norm() / old.norm()) < 0.2
    assert target[4] is loop.model[4]
    loop.train()
    average.update_parameters(loop.model)
    loop.evolver.policy = FixedRanks({"4.0": 2, "0": 22})
    loop.step()
    assert chains(target) == chains(loop.model) == chains(average.module)
    assert target[4] is loop.model[4]
    average.update_parameters(loop.model)


def tolerant(share: float = 0.4) -> Loop:
    policy = Tolerance(metric="acc", drop=0.01, share=share, validations=1, lowrank=True)
    loop = Loop(policy, with_low_rank(dense()))
    assert loop.evolver.judge(0.9) is None
    return loop


@pytest.mark.parametrize("resumed", [False, True])
def test_a_cut_that_made_chains_is_taken_back_bit_for_bit(resumed: bool) -> None:
    loop = tolerant()
    before, graph = loop.everything(), loop.evolver.graph
    cut = loop.step()
    assert chains(loop.model)
    loop.train()
    if resumed:
        state = copy.deepcopy(loop.evolver.state_dict())
        loop.evolver = Evolver(
            loop.model,
            loop.optimizer,
            loop.evolver.policy,
            loop.x[:2],
            copies=[loop.average],
            after_change=loop.rebuild,
        )
        loop.evolver.load_state_dict(state)
    back = loop.evolver.judge(0.5)
    assert back is not None
    assert back.skipped is None
    assert {(c.width, c.after, c.before) for c in back.changes} == {(c.width, c.before, c.after) for c in cut.changes}
    assert_same(loop.everything(), before)
    assert loop.evolver.graph == graph
    assert json.dumps(loop.evolver.history.to_dict())
    loop.train()
    for _ in range(8):
        loop.step()
        loop.train()
    assert loop.evolver.off is None


def test_a_rollback_that_fails_leaves_the_chains() -> None:
    loop = tolerant()
    loop.step()
    loop.train()
    before = loop.everything()
    with failing("rollback", 1):
        event = loop.evolver.judge(0.5)
    assert event is not None
    assert event.skipped is not None
    assert_same(loop.everything(), before)


def test_a_price_makes_chains_of_layers_with_a_low_rank() -> None:
    loop = Loop(Price(price=1e-2, rise=0, settle=0, most=0.5, largest_step=0.9, lowrank=True), with_low_rank(dense()))
    for _ in range(4):
        loop.step(0.5)
        loop.train()
    assert "2" in chains(loop.model)


def test_all_widths_at_their_first_sizes_are_whole_layers() -> None:
    loop = Loop(FixedRanks({"2.0": 5, "0": 20}))
    shapes = [tuple(each.shape) for each in loop.model.parameters()]
    loop.step()
    loop.train()
    before = loop.states()
    assert loop.evolver.has_changed
    with pytest.raises(ZeroDivisionError), loop.evolver.restored("boom"):
        raise ZeroDivisionError
    assert before[0].differences(loop.model, [loop.optimizer]) == []
    assert before[1].differences(loop.average) == []
    with loop.evolver.restored("a route that no trace took"):
        pass
    assert chains(loop.model) == chains(loop.average) == []
    assert [tuple(each.shape) for each in loop.model.parameters()] == shapes
    event = loop.evolver.history.events[-1]
    assert {change.width for change in event.changes} == {"0", "2.0"}
    validate_state(loop.optimizer)
    loop.train()
    assert not loop.evolver.has_changed
    assert ModelReference.of(loop.model, loop.x[:2])


def test_only_a_chain_is_also_a_change_of_the_run() -> None:
    loop = Loop(FixedRanks({"2.0": 5}))
    assert not loop.evolver.has_changed
    loop.step()
    assert loop.evolver.has_changed


def test_frozen_tied_grouped_and_excluded_layers_stay_whole() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 12, 3, padding=1)
            self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
            self.frozen = nn.Conv2d(12, 12, 3, padding=1)
            self.frozen.weight.requires_grad_(False)
            self.fixed = nn.Conv2d(12, 12, 3, padding=1)
            self.head = nn.Linear(12, 12)
            self.once = nn.Linear(12, 12)
            self.twice = nn.Linear(12, 12)
            self.twice.weight = self.once.weight
            self.free = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fixed(self.frozen(self.grouped(self.stem(x).relu()).relu()).relu()).relu().mean((2, 3))
            return self.head(self.free(self.twice(self.once(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(64, 2, 6, 6)
    evolver = Evolver(model, None, Budget(params=1, by=0, lowrank=True), x[:2], fixed=["fixed"])
    evolver.observe(x)
    context_ranks = evolver.lowrank
    assert context_ranks is not None
    named = {rank.layer for rank in context_ranks.ranks(model, evolver.graph, x[:2]).values()}
    assert named == {"stem", "free", "head"}
    assert evolver.step(progress=1.0).skipped is None
    assert set(chains(model)) <= named


def test_a_saved_run_with_chains_is_loaded_and_goes_on(tmp_path: Any) -> None:
    loop = Loop(FixedRanks({"2.0": 5, "0": 20}))
    loop.step()
    loop.train()
    evolvenet.save(loop.model, tmp_path / "net.pt")
    other = dense()
    evolvenet.load(other, tmp_path / "net.pt")
    assert chains(other) == ["2"]
    assert torch.equal(outputs(other, loop.x), outputs(loop.model, loop.x))
