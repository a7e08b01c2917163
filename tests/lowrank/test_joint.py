"""Losses of ranks measured at the outputs, and widths and ranks chosen together."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn

from evolvenet import prune, trace
from evolvenet.lowrank.base import Kind
from evolvenet.lowrank.budget import Option, factorizable, layer_cost, options_of
from evolvenet.lowrank.factorize import factorize
from evolvenet.lowrank.fit import observe
from evolvenet.lowrank.joint import LayerInGraph, joint
from evolvenet.lowrank.kinds import kind_named
from evolvenet.lowrank.plan import requested
from evolvenet.lowrank.sensitivity import output_losses
from evolvenet.measurement.cost import Costs, macs, parameters
from evolvenet.measurement.output_error import output_error, outputs_on
from evolvenet.measurement.width_spectra import measure
from evolvenet.pruning.allocation import energy_curve
from evolvenet.pruning.marginal_analysis import loss_at


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 5)).double()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 36, 4),
    ).double()  # fmt: skip


def decaying(model: nn.Module) -> nn.Module:
    """Weights whose singular values fall fast, as those of trained networks."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            u, s, v = torch.linalg.svd(parameter.detach().flatten(1), full_matrices=False)
            parameter.data.copy_((u * (s * torch.exp(-torch.arange(len(s)) / 4)) @ v).reshape(parameter.shape))
    return model


EXAMPLES = {"dense": (dense, (20,)), "convolutions": (convolutions, (3, 8, 8))}


@pytest.fixture(params=sorted(EXAMPLES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    build, shape = EXAMPLES[request.param]
    return decaying(build()).eval(), torch.randn(
        64, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def test_the_loss_at_a_trial_is_the_error_of_the_network_with_this_layer_factorized(
    case: tuple[nn.Module, torch.Tensor],
) -> None:
    model, x = case
    requests = requested(model, None, "auto")
    seen = observe(model, [request.target for request in requests], [x])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = output_losses(model, requests, seen, [x])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    whole = outputs_on(model, [x])
    svds = [key for key in losses.points if key[1] == "svd"]
    assert svds
    for name, kind in svds:
        for lost, error in losses.points[name, kind]:
            found = [
                output_error(whole, outputs_on(other, [x]))
                for rank in range(1, 25)
                if (other := copy.deepcopy(model)) and _one(other, name, rank, [x])
            ]
            # The layer alone is whitened exactly; only trials at ranks that pay can be made in this way.
            assert losses(name, kind_named(kind), lost) == pytest.approx(error)
            if found and min(found) <= error <= max(found):
                assert min(abs(each - error) / error for each in found) < 0.02


def _one(model: nn.Module, name: str, rank: int, batches: list[torch.Tensor]) -> bool:
    return factorize(model, {name: ("svd", rank)}, batches=batches)[name].reason is None


def test_losses_rise_with_the_share_of_energy(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    requests = requested(model, None, "auto")
    losses = output_losses(model, requests, observe(model, [each.target for each in requests], [x]), [x])
    for name, kind in losses.points:
        values = [losses(name, kind_named(kind), share / 100) for share in range(1, 100)]
        assert values == sorted(values)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_the_cost_is_that_of_the_network_that_is_cut_and_factorized(
    case: tuple[nn.Module, torch.Tensor], kind: str, share: float
) -> None:
    model, x = case
    graph = trace(model, x[:2])
    requests = requested(model, None, "auto")
    seen = observe(model, [request.target for request in requests], [x])
    possible = factorizable(requests)
    options = {name: options_of(each, seen, layer_cost(kind, each, seen)) for name, each in possible.items()}
    layers = {
        name: LayerInGraph(seen.names[name], each.target.shape, seen.extents[name]) for name, each in possible.items()
    }
    costs = Costs.of(model, graph, x[:2])
    limit = share * costs.at(kind, {})
    curves = {name: [(0, 4.0), (size, 0.0)] for name, size in graph.sizes.items()}
    found = joint(graph, costs, kind, limit, curves, options, layers)
    prune(model, graph, found.sizes)
    chosen = {
        name: (option.kind.name, *layers[name].ranks_at(graph, found.sizes, option))
        for name, option in found.options.items()
        if option.kind is not None
    }
    factorize(model, chosen)
    reached = parameters(model) if kind == "params" else macs(model, x[:2])
    assert 0.8 * limit < reached <= limit
    assert chosen


def test_no_combination_does_much_better() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7)).double()
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = trace(model, x[:2])
    requests = requested(model, None, "auto")
    seen = observe(model, [request.target for request in requests], [x])
    options = {each.target.name: options_of(each, seen, layer_cost("params", each, seen)) for each in requests}
    layers = {each.target.name: LayerInGraph(seen.names[each.target.name], each.target.shape, ()) for each in requests}
    curves = {name: energy_curve(values) for name, values in measure(model, graph).items()}
    costs = Costs.of(model, graph, x[:2])
    for limit in (80, 60, 40):
        found = joint(graph, costs, "params", limit, curves, options, layers)

        def loss(size: int, picks: tuple[int, ...]) -> float:
            return loss_at(curves["0"], size) + sum(options[n][i].loss for n, i in zip(options, picks, strict=True))

        def cost(size: int, picks: tuple[int, ...]) -> float:
            own = {"0": size}
            return costs.at("params", own) - sum(
                layers[n].saved("params", layers[n].shape_at(graph, own), options[n][i])
                for n, i in zip(options, picks, strict=True)
            )

        every = [
            (loss(size, picks), cost(size, picks))
            for size, picks in product(range(1, 9), product(*(range(len(each)) for each in options.values())))
        ]
        best = min(value for value, at in every if at <= limit)
        taken = tuple(options[name].index(found.options[name]) for name in options)
        assert cost(found.sizes["0"], taken) <= limit
        assert loss(found.sizes["0"], taken) <= 1.35 * best + 1e-9


def test_a_rank_is_cut_past_the_depth_at_which_it_saves_nothing() -> None:
    """At half the width a layer's first factors cost more than the whole layer; deeper ones must still be reached."""
    model = dense()
    x = torch.randn(64, 20, dtype=torch.float64)
    graph = trace(model, x[:2])
    name, kind = "2", kind_named("svd")
    layer = LayerInGraph("2.weight", requested(model, {name: 1}, "svd")[0].target.shape, ())
    options = {name: [_option(kind, rank, layer) for rank in range(1, 14)] + [_whole(layer)]}
    costs = Costs.of(model, graph, x[:2])
    found = joint(
        graph, costs, "params", 500, {"0": [(0, 5.0), (11, 4.9), (12, 1e-6), (30, 0.0)]}, options, {name: layer}
    )
    assert found.options[name].kind is not None
    assert (
        costs.at("params", found.sizes) - layer.saved("params", layer.shape_at(graph, found.sizes), found.options[name])
        <= 500
    )


def _option(kind: Kind, rank: int, layer: LayerInGraph) -> Option:
    return Option(kind.parameters(layer.shape, (rank,)), 0.1 / rank, kind, (rank,))


def _whole(layer: LayerInGraph) -> Option:
    return Option(layer.shape.parameters, 0.0)
