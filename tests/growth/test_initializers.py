"""What each method gives to new units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.growth.initializers import orthogonal, unpredicted_covariance
from evolvenet.growth.plan import plan_growth
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import Residual, convnet, images, mlp, used


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 10), st.integers(0, 1000))
def test_directions_are_orthogonal_while_there_is_room(
    size: int, rank: int, columns: int, count: int, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    rank = min(size, rank, columns)
    rows = torch.randn(size, rank, generator=made, dtype=torch.float64) @ torch.randn(
        rank, columns, generator=made, dtype=torch.float64
    )
    found = orthogonal(rows, count, made)
    assert found.shape == (count, columns)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(count).double())
    free = min(count, columns - rank)
    if free:
        assert (found[:free] @ rows.T).abs().max() < 1e-8 * rows.norm()
        torch.testing.assert_close(found[:free] @ found[:free].T, torch.eye(free).double(), atol=1e-9, rtol=0)


def test_growing_again_from_the_same_seed_still_finds_new_directions() -> None:
    rows = torch.randn(3, 10, dtype=torch.float64)
    for _ in range(3):
        rows = torch.cat([rows, orthogonal(rows, 2, torch.Generator().manual_seed(1))])
    gram = rows[3:] @ rows.T
    torch.testing.assert_close(gram[:, 3:], torch.eye(6).double(), atol=1e-9, rtol=0)
    assert gram[:, :3].abs().max() < 1e-9


def test_zero_rows_have_directions_all_the_same() -> None:
    assert orthogonal(torch.zeros(3, 5, dtype=torch.float64), 2).isfinite().all()


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_what_is_unpredicted_is_the_residual_of_least_squares(
    known: int, others: int, seed: int, dependent: bool
) -> None:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(40, known + others, dtype=torch.float64, generator=made)
    if dependent:
        x[:, known - 1] = x[:, 0]
        x[:, known] = 2 * x[:, 0] - x[:, known - 1]
    x -= x.mean(0)
    left = x[:, known:] - x[:, :known] @ torch.linalg.lstsq(x[:, :known], x[:, known:], driver="gelsd").solution
    left /= x[:, known:].norm(dim=0)
    torch.testing.assert_close(unpredicted_covariance(x.T @ x / 40, known), left.T @ left, rtol=1e-7, atol=1e-9)


def test_a_unit_that_never_varies_is_predicted() -> None:
    found = unpredicted_covariance(torch.diag(torch.tensor([1.0, 0.0, 2.0]).double()), 1)
    torch.testing.assert_close(found, torch.diag(torch.tensor([0.0, 1.0]).double()))


def values_of(model: Any, graph: WidthGraph, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return {change.name: change.value for change in plan_growth(model, graph, *args, **kwargs).changes}


def left_over(model: Any, x: Tensor, known: int, layers: int) -> Tensor:
    """Share of the variance of each unit after the first ones that linear prediction from those leaves, `[others]`."""
    with torch.no_grad():
        y = model[:layers](x)
    y = (y.movedim(1, -1).reshape(-1, y.shape[1]) if y.dim() > 2 else y) - 0
    y = y - y.mean(0)
    fit = torch.linalg.lstsq(y[:, :known], y[:, known:], driver="gelsd").solution
    return (y[:, known:] - y[:, :known] @ fit).square().sum(0) / y[:, known:].square().sum(0).clamp_min(1e-300)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_where_rows_span_everything_new_units_add_what_activations_lack(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "dense":
        model, x, layers = mlp(3, 9, 4), torch.randn(300, 3).double(), 2
    else:
        model, x, layers = mlp(3, 9, 4), images(20)[:, :1], 3
        model = used(nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 3)))
    graph, size = trace(model, x[:2]), model[0].weight.shape[0]
    shares: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(10):
        for informed in shares:
            made = torch.Generator().manual_seed(seed)
            surgery = plan_growth(model, graph, {"0": size + 2}, generator=made, batches=[x] if informed else None)
            undo = install(model, surgery)
            shares[informed].append(float(left_over(model, x, size, layers).mean()))
            undo()
    assert sum(shares[True]) > 1.3 * sum(shares[False])


def test_with_a_loss_the_inputs_are_taken_from_the_pairs() -> None:
    model, x = mlp(3, 9, 4), torch.randn(50, 3).double()
    graph = trace(model, x[:2])
    one, two = (
        values_of(model, graph, {"0": 11}, generator=torch.Generator().manual_seed(0), batches=batches, loss=loss)
        for batches, loss in (([x], None), ([(x, "anything")], functional.mse_loss))
    )
    assert torch.equal(one["0.weight"], two["0.weight"])


def test_data_does_not_change_rows_that_have_room() -> None:
    model, x = mlp(6, 3, 2), torch.randn(20, 6).double()
    graph = trace(model, x[:2])
    one, two = (
        values_of(model, graph, {"0": 6}, generator=torch.Generator().manual_seed(0), batches=batches)
        for batches in (None, [x])
    )
    assert torch.equal(one["0.weight"], two["0.weight"])


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_pairs_are_alike_and_taken_off_each_other(count: int) -> None:
    model = convnet()
    values = values_of(model, trace(model, images(2)), {"0": 8 + count, "3": 6 + count}, "paired")
    for rows, columns, size, repeat in (("0.weight", "3.weight", 8, 1), ("3.weight", "6.weight", 6, 16)):
        made, read = values[rows][size:], values[columns][:, size * repeat :]
        read = read.unflatten(1, (count, repeat))
        for one in range(0, count - 1, 2):
            assert torch.equal(made[one], made[one + 1])
            assert torch.equal(read[:, one], -read[:, one + 1])
            assert read[:, one].any()
        if count % 2:
            assert not read[:, -1].any()
        one_each = made[::2].flatten(1)
        cosines = one_each @ one_each.T / one_each.norm(dim=1)[0].square()
        assert (cosines - torch.eye(len(one_each))).abs().max() < 1 - 1e-6
    norms = values["6.weight"][:, 6 * 16 :].unflatten(1, (count, 16)).movedim(1, 0).flatten(1).norm(dim=1)
    old = model[6].weight.detach().unflatten(1, (6, 16)).movedim(1, 0).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(norms[: count // 2 * 2], old.expand(count // 2 * 2))


def test_pairs_come_apart_with_the_first_step_and_learn() -> None:
    model, x = convnet(), images(16)
    install(model, plan_growth(model, trace(model, x[:2]), {"0": 10}, "paired"))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    functional.cross_entropy(model(x), torch.arange(16) % 5).backward()
    assert model[0].weight.grad[8:].flatten(1).norm(dim=1).min() > 0
    optimizer.step()
    assert not torch.allclose(model[0].weight[8], model[0].weight[9])


def test_depthwise_kernels_of_a_pair_are_alike() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(4), nn.Conv2d(4, 2, 1)).double()
    x = images(4)
    before = model(x).detach()
    values = values_of(model, graph := trace(model, x[:2]), {"0": 8}, "paired")
    assert torch.equal(values["1.weight"][4], values["1.weight"][5])
    assert not torch.equal(values["1.weight"][4], values["1.weight"][6])
    install(model, plan_growth(model, graph, {"0": 8}, "paired"))
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)


class Functional(nn.Module):
    """A weight that is used both ways round: it makes the hidden units and reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.tied, self.head = nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.other(x) + functional.linear(x, self.tied.weight.t()))
        return self.head(self.tied(hidden))


class TiedModules(nn.Module):
    """An embedding whose weight is the output layer's, and another reader of the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        units = self.embed(x)
        return self.head(units).sum(-1) + self.mix(units).sum(-1)


@pytest.mark.parametrize("kind", ["functional", "modules"])
@pytest.mark.parametrize("method", ["paired", "gradmax", "tiny"])
def test_a_weight_used_both_ways_round_keeps_the_function(kind: str, method: str) -> None:
    model: Any = (Functional if kind == "functional" else TiedModules)().double()
    x = torch.randn(9, 5).double() if kind == "functional" else torch.randint(0, 7, (9, 3))
    graph, before = trace(model, x), model(x).detach()
    sizes = {width.name: width.size + 4 for width in graph.resizable if width.mixed is None}
    assert sizes

    def squares(answer: Tensor, target: None) -> Tensor:
        return answer.square().mean()

    install(model, plan_growth(model, graph, sizes, method, batches=[(x, None)], loss=squares))
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)


def test_random_has_the_norms_of_rows_and_columns() -> None:
    model, x = used(Residual()), images(4)
    values = values_of(model, trace(model, x), {"stem": 11}, "random")
    for name, dim in (("stem.weight", 0), ("conv2.weight", 0), ("conv1.weight", 1), ("head.weight", 1)):
        old = model.get_parameter(name).detach().movedim(dim, 0).flatten(1).norm(dim=1).mean()
        new = values[name].movedim(dim, 0)[8:].flatten(1).norm(dim=1)
        torch.testing.assert_close(new, old.expand(3))


@pytest.mark.parametrize("method", ["gradmax", "tiny"])
def test_gradient_methods_are_repeatable_and_leave_the_global_random_state(method: str) -> None:
    model, x = convnet(), images(8)
    graph = trace(model, x[:2])
    state = torch.get_rng_state()
    one, two = (
        values_of(
            model,
            graph,
            {"0": 10},
            method,
            generator=torch.Generator().manual_seed(0),
            batches=[(x, torch.arange(8) % 5)],
            loss=functional.cross_entropy,
        )
        for _ in range(2)
    )
    assert torch.equal(one["0.weight"], two["0.weight"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["gradmax", "tiny"])
def test_widths_grow_together_as_they_would_alone(method: str) -> None:
    """With a fan-out of 0 they do not see each other."""
    model, x = mlp(6, 5, 4, 3), torch.randn(40, 6).double()
    graph, pairs = trace(model, x[:2]), [(x, torch.randn(40, 3).double())]

    def rows(sizes: dict[str, int], name: str) -> Tensor:
        torch.manual_seed(0)
        return values_of(model, graph, sizes, method, batches=pairs, loss=functional.mse_loss)[name]

    together = rows({"0": 7, "2": 4}, "0.weight")
    assert torch.equal(rows({"0": 7}, "0.weight"), together)
    both = rows({"0": 7, "2": 6}, "0.weight")
    torch.testing.assert_close(both, together, rtol=1e-4, atol=1e-5)
