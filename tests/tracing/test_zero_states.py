"""States that begin as zeros made in the model's code: their size may change with a width's, whatever they meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet.tracing.labels import LabelGraph, places_of_constant
from evolvenet.tracing.merging import merge
from evolvenet.tracing.trace import trace
from tests.helpers.cases import FLOAT
from tests.helpers.tracing import shuffle_and_widen

Step = Callable[[Any, Tensor, Tensor], Tensor]


class Steps(nn.Module):
    """A hidden state of zeros, code for each step, and a dense layer to two outputs."""

    def __init__(self, step: Step, hidden: int = 6, **layers: nn.Module) -> None:
        super().__init__()
        self.step, self.hidden_dim = step, hidden
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.out = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.hidden_dim)
        for step in range(x.shape[1]):
            state = self.step(self, x[:, step], state)
        return self.out(state)


class ConvLstm(nn.Module):
    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.conv, self.out = nn.Conv2d(2 + hidden, 4 * hidden, 3, padding=1), nn.Conv2d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _, height, width = x.shape
        h = torch.zeros(batch, self.hidden_dim, height, width, dtype=x.dtype, device=x.device)
        c = torch.zeros_like(h)
        for step in range(steps):
            i, f, g, o = self.conv(torch.cat([x[:, step], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


def _mingru(net: Any, x: Tensor, state: Tensor) -> Tensor:
    joined = torch.cat([x, state], -1)
    gate = net.z(joined).sigmoid()
    return (1 - gate) * state + gate * net.n(joined).tanh()


def _gru(net: Any, x: Tensor, state: Tensor) -> Tensor:
    reset, update = net.gates(torch.cat([state, x], -1)).sigmoid().chunk(2, -1)
    new = net.new(torch.cat([x, reset * state], -1)).tanh()
    return (1 - update) * state + update * new


def _masked(net: Any, x: Tensor, state: Tensor) -> Tensor:
    return net.cell(x, state * (x[:, :1] > 0))


def _leaky(net: Any, x: Tensor, state: Tensor) -> Tensor:
    state = net.beta * state + net.a(x)
    return state - (state > 1).to(x.dtype)


def _reset(net: Any, x: Tensor, state: Tensor) -> Tensor:
    state = torch.where(x[:, :1] > 0, torch.zeros_like(state), state)
    return net.a(x) + net.b(state)


class Leaky(Steps):
    def __init__(self, learned: bool) -> None:
        super().__init__(_leaky, a=nn.Linear(3, 6))
        beta = torch.tensor(0.9)
        self.beta: Tensor
        if learned:
            self.beta = nn.Parameter(beta)
        else:
            self.register_buffer("beta", beta)


VIDEO, STEPS = (2, 3, 2, 4, 4), (2, 3, 3)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "a mixture with the new state": (lambda: Steps(_mingru, z=nn.Linear(9, 6), n=nn.Linear(9, 6)), STEPS, {"z": 6}),
    "gates of one layer": (lambda: Steps(_gru, gates=nn.Linear(9, 12), new=nn.Linear(9, 6)), STEPS, {"gates": 6}),
    "convolutions of the state": (ConvLstm, VIDEO, {"conv": 5}),
    "a mask of finished episodes": (lambda: Steps(_masked, cell=nn.GRUCell(3, 6)), STEPS, {"cell": 6}),
    "episodes begin anew": (lambda: Steps(_reset, a=nn.Linear(3, 6), b=nn.Linear(6, 6)), STEPS, {"a": 6}),
    "a leak that is a buffer": (lambda: Leaky(learned=False), STEPS, {"a": 6}),
    "a leak that is a parameter": (lambda: Leaky(learned=True), STEPS, {"a": 6}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_that_begins_as_zeros_is_resizable(name: str) -> None:
    factory, shape, sizes = NETWORKS[name]
    torch.manual_seed(0)
    model, x = factory().double().eval(), torch.randn(shape, dtype=FLOAT)
    graph = trace(model, x)
    assert graph.sizes == sizes, str(graph)
    shuffle_and_widen(model, graph, x)


def test_units_that_only_meet_data_beside_a_constant_are_frozen() -> None:
    def step(net: Any, x: Tensor, state: Tensor) -> Tensor:
        return net.a(torch.cat([x, state], -1)) + torch.cat([x, x], -1)

    graph = trace(Steps(step, a=nn.Linear(9, 6)).double(), torch.randn(2, 3, 3, dtype=FLOAT))
    assert graph.sizes == {}
    assert "fixed size" in (graph.widths["a"].frozen or "")


def test_places_of_a_constant_tie_nothing_and_take_the_units_that_they_meet() -> None:
    label_graph = LabelGraph()
    (units,) = label_graph.add_tensor("a", (4,))
    (others,) = label_graph.add_tensor("b", (2,))
    constant = places_of_constant(4, 0, 1)
    (kept,) = merge(label_graph, [[constant], [units]])
    assert kept.equal(units)
    beside = torch.cat([torch.tensor([-1]), others, places_of_constant(1, 0, 1)])
    (kept,) = merge(label_graph, [[constant], [beside]])
    assert kept.clamp(min=-2).equal(beside.clamp(min=-2))
    (kept,) = merge(label_graph, [[beside], [units]])
    assert kept[3] == units[3]
    component = label_graph.components()
    assert component[units[1:3]].tolist() == component[others].tolist()
    assert len(set(component)) == 4
    assert [frozen.tolist() for frozen, _ in label_graph.frozen] == [[0]]


class Stacked(nn.Module):
    """Recurrent layers, in one module or in one each, and a dense layer."""

    def __init__(self, *layers: nn.LSTM) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(layers), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.out(x)


def test_layers_of_one_lstm_have_one_size_and_layers_in_modules_of_their_own_one_each() -> None:
    one = trace(Stacked(nn.LSTM(3, 5, num_layers=2)), torch.zeros(2, 1, 3))
    assert one.sizes == {"layers.0": 5}
    assert {tie.tensor for tie in one.widths["layers.0"].ties} >= {"layers.0.weight_hh_l0", "layers.0.weight_hh_l1"}
    two = trace(Stacked(nn.LSTM(3, 5), nn.LSTM(5, 5)), torch.zeros(2, 1, 3))
    assert two.sizes == {"layers.0": 5, "layers.1": 5}
