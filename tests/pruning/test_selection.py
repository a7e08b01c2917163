"""Which units stay, and the refit of the consumers, against slow computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import ResizeError, SpectrumError
from evolvenet.graph.index_map import IndexMap
from evolvenet.linalg.pivoted_cholesky import pivots
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.selection import choose, plan_prune, predict_removed
from evolvenet.surgery.resize_model import Surgery, compile_surgery, install
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import Branches, Recurrent, Residual, convnet, images, mlp, mobile, used


def duplicate(model: nn.Module, graph: evolvenet.WidthGraph, name: str, source: int, target: int) -> None:
    """Make one unit of a width the copy of another, wherever it is made; what reads it stays."""
    with torch.no_grad():
        for tie in graph.widths[name].ties:
            if tie.role != "consumes":
                rows = model.state_dict()[tie.tensor].movedim(tie.dim, 0)
                at = tie.start
                rows[at + target * tie.repeat : at + (target + 1) * tie.repeat] = rows[
                    at + source * tie.repeat : at + (source + 1) * tie.repeat
                ]


def outputs_after(model: nn.Module, surgery: Surgery, x: Tensor) -> Tensor:
    """Run the model as it would be, then put everything back."""
    undo = install(model, surgery)
    try:
        with torch.no_grad():
            return model(x)
    finally:
        undo()


# Choosing


@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_pivots_equal_a_greedy_search_by_least_squares(size: int, rank: int, count: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    samples = torch.randn(30, rank, generator=made, dtype=torch.float64) @ torch.randn(
        rank, size, generator=made, dtype=torch.float64
    )
    count = min(count, size, rank)
    chosen: list[int] = []
    while len(chosen) < count:
        known = samples[:, chosen]
        fitted = known @ torch.linalg.lstsq(known, samples).solution if chosen else torch.zeros_like(samples)
        left = (samples - fitted).square().sum(0)
        left[chosen] = -1
        chosen.append(int(left.argmax()))
    assert pivots(samples.T @ samples, count) == chosen


def test_pivots_stop_where_only_rounding_is_left() -> None:
    samples = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    assert len(pivots(samples.T @ samples, 8)) == 3
    assert pivots(torch.zeros(4, 4), 2) == []


def test_without_statistics_the_joint_magnitude_decides() -> None:
    model = used(Residual())
    graph = trace(model, images(2))
    made = torch.stack([model.stem_norm.weight, model.norm2.weight]).detach().norm(dim=0)
    read = (model.conv1.weight.detach().square().sum((0, 2, 3)) + model.head.weight.detach().square().sum(0)).sqrt()
    kept = (made * read).topk(5).indices.sort().values.tolist()
    assert choose(model, graph, {"stem": 5})["stem"] == IndexMap.keep(kept, 8)


def test_without_a_norm_the_producers_rows_count() -> None:
    model = mlp(6, 6, 3)
    made = torch.cat([model[0].weight], dim=1).detach().norm(dim=1)
    kept = (made * model[2].weight.detach().norm(dim=0)).topk(4).indices.sort().values.tolist()
    assert choose(model, trace(model, torch.randn(2, 6).double()), {"0": 4})["0"] == IndexMap.keep(kept, 6)


def test_statistics_find_the_copies_that_magnitude_does_not() -> None:
    model, x = mlp(6, 6, 3), torch.randn(200, 6, dtype=torch.float64)
    graph = trace(model, x)
    with torch.no_grad():
        model[0].weight[3:] *= 0.1
    duplicate(model, graph, "0", 0, 1)
    duplicate(model, graph, "0", 0, 2)
    assert set(choose(model, graph, {"0": 3})["0"].indices) == {0, 1, 2}
    kept = set(choose(model, graph, {"0": 4}, collect(model, graph, [x]))["0"].indices)
    assert len(kept & {0, 1, 2}) == 1


def test_names_of_other_producers_and_the_same_size_are_understood() -> None:
    model = used(Residual())
    graph = trace(model, images(2))
    assert choose(model, graph, {"conv2": 5}) == choose(model, graph, {"stem": 5})
    assert choose(model, graph, {"stem": 8}) == {"stem": IndexMap.identity(8)}
    assert plan_prune(model, graph, {"stem": 8}).changes == ()


@pytest.mark.parametrize("size", [0, -1, 7])
def test_sizes_that_are_no_pruning_are_refused(size: int) -> None:
    model = mlp(4, 6, 3)
    graph = trace(model, torch.zeros(1, 4).double())
    with pytest.raises(ResizeError, match=rf"'0' has 6 units, expected a new size of 1 … 6, got {size}"):
        plan_prune(model, graph, {"0": size})


def test_frozen_and_unknown_widths_are_refused() -> None:
    model = mlp(4, 6, 3)
    graph = trace(model, torch.zeros(1, 4).double())
    with pytest.raises(ResizeError, match="is the model's output"):
        plan_prune(model, graph, {"2": 2})
    with pytest.raises(ResizeError, match="No width is called 'nothing'"):
        plan_prune(model, graph, {"nothing": 2})


def test_nan_weights_are_refused() -> None:
    model, x = mlp(4, 6, 3), torch.randn(20, 4, dtype=torch.float64)
    graph = trace(model, x)
    statistics = collect(model, graph, [x])
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    for given_statistics in (None, statistics):
        with pytest.raises(SpectrumError, match=r"2\.weight"):
            plan_prune(model, graph, {"0": 3}, given_statistics)


def test_a_constant_unit_goes_first_where_a_bias_can_take_it() -> None:
    for bias, stays in ((True, False), (False, True)):
        model, x = mlp(4, 5, 3), torch.randn(100, 4, dtype=torch.float64)
        with torch.no_grad():
            model[0].weight[2], model[0].bias[2] = 0, 10
        if not bias:
            model[2].bias = None
        graph = trace(model, x)
        assert (2 in choose(model, graph, {"0": 4}, collect(model, graph, [x]))["0"].indices) == stays


# Compensating

Dependent = tuple[Any, Tensor, dict[str, int]]
"""A model, inputs, and the sizes to which its widths can go without a trace."""


def dependent_mlp() -> Dependent:
    """Units that are copies, multiples, sums of others after the activation, and one that is constant."""
    model, x = mlp(5, 9, 3), torch.randn(300, 5, dtype=torch.float64)
    with torch.no_grad():
        weight, bias = model[0].weight, model[0].bias
        weight[4], bias[4] = weight[0], bias[0]
        weight[5], bias[5] = 2.5 * weight[1], 2.5 * bias[1]
        bias[2:4] = 50
        weight[6], bias[6] = weight[2] - 0.5 * weight[3], bias[2] - 0.5 * bias[3] + 1
        weight[7], bias[7] = 0 * weight[7], bias[7] * 0 + 4
        weight[8], bias[8] = weight[8], bias[8] - 100
    return model, x, {"0": 4}


def dependent_convnet() -> Dependent:
    """Copied channels before a convolution and before a flatten."""
    model, x = convnet(bias=True), images(40)
    graph = trace(model, x)
    for source, target in ((0, 5), (1, 6), (1, 7)):
        duplicate(model, graph, "0", source, target)
    duplicate(model, graph, "3", 2, 0)
    duplicate(model, graph, "3", 2, 4)
    return model, x, {"0": 5, "3": 4}


def dependent_residual() -> Dependent:
    """Copied channels in the trunk and inside the block."""
    model, x = used(Residual()), images(40)
    graph = trace(model, x)
    duplicate(model, graph, "stem", 3, 1)
    duplicate(model, graph, "stem", 3, 7)
    duplicate(model, graph, "conv1", 0, 4)
    return model, x, {"stem": 6, "conv1": 4}


def dependent_branches() -> Dependent:
    """Copies in both of two widths that one layer reads."""
    model, x = Branches().double(), torch.randn(200, 4, dtype=torch.float64)
    graph = trace(model, x)
    duplicate(model, graph, "left", 0, 5)
    duplicate(model, graph, "right", 1, 3)
    return model, x, {"left": 5, "right": 4}


def dependent_groups() -> Dependent:
    """A copied group of a grouped convolution."""
    model, x = mobile(), images(30)
    duplicate(model, trace(model, x), "4", 2, 0)
    return model, x, {"4": 2}


@pytest.mark.parametrize(
    "case", [dependent_mlp, dependent_convnet, dependent_residual, dependent_branches, dependent_groups]
)
def test_dependent_units_go_without_a_trace(case: Callable[[], Dependent]) -> None:
    model, x, sizes = case()
    graph = trace(model, x)
    fresh = torch.randn_like(x)
    with torch.no_grad():
        before = model(fresh)
    surgery = plan_prune(model, graph, sizes, collect(model, graph, [x[::2], x[1::2]]))
    after = outputs_after(model, surgery, fresh)
    bare = outputs_after(model, plan_prune(model, graph, sizes), fresh)
    scale = before.std()
    assert (after - before).abs().max() < 1e-6 * scale
    assert (bare - before).abs().max() > 1e-2 * scale
    assert {name: surgery.graph.widths[name].size for name in sizes} == sizes


def test_the_refit_is_written_to_every_kernel_place_and_the_bias() -> None:
    model, x = convnet(bias=True), images(40)
    graph = trace(model, x)
    statistics = collect(model, graph, [x])
    surgery = plan_prune(model, graph, {"0": 5}, statistics)
    (tie,) = graph.widths["0"].consumers
    index_map = surgery.maps["0"]
    kept, removed = index_map.tensor(), torch.tensor(index_map.removed)
    weight, bias = model[3].weight.detach(), model[3].bias.detach()
    columns = weight[:, removed].transpose(0, 1).flatten(1)
    found = predict_removed(statistics.even[tie], statistics.odd[tie], kept, removed, columns @ columns.T, bias=True)
    assert found is not None
    matrix, offset = found
    expected, shifted = weight[:, kept].clone(), bias.clone()
    for row in range(6):
        for y in range(3):
            for x_ in range(3):
                for r in range(len(removed)):
                    shifted[row] += weight[row, removed[r], y, x_] * offset[r]
                    for k in range(len(kept)):
                        expected[row, k, y, x_] += weight[row, removed[r], y, x_] * matrix[r, k]
    values = {change.name: change.value for change in surgery.changes}
    torch.testing.assert_close(values["3.weight"], expected)
    torch.testing.assert_close(values["3.bias"], shifted)


@pytest.mark.parametrize("size", [6, 4, 2])
@pytest.mark.parametrize("make", [convnet, lambda: used(Residual())])
def test_compensation_helps_on_inputs_never_seen(make: Callable[[], Any], size: int) -> None:
    model, x, fresh = make(), images(200), images(200)
    graph = trace(model, x)
    name = next(iter(graph.sizes))
    statistics = collect(model, graph, [x])
    with torch.no_grad():
        before = model(fresh)
    compensated = outputs_after(model, plan_prune(model, graph, {name: size}, statistics), fresh)
    cut = compile_surgery(model, graph, choose(model, graph, {name: size}, statistics))
    bare = outputs_after(model, cut, fresh)
    assert (compensated - before).square().mean() < (bare - before).square().mean()


def test_planning_changes_nothing() -> None:
    model, x = convnet(), images(20)
    graph = trace(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan_prune(model, graph, {"0": 3, "3": 2}, collect(model, graph, [x]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model[3].weight.shape == (6, 8, 3, 3)


def test_a_consumer_that_loses_rows_too_is_cut_after_the_refit() -> None:
    model, x = mlp(4, 8, 7, 3), torch.randn(100, 4, dtype=torch.float64)
    graph = trace(model, x)
    statistics = collect(model, graph, [x])
    both = {change.name: change.value for change in plan_prune(model, graph, {"0": 5, "2": 4}, statistics).changes}
    one = {change.name: change.value for change in plan_prune(model, graph, {"0": 5}, statistics).changes}
    rows = choose(model, graph, {"2": 4}, statistics)["2"].tensor()
    torch.testing.assert_close(both["2.weight"], one["2.weight"][rows])
    torch.testing.assert_close(both["2.bias"], one["2.bias"][rows])


def test_shared_weights_are_cut_but_not_refitted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(4, 6)
            self.first, self.second = nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.start(x).relu()
            return self.first(hidden) + self.second(hidden.square())

    model, x = Tied().double(), torch.randn(50, 4, dtype=torch.float64)
    graph = trace(model, x)
    surgery = plan_prune(model, graph, {"start": 4}, collect(model, graph, [x]))
    (change,) = [change for change in surgery.changes if change.name == "first.weight"]
    assert torch.equal(change.value, model.first.weight.detach()[:, list(surgery.maps["start"].indices)])


def test_a_recurrent_layer_is_cut_and_its_reader_refitted() -> None:
    model, x = Recurrent().double(), torch.randn(20, 5, 4, dtype=torch.float64)
    graph = trace(model, x)
    surgery = plan_prune(model, graph, {"cell": 4}, collect(model, graph, [x]))
    assert outputs_after(model, surgery, x).isfinite().all()


def silent(model: Any) -> None:
    """Every other hidden unit dead."""
    model[0].bias.data[::2] = -1e3


def constant(model: Any) -> None:
    """All hidden units constant."""
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1.5)


def unread(model: Any) -> None:
    """Nobody reads the hidden units."""
    model[2].weight.data.zero_()


def zero(model: Any) -> None:
    """All weights zero."""
    for parameter in model.parameters():
        parameter.data.zero_()


def rank_one(model: Any) -> None:
    """All hidden units multiples of one."""
    model[0].weight.data[:] = torch.arange(1, 9).double()[:, None] * model[0].weight.data[:1]
    model[0].bias.data.zero_()


@pytest.mark.parametrize("samples", [1, 2, 5, 100])
@pytest.mark.parametrize("degenerate", [silent, constant, unread, zero, rank_one])
@pytest.mark.parametrize("size", [1, 5])
def test_degenerate_activations_neither_fail_nor_make_nan(
    degenerate: Callable[[Any], None], samples: int, size: int
) -> None:
    model, x = mlp(4, 8, 3), torch.randn(samples, 4, dtype=torch.float64)
    degenerate(model)
    graph = trace(model, torch.zeros(2, 4).double())
    with torch.no_grad():
        before = model(x)
    statistics = collect(model, graph, [x])
    after = outputs_after(model, plan_prune(model, graph, {"0": size}, statistics), x)
    bare = outputs_after(model, compile_surgery(model, graph, choose(model, graph, {"0": size}, statistics)), x)
    assert after.isfinite().all()
    assert (after - before).norm() <= (bare - before).norm() * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_keep_their_type(dtype: torch.dtype) -> None:
    model, x = mlp(4, 8, 3).to(dtype), torch.randn(200, 4).to(dtype)
    graph = trace(model, x)
    duplicate(model, graph, "0", 1, 6)
    with torch.no_grad():
        before = model(x)
    surgery = plan_prune(model, graph, {"0": 7}, collect(model, graph, [x]))
    assert all(change.value.dtype == dtype for change in surgery.changes)
    after = outputs_after(model, surgery, x)
    assert (after - before).abs().max() < 20 * torch.finfo(dtype).eps * before.abs().max()


def test_the_public_prune_compensates() -> None:
    model, x, sizes = dependent_convnet()
    graph = evolvenet.trace(model, x)
    with torch.no_grad():
        before = model(x)
    graph = evolvenet.prune(model, graph, sizes, batches=[x])
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert graph.sizes == {"0": 5, "3": 4}


@pytest.mark.parametrize("measured", [False, True])
def test_of_learned_latents_those_with_the_smallest_rows_go(measured: bool) -> None:
    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.latents, self.k, self.out = nn.Parameter(torch.randn(8, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.latents @ self.k(x).mT).softmax(-1) @ x).mean(1)

    model, x = Latents(), torch.randn(16, 7, 6)
    with torch.no_grad():
        model.latents[torch.tensor([1, 4])] *= 0.01
    graph = trace(model, x[:2])
    surgery = plan_prune(model, graph, {"latents": 6}, collect(model, graph, [x]) if measured else None)
    assert surgery.maps["latents"].indices == (0, 2, 3, 5, 6, 7)
