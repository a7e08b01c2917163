"""A stack of recurrent layers in one module is cut as the same layers in modules of their own are, as many units in each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.past_events import PastEvents
from evolvenet.measurement.width_spectra import measure
from evolvenet.measurement.width_statistics import width_statistics
from evolvenet.pruning.equal_shares import live_units
from evolvenet.pruning.selection import choose
from tests.helpers.cases import FLOAT, distance, outputs

Kind = type[nn.LSTM] | type[nn.GRU]


class Whole(nn.Module):
    """Three layers in one module, and a dense layer that takes the last one's last state."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.steps, self.last = kind(4, 8, 3, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.steps(x)[1]
        return self.last((state[0] if isinstance(state, tuple) else state)[-1])


class Apart(nn.Module):
    """The same with a module for each layer."""

    def __init__(self, whole: Whole, kind: Kind) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(4 if k == 0 else 8, 8, batch_first=True) for k in range(3))
        self.last = copy.deepcopy(whole.last)
        for k, layer in enumerate(self.layers):
            own = {name: whole.steps.get_parameter(name.replace("l0", f"l{k}")) for name, _ in layer.named_parameters()}
            layer.load_state_dict(own)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.last(x[:, -1])


def both(kind: Kind) -> tuple[Whole, Apart]:
    torch.manual_seed(0)
    whole = Whole(kind).double()
    return whole, Apart(whole, kind).double()


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(32, 6, 4, dtype=FLOAT) for _ in range(count)]


def layers(size: int) -> dict[str, int]:
    return {f"layers.{k}": size for k in range(3)}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("with_data", [False, True])
def test_each_layer_keeps_the_units_that_it_keeps_in_a_module_of_its_own(kind: Kind, with_data: bool) -> None:
    whole, apart = both(kind)
    data, test = batches(), torch.randn(16, 6, 4, dtype=FLOAT)
    one, several = evolvenet.trace(whole, test), evolvenet.trace(apart, test)
    given = (collect(whole, one, data), collect(apart, several, data)) if with_data else (None, None)
    chosen, expected = choose(whole, one, {"steps": 5}, given[0]), choose(apart, several, layers(5), given[1])
    assert len({map_.indices for map_ in expected.values()}) == 3
    assert [each.indices for each in chosen["steps"].each] == [map_.indices for map_ in expected.values()]
    before = outputs(whole, test)
    evolvenet.prune(whole, one, {"steps": 5}, data if with_data else None)
    evolvenet.prune(apart, several, layers(5), data if with_data else None)
    assert distance(outputs(whole, test), outputs(apart, test)) < 1e-6
    assert distance(outputs(whole, test), before) > 1e-3


def test_the_spectrum_and_the_energies_are_the_means_of_those_of_the_layers() -> None:
    whole, apart = both(nn.LSTM)
    data = batches()
    one, several = evolvenet.trace(whole, data[0]), evolvenet.trace(apart, data[0])
    pair = (collect(whole, one, data), collect(apart, several, data))
    mine, theirs = measure(whole, one, pair[0])["steps"], measure(apart, several, pair[1])
    squares = torch.stack([theirs[name] for name in layers(0)]).square()
    torch.testing.assert_close(mine.square(), squares.mean(0))
    found = width_statistics(whole, one, pair[0], PastEvents())["steps"]
    each = width_statistics(apart, several, pair[1], PastEvents())
    energies = torch.tensor([each[name].energies for name in layers(0)], dtype=FLOAT)
    torch.testing.assert_close(torch.tensor(found.energies, dtype=FLOAT), energies.mean(0))


def test_the_spectrum_of_outputs_is_the_sum_of_those_of_the_layers() -> None:
    whole, apart = both(nn.LSTM)
    data = batches(1)
    mine = evolvenet.output_spectra(whole, evolvenet.trace(whole, data[0]), data)["steps"]
    theirs = evolvenet.output_spectra(apart, evolvenet.trace(apart, data[0]), data)
    torch.testing.assert_close(mine.square(), sum(theirs[name].square() for name in layers(0)))


def test_units_that_are_zero_in_other_places_of_each_layer_go_without_a_loss() -> None:
    whole, _ = both(nn.LSTM)
    dead = [[0, 1, 2], [3, 4, 5], [2, 5, 7]]
    with torch.no_grad():
        for k, units in enumerate(dead):
            for name, weight in whole.steps.named_parameters():
                if name.endswith(f"l{k}"):
                    weight.view(4, 8, -1)[:, units] = 0
    x = torch.randn(16, 6, 4, dtype=FLOAT)
    graph, before = evolvenet.trace(whole, x), outputs(whole, x)
    # A cell with weights of 0 puts out 0: half open gates, and nothing to let in.
    allocation = evolvenet.allocate(whole, graph, parameters=graph.proposed_parameters({"steps": 5}), batches=batches())
    assert live_units(whole, graph) == {"steps": 5}
    evolvenet.prune(whole, graph, allocation, batches())
    assert distance(outputs(whole, x), before) < 1e-9
