"""Plans of optimizer state: applied whole or not at all, unknown state refused, LBFGS and registered optimizers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.errors import OptimizerStateError
from evolvenet.graph.index_map import IndexMap
from evolvenet.surgery.optimizer_state import StatePlan, apply_state, compile_state, validate_state
from tests.helpers.optimizer_cases import GROW, LR, SHRINK, SPLIT, Hidden, Swap, resize, swaps, train


def test_validate_refuses_state_that_was_not_carried() -> None:
    model = Hidden()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    train(model, optimizer, 2)
    model.w1.grad, model.w1.data = None, torch.randn(40, 5)
    with pytest.raises(
        OptimizerStateError, match=r"Adam: expected 'exp_avg' to fit parameter 0 of group 0, shape \(40, 5\)"
    ):
        validate_state(optimizer)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_starts_its_history_anew_and_trains_on(line_search: str | None) -> None:
    model = Hidden()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=line_search)
    for index_map in (SHRINK, GROW, SPLIT):
        train(model, optimizer, 2)
        evaluations = optimizer.state[model.w1]["func_evals"]
        resize(model, optimizer, index_map)
        assert optimizer.state[model.w1] == {"func_evals": evaluations, "n_iter": 0}
    train(model, optimizer, 2)
    validate_state(optimizer)
    model.w1.data = torch.randn(2, 5)
    with pytest.raises(OptimizerStateError, match=r"LBFGS: expected flat vectors of 26 entries, got \[36\]"):
        validate_state(optimizer)


def test_lbfgs_keeps_its_history_when_only_another_model_changes() -> None:
    model, other = Hidden(), Hidden()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    train(model, optimizer, 2)
    plan = compile_state(optimizer, swaps(other, SHRINK))
    assert not plan.states
    assert not plan.attributes


def test_compiling_touches_nothing() -> None:
    model, fresh = Hidden(), Hidden()
    optimizer = torch.optim.Adam([*model.parameters(), *fresh.parameters()], lr=LR)
    train(model, optimizer, 2)
    fresh.zero_grad()
    before = deepcopy(optimizer.state_dict())
    entries = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    stranger = Hidden()
    plan = compile_state(optimizer, [change for each in (model, fresh, stranger) for change in swaps(each, SHRINK)])
    assert set(plan.states) == set(model.parameters()), "no state is made for a parameter without one"
    assert set(optimizer.state) == set(entries)
    for parameter, state in entries.items():
        assert all(optimizer.state[parameter][key] is entry for key, entry in state.items())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("make", [partial(torch.optim.Adam, lr=LR), partial(torch.optim.LBFGS, lr=0.1, max_iter=3)])
def test_a_plan_can_be_undone(make: Callable[..., Optimizer]) -> None:
    model = Hidden()
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    before = dict(optimizer.state)
    contents = deepcopy(optimizer.state_dict())
    cache = getattr(optimizer, "_numel_cache", None)
    undo = apply_state(compile_state(optimizer, swaps(model, SHRINK)))
    assert all(optimizer.state[parameter] is not state for parameter, state in before.items())
    apply_state(undo)
    assert all(optimizer.state[parameter] is state for parameter, state in before.items())
    assert getattr(optimizer, "_numel_cache", None) == cache
    torch.testing.assert_close(optimizer.state_dict(), contents, rtol=0, atol=0)
    train(model, optimizer, 1)


def test_a_failure_half_way_leaves_the_state_as_it_was() -> None:
    class Stubborn(torch.optim.Adam):
        """Raises when an attribute of a plan is set."""

        broken = property(lambda self: 1, lambda self, value: (_ for _ in ()).throw(MemoryError()) if value else None)

    model = Hidden()
    optimizer = Stubborn(model.parameters(), lr=LR)
    train(model, optimizer, 2)
    before = dict(optimizer.state)
    plan = compile_state(optimizer, swaps(model, SHRINK))
    broken = StatePlan(optimizer, plan.states, {"broken": True})
    with pytest.raises(MemoryError):
        apply_state(broken)
    assert all(optimizer.state[parameter] is state for parameter, state in before.items())


class Odd(torch.optim.SGD):
    """An optimizer whose state is what a test gives it."""

    def __init__(self, parameter: Tensor, **kept: Any) -> None:
        super().__init__([parameter], lr=LR)
        self.state[parameter].update(kept)


def carried(shape: tuple[int, ...], **kept: Any) -> dict[str, Any]:
    """The state `kept` after a change of the first axis: two units removed, one new."""
    weight = nn.Parameter(torch.randn(shape))
    index_map = IndexMap.of([2, -1, *range(3, shape[0])], size=shape[0])
    change = Swap(weight, "body.weight", {0: index_map}, index_map.apply(weight.detach(), 0))
    return compile_state(Odd(weight, **kept), [change]).states[weight]


def test_keys_without_a_rule_are_carried_by_their_sign_and_shape() -> None:
    signed, positive = torch.randn(4, 3) - 9.0, torch.rand(4, 3) + 1.0
    after = carried(
        (4, 3), slow=signed, curvature=positive, rows=positive[:, :1], gain=torch.tensor([2.0]), note="x", n=3
    )
    assert torch.equal(after["slow"], torch.stack([signed[2], torch.zeros(3), signed[3]]))
    torch.testing.assert_close(after["curvature"], torch.stack([positive[2], positive[2:].mean(0), positive[3]]))
    torch.testing.assert_close(after["rows"], after["curvature"][:, :1])
    assert (after["gain"], after["note"], after["n"]) == (torch.tensor([2.0]), "x", 3)


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        (
            {"projector": torch.zeros(12)},
            r"Odd: expected 'projector' to fit body.weight, shape \(4, 3\), got \(12,\).*register",
        ),
        ({"preconditioner": torch.zeros(4, 4)}, r"'preconditioner'.*\(4, 4\)"),
        ({"exp_avg": torch.zeros(4, 1)}, r"'exp_avg'.*\(4, 1\)"),
        ({"row_var": torch.zeros(4, 3)}, r"'row_var'.*\(4, 3\)"),
        ({"history": [torch.zeros(4, 3)]}, r"'history' of body.weight.*list of tensors.*register"),
        ({"nested": {"a": (torch.zeros(2),)}}, "dict of tensors"),
    ],
)
def test_state_that_fits_no_rule_is_refused(kept: dict[str, Any], text: str) -> None:
    with pytest.raises(OptimizerStateError, match=text):
        carried((4, 3), **kept)


def test_another_optimizer_can_be_registered() -> None:
    class Flat(Odd):
        """Keeps one flat vector."""

    weight = nn.Parameter(torch.randn(4, 3))
    optimizer = Flat(weight, flat=torch.ones(12))
    plan = StatePlan(optimizer, {weight: {"flat": torch.zeros(9)}})
    compile_state.register(Flat, lambda optimizer, changes: plan)
    assert compile_state(optimizer, []) is plan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_state_keeps_its_type(dtype: torch.dtype) -> None:
    after = carried((4, 3), exp_avg_sq=torch.full((4, 3), 3.0, dtype=dtype))["exp_avg_sq"]
    assert torch.equal(after, torch.full((3, 3), 3.0, dtype=dtype))
