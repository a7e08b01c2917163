"""Weights that older functions of torch compute in hooks, against fresh modules of the new sizes."""

# nn.Module types its children and attributes loosely, and optimizers are written here as people write them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIncompatibleMethodOverride=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import evolvenet
from evolvenet.engine.functional import commit
from evolvenet.graph.index_map import IndexMap
from evolvenet.surgery.resize_model import compile_surgery, install

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def masked(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.3)
    return prune.random_unstructured(layer, "bias", 0.2)


def masked_twice(layer: nn.Module) -> nn.Module:
    return prune.random_structured(masked(layer), "weight", 0.2, dim=0)


OLD: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.weight_norm,
    "weight norm of the whole": lambda layer: nn.utils.weight_norm(layer, dim=None),
    "spectral norm": nn.utils.spectral_norm,
    "pruned": masked,
    "pruned twice": masked_twice,
}
EXACT = ("weight norm", "pruned", "pruned twice")


def network(kind: str, place: int, a: int = 12, b: int = 10) -> nn.Sequential:
    """Two hidden widths; the layer in `place` is of the kind."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(4, a), nn.Linear(a, b), nn.Linear(b, 2)]
    layers[place] = OLD[kind](layers[place])
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).double().eval()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("kind", OLD)
def test_a_resized_network_is_one_that_was_built_with_the_new_sizes(kind: str, place: int) -> None:
    net = network(kind, place)
    graph = evolvenet.trace(net, X[:2])
    maps = {"0": IndexMap.keep([0, 2, 3, 5, 7, 11], size=12), "2": IndexMap.of([9, 1, 2, 0, 5, 5, 6], size=10)}
    evolvenet.resize(net, graph, maps)
    computed = {name: module.weight.clone() for name, module in net.named_children() if hasattr(module, "weight")}
    fresh = network(kind, place, 6, 7)
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(X), fresh(X), rtol=0, atol=1e-12)
    for name, module in fresh.named_children():
        assert module.extra_repr() == net.get_submodule(name).extra_repr()
        if name in computed:
            # A reader between the change and the next forward pass gets the new weight too.
            torch.testing.assert_close(computed[name], module.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("kind", EXACT)
def test_growth_keeps_the_function_and_new_units_can_be_trained(kind: str, place: int) -> None:
    net = network(kind, place)
    before = net(X).detach()
    graph = evolvenet.grow(net, evolvenet.trace(net, X[:2]), {"0": 20, "2": 18})
    torch.testing.assert_close(net(X).detach(), before, rtol=0, atol=1e-12)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    start = [net[0].weight[12:].detach().clone(), net[2].weight[10:].detach().clone()]
    for _ in range(2):  # Fan-outs of 0 move first.
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    net(X)
    assert bool((net[0].weight[12:] != start[0]).any(1).all())
    assert bool((net[2].weight[10:] != start[1]).any(1).all())
    assert graph.sizes == {"0": 20, "2": 18}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("kind", OLD)
def test_events_go_on_with_such_a_layer_anywhere(kind: str, place: int) -> None:
    net = network(kind, place, 64, 48).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    evolver = evolvenet.Evolver(net, optimizer, evolvenet.Threshold(prune=0.05, grow=0.99), X[:2])
    for _ in range(2):
        evolver.observe(X)
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
        assert evolver.step().skipped is None
    assert evolver.graph.sizes["0"] < 64
    assert evolver.graph.sizes["2"] < 48


def test_the_computed_weight_comes_back_with_a_change_that_is_undone() -> None:
    net = network("weight norm", 0)
    graph = evolvenet.trace(net, X[:2])
    net(X)
    before, weight = {name: value.clone() for name, value in net.state_dict().items()}, net[0].weight.clone()
    undo = install(net, compile_surgery(net, graph, {"0": IndexMap.keep([0, 1], size=12)}))
    assert net[0].weight.shape == (2, 4)
    undo()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(net[0].weight, weight.detach())


class Product(nn.Linear):
    """Computes its weight from two tensors, as no registered type does."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out)
        del self.weight
        self.scale, self.direction = nn.Parameter(torch.ones(fan_out, 1)), nn.Parameter(torch.randn(fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.scale * self.direction, self.bias)


def test_widths_beside_a_layer_of_unknown_attributes_rest_and_the_others_change() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), Product(24, 2)).double()
    graph = evolvenet.trace(net, X[:2])
    assert graph.widths["2"].frozen is not None
    assert "Product" in graph.widths["2"].frozen
    evolver = evolvenet.Evolver(net, None, evolvenet.Threshold(prune=0.05), X[:2])
    evolver.observe(X)
    assert evolver.step().skipped is None
    assert evolver.graph.sizes["0"] < 32


def test_masks_of_new_units_are_open() -> None:
    net = network("pruned", 1)
    graph = evolvenet.trace(net, X[:2])
    surgery = compile_surgery(net, graph, {"0": IndexMap.grow(12, 3), "2": IndexMap.grow(10, 2)})
    commit(net, surgery)
    assert bool(net[2].weight_mask[10:].all())
    assert bool(net[2].weight_mask[:, 12:].all())
    assert bool(net[2].bias_mask[10:].all())
