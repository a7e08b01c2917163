"""Mixtures of experts whose weights lie in one tensor: the stream, the inner width, whole experts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import ResizeError
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.trace import trace
from tests.helpers.cases import shuffled
from tests.helpers.networks.experts import Experts, Mixture, PickedExperts

WORDS = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
WAYS = [{"stored": "out in"}, {"stored": "in out", "bias": True}]


def mixture(**options: object) -> Mixture:
    torch.manual_seed(0)
    return Mixture(**options)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(WORDS)


def router_of(model: nn.Module) -> nn.Linear:
    return next(module for name, module in model.named_modules() if name.endswith("router"))  # pyright: ignore


def far(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_stream_and_inner_widths_permute_prune_and_train_on(way: dict[str, object]) -> None:
    model = mixture(**way)
    graph = trace(model, WORDS)
    experts = {"blocks.0.router": 4, "blocks.1.router": 4}
    assert graph.sizes == {"words": 16, "blocks.0": 24, "blocks.1": 24, **experts}
    expected = outputs(model)
    assert far(outputs(copy.deepcopy(model).slowly()), expected) < 1e-5
    graph = evolvenet.resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    assert far(outputs(model), expected) < 1e-5
    graph = evolvenet.prune(model, graph, {"words": 8, "blocks.0": 16, "blocks.1": 8, "blocks.0.router": 3})
    assert graph.sizes == trace(model, WORDS).sizes
    assert far(outputs(copy.deepcopy(model).slowly()), outputs(model)) < 1e-5
    model(WORDS).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_pruning_inner_units_is_setting_what_they_pass_on_to_zero() -> None:
    model = mixture()
    graph = trace(model, WORDS)
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.blocks[0].down[:, :, 8:16] = 0  # pyright: ignore
    keep = IndexMap.keep([*range(8), *range(16, 24)], size=24)
    evolvenet.resize(model, graph, {"blocks.0": keep})
    assert far(outputs(model), outputs(without)) < 1e-5


def test_inner_units_grow_without_a_change_and_learn() -> None:
    model = mixture()
    expected = outputs(model)
    graph = evolvenet.grow(model, trace(model, WORDS), {"blocks.0": 32})
    assert far(outputs(model), expected) < 1e-6
    model(WORDS).square().mean().backward()
    new = model.blocks[0].down.grad[:, :, 24:]  # pyright: ignore
    assert graph.sizes["blocks.0"] == 32
    assert float(new.abs().max()) > 0


def test_sizes_that_the_op_cannot_multiply_are_refused() -> None:
    model = mixture()
    graph = trace(model, WORDS)
    assert graph.widths["blocks.0"].multiple == graph.widths["words"].multiple == 8
    with pytest.raises(ResizeError, match="needs a multiple of 8 units"):
        evolvenet.prune(model, graph, {"blocks.0": 17})
    assert "in multiples of 8 units" in graph.explain("blocks.0")


def test_policies_and_allocation_propose_multiples() -> None:
    model = mixture()
    graph = trace(model, WORDS)
    sizes = evolvenet.allocate(model, graph, parameters=graph.parameters // 2, batches=[WORDS])
    assert {sizes[name] % 8 for name in ("words", "blocks.0", "blocks.1")} == {0}
    assert evolvenet.prune(model, graph, sizes, batches=[WORDS]).parameters <= graph.parameters * 0.55


def test_a_width_of_no_multiple_keeps_its_size() -> None:
    """12 units of single precision are a multiple of 4, in half precision they would be none of 8."""
    model = mixture(inner=12)
    assert trace(model, WORDS).widths["blocks.0"].multiple == 4


def test_an_expert_goes_with_its_row_of_the_router() -> None:
    """The same as a router that never selects it."""
    model = mixture(bias=True)
    graph = trace(model, WORDS)
    tensors = {tie.tensor.removeprefix("blocks.0.") for tie in graph.widths["blocks.0.router"].ties}
    assert tensors == {"router.weight", "router.bias", "up", "down", "up_bias", "down_bias"}
    without = copy.deepcopy(model)
    with torch.no_grad():
        router_of(without).bias[1] = -1e9
    evolvenet.resize(model, graph, {"blocks.0.router": IndexMap.keep([0, 2, 3], size=4)})
    assert far(outputs(model), outputs(without)) < 1e-5
    assert far(outputs(copy.deepcopy(model).slowly()), outputs(model)) < 1e-5


def test_the_expert_with_the_least_weights_goes_first() -> None:
    model = mixture()
    block = model.get_submodule("blocks.0")
    assert isinstance(block, Experts)
    with torch.no_grad():
        block.up[2] *= 0.1
        block.down[2] *= 0.1
    kept = block.up[[0, 1, 3]].clone()
    evolvenet.prune(model, trace(model, WORDS), {"blocks.0.router": 3})
    assert torch.equal(block.up, kept)


def test_as_many_experts_stay_as_are_selected_and_none_is_added() -> None:
    model = mixture()
    graph = trace(model, WORDS)
    assert graph.widths["blocks.0.router"].smallest == 2
    with pytest.raises(ResizeError, match="needs 2 units or more"):
        evolvenet.prune(model, graph, {"blocks.0.router": 1})
    with pytest.raises(ResizeError, match="cannot grow"):
        evolvenet.grow(model, graph, {"blocks.0.router": 5})


ROWS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("way", ["index", "one", "embedding", "scatter"])
def test_experts_that_are_picked_in_other_ways(way: str) -> None:
    torch.manual_seed(0)
    model = PickedExperts(way).double()
    graph = trace(model, ROWS)
    assert graph.sizes == {"first": 5, "router": 6, "weight": 5}
    with torch.no_grad():
        expected = model(ROWS)
        graph = evolvenet.resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
        assert far(model(ROWS), expected) < 1e-12
        without = copy.deepcopy(model)
        router_of(without).bias[2] = -1e9
        evolvenet.resize(model, graph, {"router": IndexMap.keep([0, 1, 3, 4, 5], size=6)})
        assert far(model(ROWS), without(ROWS)) < 1e-12


@pytest.mark.parametrize(
    ("way", "reason"), [("code", "computes with the places"), ("one_hot", "computes with"), ("output", "output")]
)
def test_experts_stay_where_their_places_are_more_than_places(way: str, reason: str) -> None:
    torch.manual_seed(0)
    graph = trace(PickedExperts(way).double(), ROWS)
    frozen = graph.widths["router"].frozen
    assert frozen is not None
    assert reason in frozen


def test_units_that_compete_and_are_not_routed_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2))
    assert "makes its units compete" in str(trace(model, ROWS.float()).widths["0"].frozen)


def products(block: Experts, model: nn.Module, words: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Inputs and outputs of a block's last product, and where the rows of each expert end."""
    seen: list[tuple[Tensor, Tensor, list[int]]] = []
    run = block.product

    def watched(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        seen.append((x, out := run(x, weight, ends, bias, ids), ends.tolist()))
        return out

    block.product = watched
    with torch.no_grad():
        model(words)
    block.product = run
    return seen[-1]


@pytest.mark.parametrize("stored", ["out in", "in out"])
def test_an_expert_gets_the_least_squares_of_the_samples_that_are_routed_to_it(stored: str) -> None:
    model = mixture(stored=stored)
    model.words = nn.Embedding(2000, 16)
    words = torch.randint(2000, (384, 16))
    cut = copy.deepcopy(model)
    evolvenet.prune(cut, trace(model, words[:2]), {"blocks.1": 16}, batches=[words])
    _, expected, ends = products(model.blocks[1], model, words)  # pyright: ignore[reportArgumentType]
    inputs, outputs, same_ends = products(cut.blocks[1], cut, words)  # pyright: ignore[reportArgumentType]
    assert ends == same_ends
    for start, end in itertools.pairwise([0, *ends]):
        x, y = inputs[start:end].double(), expected[start:end].double()
        least = (x @ torch.linalg.lstsq(x, y).solution - y).square().sum()
        assert (outputs[start:end].double() - y).square().sum() < 1.01 * least


def test_experts_are_cut_where_the_router_sends_other_samples_to_those_that_stay() -> None:
    model = mixture()
    graph = evolvenet.prune(
        model, trace(model, WORDS), {"words": 8, "blocks.0.router": 3}, batches=[torch.randint(11, (64, 8))]
    )
    assert graph.sizes["blocks.0.router"] == 3
    assert bool(outputs(model).isfinite().all())


def test_groups_of_experts_go_whole_where_the_router_selects_groups_first() -> None:
    torch.manual_seed(0)
    model, x = PickedExperts("groups").double(), torch.randn(20, 4, dtype=torch.float64)
    graph = trace(model, x)
    width = graph.widths["router"]
    assert (width.size, width.frozen, width.smallest) == (3, None, 2)
    assert {(tie.tensor, tie.repeat) for tie in width.ties} == {(f"router.{n}", 2) for n in ("weight", "bias")} | {
        ("weight", 2)
    }
    with torch.no_grad():
        model.router.bias[2:4] = -99  # this group is never selected
        expected = model(x)
        evolvenet.resize(model, graph, {"router": IndexMap.keep([0, 2], size=3)})
        assert far(model(x), expected) < 1e-12
    assert (model.n_groups, model.router.out_features) == (2, 4)
