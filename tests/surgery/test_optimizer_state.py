"""Every optimizer of torch through shrink, grow and shrink, against the entries written out one by one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evolvenet.graph.index_map import IndexMap
from evolvenet.surgery.optimizer_state import apply_state, compile_state, validate_state
from tests.helpers.optimizer_cases import (
    ELEMENTWISE,
    GROW,
    LR,
    OPTIMIZERS,
    SHRINK,
    SPLIT,
    Hidden,
    Swap,
    model_for,
    resize,
    train,
)

MOMENTA = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
MEANS = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "variance", "row_var", "col_var"}
NUMBERS = {"step", "eta", "mu", "mu_product"}
CHANNELS = IndexMap.of([5, 1, 1, -1], size=6)


def slow(key: str, old: Tensor, dim: int, index_map: IndexMap, value: Tensor) -> Tensor:
    """The expected entry, computed one unit at a time; unchanged for an axis that the entry does not have."""
    if key in NUMBERS or (key, dim - value.dim()) in {("row_var", -1), ("col_var", -2)}:
        return old
    kept = [old.select(dim, index) for index in index_map.indices if index >= 0]
    new_unit = {"step_size": lambda _: torch.full_like(kept[0], LR), "ax": lambda place: value.select(dim, place)}
    new_unit |= dict.fromkeys(MOMENTA, lambda _: torch.zeros_like(kept[0]))
    new_unit |= dict.fromkeys(MEANS, lambda _: torch.stack(kept).mean(0))
    units = [
        old.select(dim, index) if index >= 0 else new_unit[key](place) for place, index in enumerate(index_map.indices)
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
                expected = slow(key, old, dim, index_map, change.value)
                torch.testing.assert_close(
                    after[key], expected, rtol=1e-6, atol=0, msg=lambda text, key=key: f"{key}: {text}"
                )
                if key not in NUMBERS and not index_map.new_units:
                    assert torch.equal(after[key], expected), f"{key} of kept units must be the same to the bit"
    assert train(model, optimizer, 3) < float("inf")


def test_kept_units_have_the_same_entries_to_the_bit_beside_new_units() -> None:
    model = Hidden()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    train(model, optimizer, 3)
    grow = IndexMap.of([0, -1, 1, 2, 3, 4, 5, 6, 7, -1], size=8)
    before = {key: entry.clone() for key, entry in optimizer.state[model.w1].items()}
    resize(model, optimizer, grow)
    after = optimizer.state[model.w1]
    kept = [place for place, index in enumerate(grow.indices) if index >= 0]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][kept], before[key])
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
    expected = {"exp_avg": weight.grad * 0.1, "exp_avg_sq": weight.grad.square() * 0.001}
    for key, entry in expected.items():
        for dim, index_map in axes.items():
            kept = [index for index in index_map.indices if index >= 0] or list(range(index_map.size))
            mean = torch.stack([entry.select(dim, index) for index in kept]).mean(0)
            new_unit = mean if key == "exp_avg_sq" else torch.zeros_like(mean)
            entry = torch.stack([entry.select(dim, i) if i >= 0 else new_unit for i in index_map.indices], dim)
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


@pytest.mark.parametrize("refitted", ["weight", "buffer"])
def test_refitted_weights_alone_shorten_adams_memory(refitted: str) -> None:
    """Running means that get other values (on another rank those of rank 0) are no refit: ranks went apart by it."""
    weight, mean = nn.Parameter(torch.ones(3, 2)), nn.Buffer(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(12):
        weight.square().sum().backward()
        optimizer.step()
    cut = {0: IndexMap.of([0, 2], size=3)}
    values = {"weight": weight.detach()[[0, 2]].clone(), "buffer": mean[[0, 2]].clone()}
    values[refitted] += 1
    named = [("weight", weight), ("buffer", mean)]
    changes = [Swap(tensor, name, cut, values[name]) for name, tensor in named]  # pyright: ignore[reportArgumentType]
    plan = compile_state(optimizer, changes)
    assert float(plan.states[weight]["step"]) == (10 if refitted == "weight" else 12)
