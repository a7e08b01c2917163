"""What goes along with the units of each recurrent layer: the optimizer's state, files, the first sizes, a replica."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.engine.original_widths import OriginalWidths, at_first_sizes
from evolvenet.engine.replica_widths import united
from evolvenet.errors import IndexMapError, RecordError
from evolvenet.execution.step import Step
from evolvenet.graph.exact_growth import COPY, ExactGrowth
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.norm_expansion import expand_norms
from evolvenet.surgery.resize_model import compile_surgery, install
from evolvenet.surgery.width_record import record_of
from tests.helpers.cases import FLOAT, distance, outputs

ORDERS = IndexMap.of_parts([[0, 2, 5], [1, 3, 4]], 6)


class Net(nn.Module):
    """Two layers of six units and a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.last = nn.LSTM(3, 6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.steps(x)[0][:, -1])


def trained() -> tuple[Net, torch.optim.Adam, WidthGraph, Tensor]:
    """After some steps of Adam."""
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(4, 5, 3, dtype=FLOAT)
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return net, optimizer, evolvenet.trace(net, x), x


def gates(units: tuple[int, ...]) -> list[int]:
    """Rows of the four gates."""
    return [6 * gate + unit for gate in range(4) for unit in units]


def test_the_state_of_the_optimizer_goes_with_the_units_of_each_layer() -> None:
    net, optimizer, graph, _ = trained()
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in net.named_parameters()}
    evolvenet.resize(net, graph, {"steps": ORDERS}, optimizer)
    first, second = ORDERS.parts
    expected = {
        "steps.weight_ih_l0": before["steps.weight_ih_l0"][gates(first)],
        "steps.weight_hh_l0": before["steps.weight_hh_l0"][gates(first)][:, first],
        "steps.weight_ih_l1": before["steps.weight_ih_l1"][gates(second)][:, first],
        "steps.weight_hh_l1": before["steps.weight_hh_l1"][gates(second)][:, second],
        "steps.bias_hh_l1": before["steps.bias_hh_l1"][gates(second)],
        "last.weight": before["last.weight"][:, second],
    }
    for name, state in expected.items():
        assert torch.equal(optimizer.state[net.get_parameter(name)]["exp_avg"], state), name


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_file_brings_back_the_units_of_each_layer(ending: str, tmp_path: Path) -> None:
    net, _, graph, x = trained()
    evolvenet.resize(net, graph, {"steps": ORDERS})
    evolvenet.save(net, tmp_path / f"net{ending}")
    fresh = evolvenet.load(Net().double(), tmp_path / f"net{ending}")
    assert distance(outputs(fresh, x), outputs(net, x)) == 0
    record = record_of(fresh)
    assert record is not None
    found = record.graph_of(fresh)
    assert found is not None
    assert found.widths["steps"].parts == 2


def test_first_sizes_bring_the_units_of_each_layer_back_to_their_places() -> None:
    net, optimizer, graph, x = trained()
    whole, original = copy.deepcopy(net), OriginalWidths.of(graph)
    graph = evolvenet.resize(net, graph, {"steps": ORDERS}, optimizer)
    expected = outputs(net, x)
    original = OriginalWidths.from_state_dict(original.after({"steps": ORDERS}).state_dict())
    original.check_fits(graph)
    with at_first_sizes(original, net, graph, [optimizer]) as restored:
        assert restored.sizes == {"steps": 6}
    assert distance(outputs(net, x), expected) < 1e-12
    for layer, kept in enumerate(ORDERS.parts):
        now, before = (each.steps.get_parameter(f"weight_hh_l{layer}") for each in (net, whole))
        assert torch.equal(now[gates(kept)][:, kept], before[gates(kept)][:, kept])
        assert not now[:, [unit for unit in range(6) if unit not in kept]].any()


def test_units_of_other_numbers_of_layers_do_not_fit() -> None:
    _, _, graph, _ = trained()
    state = OriginalWidths.of(graph).after({"steps": IndexMap.of_parts([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]], 6)})
    data = state.state_dict()
    data["parts"]["steps"].append([2, 1, 0, 3, 4, 5])
    with pytest.raises(RecordError, match="units of steps are not those"):
        OriginalWidths.from_state_dict(data).check_fits(graph)
    data["parts"]["steps"][1] = [0]
    with pytest.raises(RecordError, match="expected as many units in every part"):
        OriginalWidths.from_state_dict(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data["sizes"].clear(), "cannot be read: expected what EvolveNet has written, got KeyError"),
        (lambda data: data.pop("sizes"), "cannot be read: .* got KeyError"),
        (lambda data: data["sizes"].update(steps="six"), "cannot be read: .* got TypeError"),
        (lambda data: data["origins"].update(steps=3), "cannot be read: .* got TypeError"),
        (lambda data: data["origins"].update(steps=[0.5] * 6), "original widths"),
    ],
)
def test_a_damaged_record_of_first_units_is_refused(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = OriginalWidths.of(trained()[2]).state_dict()
    damage(data)
    with pytest.raises(RecordError, match=message):
        OriginalWidths.from_state_dict(data)


def test_a_graph_that_ties_layers_goes_by_the_first_units_of_the_first_one() -> None:
    net, _, graph, x = trained()
    original = OriginalWidths.of(graph).after({"steps": ORDERS})
    evolvenet.resize(net, graph, {"steps": ORDERS})

    def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return net(x), net.get_submodule("steps")(x)[1][0].amax(0).sum()

    tied = evolvenet.trace(net, Step(step, x))
    assert (tied.sizes, tied.widths["steps"].parts) == ({"steps": 3}, 1)
    known = original.renamed({"steps": "steps"}, tied)
    assert (known.sizes["steps"], known.origins["steps"]) == (6, IndexMap.of([0, 2, 5], 6))
    expected = outputs(net, x)
    for each in (original, known):
        one = copy.deepcopy(net)
        with at_first_sizes(each, one, tied) as restored:
            assert (restored.sizes, one.steps.hidden_size) == ({"steps": 6}, 6)
        assert distance(outputs(one, x), expected) < 1e-12


def test_maps_of_other_numbers_of_parts_than_before_are_refused() -> None:
    original = OriginalWidths.of(trained()[2]).after({"steps": ORDERS})
    with pytest.raises(IndexMapError, match=r"Width 'steps': expected a map of 2 parts, .* got one of 3"):
        original.after({"steps": IndexMap.of_parts([[0], [1], [2]], 3)})


def test_copies_at_other_places_of_each_layer_keep_what_a_normed_network_computes() -> None:
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(4, 5, 3, dtype=FLOAT)
    net.add_module("last", nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)).double())
    graph = evolvenet.trace(net, x)
    assert (graph.widths["steps"].parts, graph.widths["steps"].exact_growth) == (2, ExactGrowth(COPY))
    places = IndexMap.of_parts([[*range(6), *[-1] * 6], [unit for k in range(6) for unit in (-1, k)]], 6)
    expected = outputs(net, x)
    install(net, expand_norms(net, graph, compile_surgery(net, graph, {"steps": places})))
    assert net.steps.hidden_size == 12
    assert distance(outputs(net, x), expected) < 1e-12


def test_new_units_are_trained_in_every_layer() -> None:
    net, optimizer, graph, x = trained()
    expected = outputs(net, x)
    after = evolvenet.grow(net, graph, {"steps": 8}, optimizers=optimizer)
    assert after.sizes == {"steps": 8}
    assert distance(outputs(net, x), expected) < 1e-9
    net(x).square().sum().backward()
    for layer in (0, 1):
        gradient = net.steps.get_parameter(f"weight_hh_l{layer}").grad
        assert gradient is not None
        assert gradient[:6, 6:].abs().min() > 0


class Both(nn.Module):
    """A network and a slow copy of it, whose layers are tied where the network's may not be."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.net, self.slow, self.tied = Net(), Net(), tied

    def forward(self, x: Tensor) -> Tensor:
        states = self.slow.steps(x)[1][0]
        return self.net(x) - self.slow.last(states.sum(0) if self.tied else states[-1])


@pytest.mark.parametrize(("tied", "parts"), [(False, 2), (True, 1)])
def test_a_replica_has_the_parts_of_its_source(tied: bool, parts: int) -> None:
    torch.manual_seed(0)
    both, x = Both(tied=tied).double(), torch.randn(4, 5, 3, dtype=FLOAT)
    graph = united(evolvenet.trace(both, x), "slow", "net")
    width = graph.widths["net.steps"]
    assert (graph.sizes, width.parts) == ({"net.steps": 6}, parts)
    orders = [[5, 0, 1, 2, 3, 4], [3, 4, 5, 0, 1, 2]][:parts]
    expected = outputs(both, x)
    evolvenet.resize(both, graph, {"net.steps": IndexMap.of_parts(orders, 6)})
    assert distance(outputs(both, x), expected) < 1e-12
