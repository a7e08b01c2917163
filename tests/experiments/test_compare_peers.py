"""What peers keep: the count fits, the best units stay, and the projection is that of its formula."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import evolvenet
from experiments.compare import peers
from experiments.models.resnet import ResNet

EXAMPLE = torch.zeros(2, 1, 8, 8)


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, evolvenet.WidthGraph]:
    model = ResNet(1, 10, (16, 48), (1, 2), (1, 2), hidden=24).eval()
    return model, evolvenet.trace(model, EXAMPLE)


def chain(*widths: int) -> tuple[nn.Sequential, evolvenet.WidthGraph]:
    """Dense layers one after the other without anything in between, in float64."""
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]).double()
    return model, evolvenet.trace(model, torch.zeros(1, widths[0], dtype=torch.float64))


@pytest.mark.parametrize("ratio", [30, 50, 70, 90])
def test_counts_are_met_within_one_percent(resnet: tuple[nn.Module, evolvenet.WidthGraph], ratio: int) -> None:
    model, graph = resnet
    target = round((1 - ratio / 100) * graph.parameters)
    found = {
        "equal": peers.equal_sizes(graph, target),
        "random": sizes(peers.best_of_all(graph, peers.random_scores(graph, ratio), target)),
        "projection": peers.projection_sizes(model, graph, target),
    }
    for name, proposed in found.items():
        assert proposed.keys() == graph.sizes.keys(), name
        assert abs(graph.proposed_parameters(proposed) - target) <= 0.01 * graph.parameters, name


def sizes(kept: peers.Maps) -> dict[str, int]:
    return {name: index_map.new_size for name, index_map in kept.items()}


@functools.cache
def narrow() -> evolvenet.WidthGraph:
    return evolvenet.trace(ResNet(1, 10, (16, 48), (1, 2), (1, 2), hidden=24), EXAMPLE)


@given(share=st.floats(0.1, 0.95))
def test_equal_sizes_differ_from_one_factor_by_less_than_a_unit(share: float) -> None:
    found = peers.equal_sizes(narrow(), round(share * narrow().parameters))
    low = max((found[width.name] - 1) / width.size for width in narrow().resizable)
    high = min((found[width.name] + 1) / width.size for width in narrow().resizable)
    assert low <= high


def test_a_count_that_cannot_be_met_is_refused() -> None:
    _, graph = chain(3, 2, 3)
    with pytest.raises(ValueError, match="expected 11 parameters within 1%, the nearest that fits is 12"):
        peers.equal_sizes(graph, 11)


def test_the_best_units_stay_in_their_order() -> None:
    _, graph = chain(3, 5, 2)
    scores = {"0": torch.tensor([0.3, 0.9, 0.1, 0.2, 0.8])}
    assert peers.best(graph, scores, {"0": 3})["0"].indices == (0, 1, 4)


def test_over_the_whole_network_no_unit_that_goes_beats_one_that_stays(
    resnet: tuple[nn.Module, evolvenet.WidthGraph],
) -> None:
    _, graph = resnet
    scores = peers.random_scores(graph, 3)
    kept = peers.best_of_all(graph, scores, graph.parameters // 2)
    stays = torch.cat([scores[name][list(index_map.indices)] for name, index_map in kept.items()])
    goes = torch.cat([scores[name][list(index_map.removed)] for name, index_map in kept.items()])
    assert goes.max() < stays.min()


def test_random_scores_depend_on_the_seed(resnet: tuple[nn.Module, evolvenet.WidthGraph]) -> None:
    one, same, other = (peers.random_scores(resnet[1], seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_projection_sizes_are_the_ranks_of_producers_of_low_rank() -> None:
    model, graph = chain(12, 10, 10, 4)
    for name, rank in (("0", 3), ("1", 5)):
        weight = model.get_parameter(f"{name}.weight").data
        rows, columns = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64)).Q for n in weight.shape)
        weight.copy_(rows @ columns.T)
    # All directions weigh the same, so one share of the energy gives ranks in the ratio 3 : 5.
    assert peers.projection_sizes(model, graph, 3 * 12 + 5 * 3 + 4 * 5) == {"0": 3, "1": 5}


def test_several_producers_stand_side_by_side(resnet: tuple[nn.Module, evolvenet.WidthGraph]) -> None:
    model, graph = resnet
    width = graph.widths["stem"]
    want = [model.get_parameter(f"{name}.weight").flatten(1) for name in ("stem", "blocks.0.conv2")]
    assert torch.equal(peers.producer_rows(model, width), torch.cat(want, dim=1).double())


def projected(rows: Tensor, size: int) -> Tensor:
    """The projector on the leading directions, `[units, units]`, from the eigenvectors of the Gram matrix."""
    leading = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -size:]
    return leading @ leading.T


def test_the_projection_is_the_projectors_block_from_kept_to_removed_units() -> None:
    rows = torch.randn(7, 20, dtype=torch.float64)
    torch.testing.assert_close(peers.projection(rows, 4), projected(rows, 4)[4:, :4])


def test_the_projections_error_is_the_term_that_it_leaves_out() -> None:
    """A linear network, its producer of exactly the kept rank: all that is missing is U21·U21ᵀ·y_removed."""
    model, graph = chain(9, 6, 3)
    model.get_parameter("0.weight").data.copy_(torch.randn(6, 4).double() @ torch.randn(4, 9).double())
    x = torch.randn(11, 9, dtype=torch.float64)
    rows, reads = (model.get_parameter(f"{name}.weight").detach().clone() for name in (0, 1))
    want = model(x)
    evolvenet.resize(model, graph, peers.project_consumers(model, graph, {"0": 4}))
    left_out = (x @ rows[4:].T) @ projected(rows, 4)[4:, 4:].T
    torch.testing.assert_close(model(x), want - left_out @ reads[:, 4:].T)


def test_the_projection_is_exact_where_the_directions_lie_in_the_kept_units() -> None:
    model, graph = chain(9, 6, 5, 3)
    model.get_parameter("0.weight").data[4:] = 0
    model.get_parameter("1.weight").data[3:] = 0
    x = torch.randn(11, 9, dtype=torch.float64)
    want = model(x)
    evolvenet.resize(model, graph, peers.project_consumers(model, graph, {"0": 4, "1": 3}))
    torch.testing.assert_close(model(x), want)


def test_the_projection_at_every_place_of_kernels_and_flattened_maps() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Conv2d(5, 4, 2), nn.Flatten(), nn.Linear(4 * 9, 2)).double()
    graph = evolvenet.trace(model, torch.zeros(1, 1, 6, 6, dtype=torch.float64))
    begin, conv, dense = (model.get_parameter(f"{name}.weight").detach().clone() for name in (0, 1, 3))
    dense = dense.view(2, 4, 9)
    first, second = peers.projection(begin.flatten(1), 3), peers.projection(conv.flatten(1), 2)
    kept = peers.project_consumers(model, graph, {"0": 3, "1": 2})
    assert {name: index_map.indices for name, index_map in kept.items()} == {"0": (0, 1, 2), "1": (0, 1)}
    want = conv[:, :3] + torch.einsum("orhw,rk->okhw", conv[:, 3:], first)
    torch.testing.assert_close(model.get_parameter("1.weight")[:, :3].detach(), want)
    want = dense[:, :2] + torch.einsum("ori,rk->oki", dense[:, 2:], second)
    torch.testing.assert_close(model.get_parameter("3.weight").detach().view(2, 4, 9)[:, :2], want)
