"""A rank that is rotated before it is cut loses what the truncated SVD of the outputs loses, whatever its basis was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import evolvenet
from evolvenet.engine.replica_update import plan_replica_update
from evolvenet.engine.replica_widths import united
from evolvenet.graph.index_map import IndexMap
from evolvenet.lowrank.kinds import kind_named
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.rank_basis import rank_bases
from evolvenet.pruning.selection import plan_cut, plan_prune
from evolvenet.surgery.resize_model import compile_surgery, install
from evolvenet.tracing.trace import trace
from tests.helpers.factorized import correlated, decaying, mix, mixed_chain, moment_of, seeded, weight_of

SPACE = (6, 6)
CASES: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "dense": (lambda bias: nn.Linear(14, 12, bias), "svd", (9,)),
    "conv svd": (lambda bias: nn.Conv2d(6, 12, 3, bias=bias), "svd", (9,)),
    "spatial": (lambda bias: nn.Conv2d(6, 12, 3, bias=bias), "spatial", (9,)),
    "tucker": (lambda bias: nn.Conv2d(7, 12, 3, bias=bias), "tucker", (6, 8)),
    "tensor train": (lambda bias: nn.Conv2d(7, 12, 3, bias=bias), "tensor_train", (6, 9, 8)),
    "transposed": (lambda bias: nn.ConvTranspose2d(6, 12, 3, bias=bias), "svd", (9,)),
}


def example(case: str, *, bias: bool = True, seed: int = 0) -> tuple[nn.Sequential, evolvenet.WidthGraph, Tensor]:
    """A model of one factorized layer with mixed ranks, its graph, and inputs."""
    make, kind, ranks = CASES[case]
    generator = seeded(seed)
    layer = decaying(make(bias), generator)
    x = correlated(100, make(bias).weight.shape[case != "transposed"], generator, *(() if case == "dense" else SPACE))
    model = nn.Sequential(mixed_chain(layer, kind, ranks, generator))
    return model, trace(model, x[:2]), x


def chain_of(model: nn.Sequential) -> FactoredLayer:
    chain = model[0]
    assert isinstance(chain, FactoredLayer)
    return chain


def lost(model: nn.Sequential, x: Tensor, before: Tensor) -> float:
    """Mean squared error of the outputs of one position."""
    with torch.no_grad():
        return float((model(x) - before).square().sum(1).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_rotation_keeps_the_function_and_makes_both_factors_of_one_size(case: str, dtype: torch.dtype) -> None:
    model, graph, x = example(case)
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        before = model(x)
    bases = rank_bases(model, graph, graph.sizes, collect(model, graph, [x]))
    assert list(bases) == list(graph.sizes)
    install(model, compile_surgery(model, graph, {n: IndexMap.identity(s) for n, s in graph.sizes.items()}, bases))
    with torch.no_grad():
        apart = float((model(x) - before).abs().max() / before.abs().max())
    assert apart < (1e-10 if dtype == torch.float64 else 1e-5)
    if len(bases) == 1:
        first, last = chain_of(model).factors
        rows = first.get_parameter("weight").transpose(0, int(case == "transposed")).flatten(1).norm(dim=1)
        columns = last.get_parameter("weight").transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(rows, columns, rtol=1e-3, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_without_data_a_cut_of_one_rank_loses_the_tail_of_the_weight(case: str) -> None:
    model, graph, _ = example(case)
    kind = CASES[case][1]
    whole = weight_of(chain_of(model))
    unfoldings = kind_named(kind).unfoldings(whole)
    for (name, size), matrix in zip(graph.sizes.items(), unfoldings, strict=True):
        tail = torch.linalg.svdvals(matrix)[size // 2 :]
        undo = install(model, plan_prune(model, graph, {name: size // 2}))
        torch.testing.assert_close((weight_of(chain_of(model)) - whole).norm(), tail.norm(), rtol=1e-6, atol=0)
        undo()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ["dense", "conv svd"])
def test_with_data_a_cut_loses_the_tail_of_the_outputs(case: str, bias: bool) -> None:
    model, graph, x = example(case, bias=bias)
    weight = weight_of(chain_of(model)).flatten(1)
    moment = moment_of(x, CASES[case][0](bias).kernel_size if x.dim() > 2 else (), centred=bias)
    energies = torch.linalg.eigvalsh(weight @ moment @ weight.mT).flip(0)
    statistics = collect(model, graph, [x])
    with torch.no_grad():
        before = model(x)
    (name,) = graph.sizes
    for size in range(1, 9):
        undo = install(model, plan_prune(model, graph, {name: size}, statistics))
        assert lost(model, x, before) == pytest.approx(float(energies[size:].sum()), rel=1e-4)
        undo()
        worse = install(model, plan_cut(model, graph, {name: IndexMap.keep(range(size), 9)}, statistics))
        assert lost(model, x, before) > 1.1 * float(energies[size:].sum())
        worse()


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10_000), st.floats(1, 300))
def test_the_basis_that_a_rank_had_before_has_no_effect(inputs: int, outputs: int, seed: int, spread: float) -> None:
    generator, rank = seeded(seed), min(inputs, outputs)
    x = correlated(60, inputs, generator)
    layer = decaying(nn.Linear(inputs, outputs), generator)
    model = nn.Sequential(mixed_chain(layer, "svd", (rank,), generator, spread))
    graph = trace(model, x)
    with torch.no_grad():
        before = model(x)
    matrix, moment = weight_of(chain_of(model)), moment_of(x, (), centred=True)
    tail = torch.linalg.eigvalsh(matrix @ moment @ matrix.mT).flip(0)[rank - 1 :].clamp_min(0).sum()
    install(model, plan_prune(model, graph, {"0.0": rank - 1}, collect(model, graph, [x])))
    assert lost(model, x, before) <= 1.01 * float(tail) + 1e-9 * float(before.square().mean())


def test_both_ranks_of_a_tucker_layer_cut_at_once_and_reconstructed_are_as_good_as_tucker_from_the_whole_weight() -> (
    None
):
    generator = seeded(1)
    layer = decaying(nn.Conv2d(7, 12, 3), generator)
    x = torch.randn(100, 7, *SPACE, generator=generator).double()
    model = nn.Sequential(mixed_chain(layer, "tucker", (7, 12), generator))
    before = model(x).detach()
    kind, weight = kind_named("tucker"), weight_of(chain_of(model))
    best = kind.merged(kind.decompose(weight, (4, 5), moment_of(x, (3, 3), centred=True)), 7)
    out = nn.functional.conv2d(x, best)
    out = out - out.mean((0, 2, 3), keepdim=True) + before.mean((0, 2, 3), keepdim=True)
    expected = float((out - before).square().sum(1).mean())
    evolvenet.prune(model, trace(model, x[:2]), {"0.0": 4, "0.1": 5}, batches=[x])
    assert chain_of(model).ranks == (4, 5)
    assert lost(model, x, before) < 1.05 * expected


@pytest.mark.parametrize("case", ["dense", "conv svd"])
def test_a_reconstruction_after_the_cut_leaves_the_optimum(case: str) -> None:
    model, graph, x = example(case)
    before = model(x).detach()
    (name,) = graph.sizes
    undo = install(model, plan_prune(model, graph, {name: 4}, collect(model, graph, [x])))
    best = lost(model, x, before)
    undo()
    evolvenet.prune(model, graph, {name: 4}, batches=[x])
    assert lost(model, x, before) < 1.01 * best


def test_dead_inputs_and_unused_coordinates_do_no_harm() -> None:
    model, graph, x = example("dense")
    x[:, :3] = 0
    first, last = chain_of(model).factors
    with torch.no_grad():
        first.get_parameter("weight")[2] = 0
        last.get_parameter("weight")[:, 5] = 0
        before = model(x)
    graph = evolvenet.prune(model, graph, {"0.0": 8}, batches=[x])
    assert lost(model, x, before) < 1e-12
    # The coordinate that has no effect keeps a row, without which it would never be trained.
    rows = first.get_parameter("weight").detach().norm(dim=1)
    assert float(rows.min() / rows.max()) > 1e-3
    graph = evolvenet.prune(model, graph, {"0.0": 7}, batches=[x])
    assert lost(model, x, before) < 1e-12
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    evolvenet.prune(model, graph, {"0.0": 3}, batches=[x])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_rank_grows_without_a_change_of_the_function_and_a_cut_takes_the_new_units_first() -> None:
    model, graph, x = example("tucker")
    before = model(x).detach()
    sizes = dict(graph.sizes)
    graph = evolvenet.grow(model, graph, {name: size + 2 for name, size in sizes.items()})
    assert lost(model, x, before) < 1e-20
    assert chain_of(model).ranks == (8, 10)
    evolvenet.prune(model, graph, sizes, batches=[x])
    assert lost(model, x, before) < 1e-12


def test_a_rank_and_the_width_before_it_are_cut_in_one_call() -> None:
    generator = seeded(3)
    layer = decaying(nn.Linear(10, 8), generator)
    model = nn.Sequential(nn.Linear(5, 10).double(), nn.ReLU(), mixed_chain(layer, "svd", (8,), generator))
    x = torch.randn(200, 5, generator=generator).double()
    with torch.no_grad():
        # Units 3 … 9 are twice the first one: three directions pass, whatever the rank.
        for parameter in model[0].parameters():
            parameter[3:] = parameter[:1] * 2
        before = model(x)
    graph, sizes = trace(model, x), {"0": 3, "2.0": 3}
    undo = install(model, plan_prune(model, graph, sizes, collect(model, graph, [x])))
    assert lost(model, x, before) < 1e-9 * float(before.square().mean())
    undo()
    assert evolvenet.prune(model, graph, sizes, batches=[x]).sizes == sizes
    assert lost(model, x, before) < 1e-9 * float(before.square().mean())


def test_coordinates_with_kernels_of_their_own_are_pruned_as_an_ordinary_width() -> None:
    generator = seeded(4)
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU()).double()
    evolvenet.factorize(model, {"0": ("cp", 9)})
    x = torch.randn(50, 6, *SPACE, generator=generator).double()
    graph = trace(model, x[:2])
    assert graph.widths["0.0"].rank_of == "0"
    assert rank_bases(model, graph, graph.sizes) == {}
    surgery = plan_prune(model, graph, {"0.0": 4}, collect(model, graph, [x]))
    assert not surgery.bases
    before = model(x).detach()
    install(model, surgery)
    assert model(x).shape == before.shape


def test_ranks_within_channel_groups_are_no_widths_and_the_groups_are_cut_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    evolvenet.factorize(model, {"1": ("svd", 1)})
    x = torch.randn(50, 3, *SPACE, generator=seeded(5)).double()
    graph = trace(model, x[:2])
    assert all(width.rank_of is None for width in graph.widths.values())
    before = model(x)
    evolvenet.prune(model, graph, {name: size - 1 for name, size in graph.sizes.items()}, batches=[x])
    assert model(x).shape == before.shape


def test_layers_that_share_their_factors_share_the_rotation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    model = Twice().double()
    evolvenet.factorize(model, {"one": 3})
    x = torch.randn(60, 8, generator=seeded(6)).double()
    mix(model.one, seeded(7))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        before = model(x)
    graph = evolvenet.grow(model, trace(model, x), {"one.0": 5})
    graph = evolvenet.prune(model, graph, {"one.0": 3}, batches=[x])
    assert graph.widths["one.0"].rank_of == "one"
    assert float((model(x) - before).detach().abs().max()) < 1e-9


def test_a_replica_in_the_same_step_is_rotated_by_the_same_matrix() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, _, self.x = example("dense")
            self.slow = deepcopy(self.net)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), self.slow(x)

    model = Both()
    with torch.no_grad():
        model.slow.get_parameter("0.1.bias").add_(1.0)
        before = model(model.x)
    graph = united(trace(model, model.x), "slow", "net")
    assert {width.name: width.rank_of for width in graph.resizable} == {"net.0.0": "net.0"}
    graph = evolvenet.grow(model, graph, {"net.0.0": 12})
    surgery = plan_prune(model, graph, {"net.0.0": 7}, collect(model, graph, [model.x]))
    install(model, surgery)
    apart = [float((a - b).detach().norm()) for a, b in zip(model(model.x), before, strict=True)]
    assert apart[0] == pytest.approx(apart[1], rel=1e-6)
    assert apart[0] < 0.05 * float(before[0].norm())


def test_a_bias_of_the_factor_before_a_rank_is_rotated_with_its_rows() -> None:
    model, _, x = example("dense")
    first = chain_of(model)[0]
    first.bias = nn.Parameter(torch.randn(9, generator=seeded(2)).double())
    graph = trace(model, x)
    assert graph.widths["0.0"].rank_of == "0"
    before = model(x).detach()
    moment = moment_of(x, (), centred=True)
    weight = weight_of(chain_of(model))
    tail = torch.linalg.eigvalsh(weight @ moment @ weight.mT).flip(0)[6:].sum()
    install(model, plan_prune(model, graph, {"0.0": 6}, collect(model, graph, [x])))
    assert lost(model, x, before) == pytest.approx(float(tail), rel=1e-4)


def test_a_replica_gets_the_rotation_of_the_model() -> None:
    model, graph, x = example("dense")
    replica, _, _ = example("dense")
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=seeded(8)).double() * parameter.abs().mean()
        before = replica(x)
    surgery = plan_prune(model, graph, {"0.0": 5}, collect(model, graph, [x]))
    own = plan_replica_update(replica, graph, surgery, [x])
    basis = surgery.bases["0.0"]
    expected = basis.values[:5] @ chain_of(replica).factors[0].get_parameter("weight").detach()
    changed = {change.name: change for change in own.changes}
    torch.testing.assert_close(changed["0.0.weight"].value, expected)
    undo = install(replica, own)
    rotated = lost(replica, x, before)
    undo()
    install(replica, plan_replica_update(replica, graph, plan_cut(model, graph, surgery.maps), [x]))
    assert rotated < 0.5 * lost(replica, x, before)
