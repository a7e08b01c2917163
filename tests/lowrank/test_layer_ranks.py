"""The ranks of layers that are whole: break-even, costs, spectra."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evolvenet import IndexMap, factorize, resize, trace
from evolvenet.graph.restriction import Restriction
from evolvenet.lowrank.layer_ranks import LowRank, costs_of
from evolvenet.lowrank.rank_statistics import observe_whole, rank_statistics, rank_trials
from evolvenet.measurement.cost import macs, parameters, size_in_bytes
from evolvenet.measurement.output_error import output_error, outputs_on
from evolvenet.measurement.past_events import PastEvents

LOWRANK = LowRank("params", Restriction())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=(2, 1), padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5),
    ).double()  # fmt: skip


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# "0" costs more multiply-accumulates as a chain where the stride is on the second factor's axis alone: parameters decide.
KINDS = {"0": "spatial", "2": "spatial", "5": "svd", "7": "svd"}


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_costs_are_those_of_the_network_that_is_cut_and_factorized(data: st.DataObject) -> None:
    model, x = network(), images(2)
    graph = trace(model, x)
    ranks = LOWRANK.ranks(model, graph, x)
    costs = costs_of(model, graph, x, ranks)
    widths = {name: data.draw(st.integers(2, size)) for name, size in graph.sizes.items()}
    sizes = {rank.name: data.draw(st.integers(1, rank.break_even + 1)) for rank in ranks.values()}
    resize(model, graph, {name: IndexMap.keep(range(size), graph.sizes[name]) for name, size in widths.items()})
    chains = {
        rank.layer: (rank.kind.name, sizes[rank.name]) for rank in ranks.values() if sizes[rank.name] <= rank.break_even
    }
    for layer, (kind, size) in chains.items():
        factorize(model, {layer: (kind, size)})  # whole where factors have no fewer parameters at these widths
    assert costs.at("params", {**widths, **sizes}) == parameters(model)
    assert costs.at("bytes", {**widths, **sizes}) == size_in_bytes(model)
    assert costs.at("macs", {**widths, **sizes}) <= macs(model, x)


def test_a_rank_above_break_even_is_the_whole_layer() -> None:
    model, x = network(), images(2)
    graph = trace(model, x)
    ranks = LOWRANK.ranks(model, graph, x)
    assert {rank.layer: rank.kind.name for rank in ranks.values()} == KINDS | {"9": "svd"}
    costs = costs_of(model, graph, x, ranks)
    for rank in ranks.values():
        whole = rank.shape.parameters
        assert rank.kind.parameters(rank.shape, (rank.break_even,)) < whole
        assert (
            rank.kind.parameters(rank.shape, (rank.break_even + 1,)) >= whole
            or rank.break_even == rank.kind.full_rank(rank.shape)[0]
        )
        assert costs.at("params", {rank.name: rank.break_even + 1}) == parameters(model)
        assert ranks.extended.sizes[rank.name] == rank.break_even + 1


def test_a_chain_above_break_even_costs_what_the_whole_layer_does() -> None:
    model, x = network(), images(2)
    factorize(model, {"7": ("svd", 10)})
    graph = trace(model, x)
    ranks = LOWRANK.ranks(model, graph, x)
    costs = costs_of(model, graph, x, ranks)
    assert not ranks["7.0"].is_whole
    assert costs.at("params", {}) == parameters(model)
    assert costs.at("params", {"7.0": 20}) == parameters(network())
    assert ranks.unprofitable("params") == []
    larger = resize(model, graph, {"7.0": IndexMap.grow(10, 10)})
    assert [each.layer for each in LOWRANK.ranks(model, larger, x).unprofitable("params")] == ["7"]


def test_energies_are_those_of_the_outputs_where_a_cut_pays() -> None:
    model, x = network(), images(512)
    ranks = LOWRANK.ranks(model, trace(model, x[:2]), x[:2])
    seen = observe_whole(model, ranks, [x])
    assert seen is not None
    found = rank_statistics(model, ranks, seen, PastEvents())
    for name, rank in ranks.items():
        spectrum = torch.tensor(found[name].spectrum)
        assert len(spectrum) == rank.break_even + 1 == found[name].size
        assert bool((spectrum.diff() <= 1e-9).all())
        assert not found[name].growable


@pytest.mark.parametrize("layer", ["5", "7"])
def test_a_trial_is_the_error_of_the_network_with_that_layer_factorized(layer: str) -> None:
    model, x = network(), images(256)
    ranks = LOWRANK.ranks(model, trace(model, x[:2]), x[:2])
    seen = observe_whole(model, ranks, [x])
    assert seen is not None
    curve = rank_trials(model, ranks, seen, [x], shares=(0.5,))[f"{layer}.0"]
    (_, _), (size, loss), (_, last) = curve
    other = copy.deepcopy(model)
    factorize(other, {layer: ("svd", size)}, batches=[x])
    assert last == 0
    assert loss == pytest.approx(output_error(outputs_on(model, [x]), outputs_on(other, [x])), rel=0.3)
