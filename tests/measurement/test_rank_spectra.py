"""The spectrum of a rank is that of its layer's outputs, whatever its basis, and policies get its squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.linalg.decompositions import roots
from evolvenet.linalg.spectrum import energy_shares
from evolvenet.lowrank.kinds import kind_named
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.past_events import PastEvents
from evolvenet.measurement.rank_spectra import rank_spectrum
from evolvenet.measurement.width_statistics import width_statistics
from evolvenet.tracing.trace import trace
from tests.helpers.factorized import correlated, decaying, mixed_chain, moment_of, seeded, weight_of


def example(layer: nn.Module, kind: str, ranks: tuple[int, ...]) -> tuple[nn.Sequential, FactoredLayer]:
    """A factorized layer with mixed ranks between two others."""
    generator = seeded()
    chain = mixed_chain(decaying(layer, generator), kind, ranks, generator)
    return nn.Sequential(chain, nn.ReLU()), chain


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to 1e-6 of the largest."""
    torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=1e-6 * float(expected[0]))


@pytest.mark.parametrize("bias", [True, False])
def test_of_a_dense_layer_it_is_that_of_the_whitened_weight(bias: bool) -> None:
    model, chain = example(nn.Linear(10, 8, bias), "svd", (6,))
    x = correlated(80, 10, seeded(1))
    graph = trace(model, x)
    weight = weight_of(chain)
    assert_close(evolvenet.spectra(model, graph)["0.0"], torch.linalg.svdvals(weight))
    root, _ = roots(moment_of(x, (), centred=bias), 1e-15)
    assert_close(evolvenet.spectra(model, graph, [x[:30], x[30:]])["0.0"], torch.linalg.svdvals(weight @ root))


@pytest.mark.parametrize(
    ("kind", "ranks"), [("svd", (6,)), ("spatial", (6,)), ("tucker", (5, 7)), ("tensor_train", (5, 7, 7))]
)
def test_of_a_convolution_it_is_that_of_the_unfoldings(kind: str, ranks: tuple[int, ...]) -> None:
    model, chain = example(nn.Conv2d(6, 8, 3, bias=False), kind, ranks)
    x = correlated(20, 6, seeded(1), 6, 6)
    graph = trace(model, x[:2])
    weight = weight_of(chain)
    found, unfoldings = evolvenet.spectra(model, graph), kind_named(kind).unfoldings(weight)
    for values, matrix in zip(found.values(), unfoldings, strict=True):
        assert_close(values, torch.linalg.svdvals(matrix))


def test_with_data_the_positions_that_a_rank_is_measured_at_count() -> None:
    x = correlated(20, 6, seeded(1), 6, 6)
    model, chain = example(nn.Conv2d(6, 8, 3), "tucker", (5, 7))
    weight = weight_of(chain)
    found = evolvenet.spectra(model, trace(model, x[:2]), [x])
    one, _ = roots(moment_of(x, (1, 1), centred=False), 1e-15)
    inputs = torch.einsum("oihw,ij->johw", weight, one).flatten(1)
    assert_close(found["0.0"], torch.linalg.svdvals(inputs))
    patches, _ = roots(moment_of(x, (3, 3), centred=True), 1e-15)
    assert_close(found["0.1"], torch.linalg.svdvals(weight.flatten(1) @ patches))

    model, chain = example(nn.Conv2d(6, 8, 3), "spatial", (6,))
    column, _ = roots(moment_of(x, (3, 1), centred=True), 1e-15)
    matrix = weight_of(chain).movedim(0, 2).reshape(18, -1)
    assert_close(evolvenet.spectra(model, trace(model, x[:2]), [x])["0.0"], torch.linalg.svdvals(column @ matrix))


def test_policies_get_the_squares_and_other_widths_are_measured_as_before() -> None:
    x = correlated(2000, 10, seeded(2))
    plain = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    graph = trace(plain, x)
    spectrum = evolvenet.spectra(plain, graph, [x])["0"]
    generator = seeded(3)
    chain = mixed_chain(plain[0], "svd", (10,), generator)  # pyright: ignore[reportArgumentType]
    model = nn.Sequential(chain, *list(plain)[1:])
    graph = trace(model, x)
    moments = collect(model, graph, [x])
    known = width_statistics(model, graph, moments, PastEvents().next(0.5))
    torch.testing.assert_close(evolvenet.spectra(model, graph, [x])["0.1"], spectrum)
    rank = known["0.0"]
    assert rank.growable
    torch.testing.assert_close(torch.tensor(rank.energies).double(), energy_shares(rank.spectrum))
    assert list(rank.energies) == sorted(rank.energies, reverse=True)
    exact = energy_shares(rank_spectrum(model, graph, graph.widths["0.0"], moments))
    torch.testing.assert_close(torch.tensor(rank.energies).double(), exact, rtol=0.05, atol=1e-3)


def test_the_shrinkage_of_few_samples_does_not_depend_on_the_basis() -> None:
    x = correlated(20, 10, seeded(4))
    generator = seeded(5)
    layer = decaying(nn.Linear(10, 8), generator)
    found = []
    for spread in (1.0, 100.0):
        model = nn.Sequential(mixed_chain(layer, "svd", (8,), generator, spread), nn.ReLU())
        graph = trace(model, x)
        statistics = collect(model, graph, [x])
        found.append(rank_spectrum(model, graph, graph.widths["0.0"], statistics, shrink=True))
        assert not torch.allclose(found[-1], rank_spectrum(model, graph, graph.widths["0.0"], statistics), rtol=1e-3)
    assert_close(found[0], found[1])


def test_a_consumer_in_a_chain_of_several_is_weighted_by_all_that_follow() -> None:
    model, chain = example(nn.Conv2d(6, 8, 3, bias=False), "tucker", (5, 7))
    x = correlated(20, 6, seeded(1), 6, 6)
    graph = trace(model, x[:2])
    found = evolvenet.spectra(model, graph)
    with torch.no_grad():
        chain.factors[2].get_parameter("weight").mul_(3)
    again = evolvenet.spectra(model, graph)
    for name, values in found.items():
        torch.testing.assert_close(again[name], 3 * values)
    assert functional.conv2d(x, weight_of(chain)).shape == model(x).shape
