"""Every optimizer of torch through shrink, grow and shrink, against the entries written out one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from evolvenet.errors import OptimizerStateError
from evolvenet.index_map import IndexMap
from evolvenet.optim import StatePlan, apply_state, compile_state, validate_state

LR = 0.01
MOMENTA = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
MEANS = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "variance", "row_var", "col_var"}
NUMBERS = {"step", "eta", "mu", "mu_product"}

ELEMENTWISE: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "sgd momentum": partial(torch.optim.SGD, momentum=0.9),
    "sgd nesterov foreach": partial(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "adam": partial(torch.optim.Adam, foreach=False),
    "adam amsgrad foreach": partial(torch.optim.Adam, amsgrad=True, foreach=True),
    "adam amsgrad fused": partial(torch.optim.Adam, amsgrad=True, fused=True),
    "adamw": torch.optim.AdamW,
    "adamw fused": partial(torch.optim.AdamW, fused=True),
    "nadam": torch.optim.NAdam,
    "nadam foreach": partial(torch.optim.NAdam, foreach=True),
    "radam": torch.optim.RAdam,
    "radam foreach": partial(torch.optim.RAdam, foreach=True),
    "adamax": torch.optim.Adamax,
    "adamax foreach": partial(torch.optim.Adamax, foreach=True),
    "adadelta": torch.optim.Adadelta,
    "adadelta foreach": partial(torch.optim.Adadelta, foreach=True),
    "adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.1),
    "adagrad foreach": partial(torch.optim.Adagrad, foreach=True),
    "adagrad fused": partial(torch.optim.Adagrad, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "rmsprop centered foreach": partial(torch.optim.RMSprop, momentum=0.9, centered=True, foreach=True),
    "rprop": torch.optim.Rprop,
    "rprop foreach": partial(torch.optim.Rprop, foreach=True),
    "asgd": partial(torch.optim.ASGD, t0=3),
    "asgd foreach": partial(torch.optim.ASGD, t0=3, foreach=True),
}
OPTIMIZERS = {
    **ELEMENTWISE,
    "adafactor": torch.optim.Adafactor,
    "adafactor foreach": partial(torch.optim.Adafactor, foreach=True),
    "sparse adam": torch.optim.SparseAdam,
    **({"muon": torch.optim.Muon} if hasattr(torch.optim, "Muon") else {}),
}
SHRINK = IndexMap.keep([0, 2, 3, 6, 7], size=8)
GROW = IndexMap.of([0, -1, 1, 2, 3, 4, -1, -1], size=5)
SPLIT = IndexMap.of([7, 1, 1, 4], size=8)
AXES = {"w1": 0, "b1": 0, "w2": 1, "rows": 1}
CHANNELS = IndexMap.of([5, 1, 1, -1], size=6)


@dataclass(frozen=True)
class Swap:
    """What `compile_state` needs to know of a change."""

    tensor: nn.Parameter
    name: str
    axes: Mapping[int, IndexMap]
    value: Tensor


class Hidden(nn.Module):
    """One hidden width of 8: rows of `w1`, all of `b1`, columns of `w2`."""

    def __init__(self, biases: bool = True) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(8, 5))
        self.b1 = nn.Parameter(torch.randn(8)) if biases else None
        self.w2 = nn.Parameter(torch.randn(3, 8))

    def loss(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w1, self.b1).relu(), self.w2).square().mean()


class Table(nn.Module):
    """A sparse embedding whose second axis is the width."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(10, 8))

    def loss(self, x: Tensor) -> Tensor:
        ids = (x[:, 0].abs() * 7).long() % 6
        return F.embedding(ids, self.rows, sparse=True).square().mean()


def model_for(name: str) -> Hidden | Table:
    """The model that the optimizer can train: Muon takes matrices alone, SparseAdam sparse gradients alone."""
    return Table() if name == "sparse adam" else Hidden(biases=name != "muon")


def swaps(model: Hidden | Table, index_map: IndexMap) -> list[Swap]:
    """The change of the width, with random values for newborns."""
    made = []
    for name, parameter in model.named_parameters():
        dim = AXES[name]
        value = index_map.apply(parameter.detach(), dim)
        for born in index_map.newborns:
            value.select(dim, born).normal_()
        made.append(Swap(parameter, name, {dim: index_map}, value))
    return made


def resize(model: Hidden | Table, optimizer: Optimizer, index_map: IndexMap) -> list[Swap]:
    """Change the width by hand and carry the state along."""
    changes = swaps(model, index_map)
    plan = compile_state(optimizer, changes)
    for change in changes:
        change.tensor.grad = None
        change.tensor.data = change.value
    apply_state(plan)
    validate_state(optimizer)
    return changes


def train(model: Hidden | Table, optimizer: Optimizer, steps: int, seed: int = 0) -> float:
    """A few steps; the last loss."""
    generator = torch.Generator().manual_seed(seed)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model.loss(torch.randn(16, 5, generator=generator, dtype=next(model.parameters()).dtype))
        loss.backward()
        losses.append(float(loss.detach()))
        return losses[-1]

    for _ in range(steps):
        optimizer.step(closure)
    return losses[-1]


def slow(key: str, old: Tensor, dim: int, index_map: IndexMap, value: Tensor) -> Tensor:
    """What the entry must be, one unit at a time; an axis that the entry does not have leaves it alone."""
    if key in NUMBERS or (key, dim - value.dim()) in {("row_var", -1), ("col_var", -2)}:
        return old
    kept = [old.select(dim, index) for index in index_map.indices if index >= 0]
    newborn = {"step_size": lambda _: torch.full_like(kept[0], LR), "ax": lambda place: value.select(dim, place)}
    newborn |= dict.fromkeys(MOMENTA, lambda _: torch.zeros_like(kept[0]))
    newborn |= dict.fromkeys(MEANS, lambda _: torch.stack(kept).mean(0))
    units = [
        old.select(dim, index) if index >= 0 else newborn[key](place) for place, index in enumerate(index_map.indices)
    ]
    return torch.stack(units, dim)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_shrink_grow_and_split(name: str) -> None:
    model = model_for(name)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=LR)
    for round_, index_map in enumerate((SHRINK, GROW, SPLIT)):
        train(model, optimizer, 3, seed=round_)
        before = {parameter: deepcopy(dict(optimizer.state[parameter])) for parameter in model.parameters()}
        for change in resize(model, optimizer, index_map):
            ((dim, _),) = change.axes.items()
            after = optimizer.state[change.tensor]
            assert list(after) == list(before[change.tensor])
            for key, old in before[change.tensor].items():
                if not isinstance(old, Tensor):
                    assert after[key] == old
                    continue
                want = slow(key, old, dim, index_map, change.value)
                torch.testing.assert_close(
                    after[key], want, rtol=1e-6, atol=0, msg=lambda text, key=key: f"{key}: {text}"
                )
                if key not in NUMBERS and not index_map.newborns:
                    assert torch.equal(after[key], want), f"{key} of survivors must be the same to the bit"
    assert train(model, optimizer, 3) < float("inf")


def test_survivors_are_the_same_to_the_bit_beside_newborns() -> None:
    model = Hidden()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    train(model, optimizer, 3)
    grow = IndexMap.of([0, -1, 1, 2, 3, 4, 5, 6, 7, -1], size=8)
    before = {key: entry.clone() for key, entry in optimizer.state[model.w1].items()}
    resize(model, optimizer, grow)
    after = optimizer.state[model.w1]
    survivors = [place for place, index in enumerate(grow.indices) if index >= 0]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][survivors], before[key])
    assert after["step"] == before["step"] == 3


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_removing_units_that_do_nothing_changes_no_later_update(name: str) -> None:
    wide = Hidden().double()
    with torch.no_grad():
        for parameter, dim in ((wide.w1, 0), (wide.b1, 0), (wide.w2, 1)):
            assert parameter is not None
            parameter.index_fill_(dim, torch.tensor(SHRINK.removed), 0.0)
    narrow = deepcopy(wide)
    optimizers = [OPTIMIZERS[name](model.parameters(), lr=LR) for model in (wide, narrow)]
    for model, optimizer in zip((wide, narrow), optimizers, strict=True):
        train(model, optimizer, 4, seed=1)
    resize(narrow, optimizers[1], SHRINK)
    for model, optimizer in zip((wide, narrow), optimizers, strict=True):
        train(model, optimizer, 4, seed=2)
    for parameter, kept in zip(wide.parameters(), narrow.parameters(), strict=True):
        dim = 1 if parameter is wide.w2 else 0
        torch.testing.assert_close(SHRINK.apply(parameter.detach(), dim), kept.detach(), rtol=1e-9, atol=1e-12)


def test_without_the_carry_fused_adam_would_be_wrong_and_validate_says_so() -> None:
    model = Hidden()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    train(model, optimizer, 2)
    model.w1.grad, model.w1.data = None, torch.randn(40, 5)
    with pytest.raises(
        OptimizerStateError, match=r"Adam: expected 'exp_avg' to fit parameter 0 of group 0, shape \(40, 5\)"
    ):
        validate_state(optimizer)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_starts_its_history_anew_and_goes_on(line_search: str | None) -> None:
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
        """Refuses an attribute that a plan wants to set."""

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


MAPS = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.integers(-1, size - 1), min_size=1, max_size=8).map(lambda found: IndexMap.of(found, size))
)


@given(rows=MAPS, columns=MAPS, both=st.sampled_from([(0, 1), (0,), (1,), (0, -1)]))
def test_any_maps_on_both_axes(rows: IndexMap, columns: IndexMap, both: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.randn(rows.size, columns.size, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=LR)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    axes = {dim: rows if dim == 0 else columns for dim in both}
    value = weight.detach()
    for dim, index_map in axes.items():
        value = index_map.apply(value, dim)
    after = compile_state(optimizer, [Swap(weight, "w", axes, value)]).states[weight]
    want = {"exp_avg": weight.grad * 0.1, "exp_avg_sq": weight.grad.square() * 0.001}
    for key, entry in want.items():
        for dim, index_map in axes.items():
            survivors = [index for index in index_map.indices if index >= 0] or list(range(index_map.size))
            mean = torch.stack([entry.select(dim, index) for index in survivors]).mean(0)
            newborn = mean if key == "exp_avg_sq" else torch.zeros_like(mean)
            entry = torch.stack([entry.select(dim, i) if i >= 0 else newborn for i in index_map.indices], dim)
        torch.testing.assert_close(after[key], entry)
    assert after["step"] is optimizer.state[weight]["step"]


@pytest.mark.parametrize(
    ("shape", "dim"), [((1, 6), 0), ((6, 1), 1), ((1, 1), 0), ((4, 1, 3, 3), 1), ((4, 2, 1, 3), 0)]
)
def test_adafactor_factors_of_width_one_do_not_grow_along_the_wrong_axis(shape: tuple[int, ...], dim: int) -> None:
    weight = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Adafactor([weight], lr=LR)
    weight.grad = torch.randn(shape)
    optimizer.step()
    grow = IndexMap.grow(shape[dim], 2)
    change = Swap(weight, "w", {dim: grow}, grow.apply(weight.detach(), dim))
    plan = compile_state(optimizer, [change])
    weight.grad, weight.data = None, change.value
    apply_state(plan)
    validate_state(optimizer)
    state = optimizer.state[weight]
    assert list(state["row_var"].shape) == [*change.value.shape[:-1], 1]
    assert list(state["col_var"].shape) == [*change.value.shape[:-2], 1, change.value.shape[-1]]
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("contiguous_value", [True, False])
def test_state_lies_in_memory_as_its_parameter_does(contiguous_value: bool) -> None:
    weights = [nn.Parameter(torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))) for _ in range(2)]
    results = []
    for weight, fused in zip(weights, (True, False), strict=True):
        weight.data = weight.data.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam([weight], lr=LR, fused=fused)
        generator = torch.Generator().manual_seed(2)
        weight.grad = torch.randn(6, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last)
        optimizer.step()
        value = CHANNELS.apply(weight.detach(), 0)
        value = value.contiguous() if contiguous_value else value
        plan = compile_state(optimizer, [Swap(weight, "conv", {0: CHANNELS}, value)])
        weight.grad, weight.data = None, value
        apply_state(plan)
        assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
        assert optimizer.state[weight]["exp_avg_sq"].stride() == weight.stride()
        weight.grad = torch.empty_like(weight).copy_(torch.randn(4, 4, 3, 3, generator=generator))
        optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


class Odd(torch.optim.SGD):
    """An optimizer that keeps whatever a test gives it."""

    def __init__(self, parameter: Tensor, **kept: Any) -> None:
        super().__init__([parameter], lr=LR)
        self.state[parameter].update(kept)


def carried(shape: tuple[int, ...], **kept: Any) -> dict[str, Any]:
    """The state `kept` after two of the first axis's units went and one was born."""
    weight = nn.Parameter(torch.randn(shape))
    index_map = IndexMap.of([2, -1, *range(3, shape[0])], size=shape[0])
    change = Swap(weight, "body.weight", {0: index_map}, index_map.apply(weight.detach(), 0))
    return compile_state(Odd(weight, **kept), [change]).states[weight]


def test_keys_that_nobody_named_are_carried_by_their_sign_and_shape() -> None:
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
def test_state_that_cannot_be_understood_is_refused(kept: dict[str, Any], text: str) -> None:
    with pytest.raises(OptimizerStateError, match=text):
        carried((4, 3), **kept)


def test_an_optimizer_of_ones_own_can_be_registered() -> None:
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
