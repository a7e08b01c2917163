"""Layers and directions of one recurrent module keep units of their own, as many in each, unless the model's code ties them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import ResizeError
from evolvenet.execution.step import Step
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.tracing.reconciled import reconciled
from evolvenet.tracing.trace import trace, trace_with_findings
from tests.helpers.cases import FLOAT, distance, outputs, without_reasons
from tests.helpers.tracing import shuffle_and_widen

Code = Callable[[Tensor, Tensor], Tensor]
"""Of the outputs of all steps and the last states of all layers."""


class Net(nn.Module):
    """A recurrent module of input size 3, code, and a dense layer."""

    def __init__(self, steps: nn.RNNBase, code: Code, reads: int, zeros: bool = False) -> None:
        super().__init__()
        self.steps, self.code, self.zeros = steps, code, zeros
        self.out = nn.Linear(reads, 2)

    def forward(self, x: Tensor) -> Tensor:
        start = x.new_zeros(self.steps.num_layers, len(x), self.steps.hidden_size)
        y, state = self.steps(x, (start, start) if self.zeros else None)
        return self.out(self.code(y, state[0] if isinstance(state, tuple) else state))


def last_step(y: Tensor, h: Tensor) -> Tensor:
    return y[:, -1]


def last_layer(y: Tensor, h: Tensor) -> Tensor:
    return h[-1]


def both_directions(y: Tensor, h: Tensor) -> Tensor:
    return torch.cat([h[-2], h[-1]], -1)


def all_layers(y: Tensor, h: Tensor) -> Tensor:
    return h.transpose(0, 1).flatten(1)


def sum_of_layers(y: Tensor, h: Tensor) -> Tensor:
    return h.sum(0)


def largest_of_layers(y: Tensor, h: Tensor) -> Tensor:
    return h.max(0)[0]


def weighted_layers(y: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("lbh,l->bh", h, h.new_ones(2))


def contracted_layers(y: Tensor, h: Tensor) -> Tensor:
    return torch.tensordot(h.new_ones(2), h, 1)


def squares_of_layers(y: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("lbh,lbh->bh", h, h)


def multiplied_layers(y: Tensor, h: Tensor) -> Tensor:
    return (h.permute(1, 2, 0) @ h.new_ones(2, 3)).mean(-1)


def mean_of_units(y: Tensor, h: Tensor) -> Tensor:
    return h.mean(-1).t().repeat(1, 3)


def heads(y: Tensor, h: Tensor) -> Tensor:
    return y[:, -1].unflatten(-1, (2, -1)).prod(1)


lstm, gru = partial(nn.LSTM, 3, 6, 2, batch_first=True), partial(nn.GRU, 3, 6, 2, batch_first=True)
OWN: dict[str, tuple[Callable[[], Net], int]] = {
    "outputs of all steps": (lambda: Net(lstm(), last_step, 6), 2),
    "steps first": (lambda: Net(nn.LSTM(3, 6, 2), last_step, 6), 2),
    "last states of the last layer": (lambda: Net(lstm(), last_layer, 6), 2),
    "last states of both directions": (lambda: Net(lstm(bidirectional=True), both_directions, 12), 4),
    "last states side by side": (lambda: Net(lstm(bidirectional=True), all_layers, 24), 4),
    "a first state of zeros": (lambda: Net(lstm(), last_step, 6, zeros=True), 2),
    "gru": (lambda: Net(gru(bidirectional=True, dropout=0.1), last_step, 12), 4),
    "rnn": (lambda: Net(nn.RNN(3, 6, 2, batch_first=True), last_layer, 6), 2),
    "projected": (lambda: Net(nn.LSTM(3, 12, 2, batch_first=True, proj_size=4), last_step, 4), 2),
}


def consumers(net: Net, part: int) -> list[Tensor]:
    """What consumes the units of a layer and direction, `[rows, size]` each: of its own weight, the next layer's, the last."""
    steps, ends = net.steps, ("", "_reverse")
    layer, direction = divmod(part, 1 + steps.bidirectional)
    if steps.proj_size:
        return [steps.get_parameter(f"weight_hr_l{layer}{ends[direction]}")]
    size, first = steps.hidden_size, direction * steps.hidden_size
    found: list[Tensor] = [steps.get_parameter(f"weight_hh_l{layer}{ends[direction]}")]
    if layer + 1 < steps.num_layers:
        after = ends[: 1 + steps.bidirectional]
        found += [steps.get_parameter(f"weight_ih_l{layer + 1}{end}")[:, first : first + size] for end in after]
    if net.code is all_layers:
        found.append(net.out.weight[:, part * size : (part + 1) * size])
    elif layer + 1 == steps.num_layers:
        found.append(net.out.weight[:, first : first + size])
    return found


@pytest.mark.parametrize("name", OWN)
def test_a_cut_of_other_units_in_each_part_is_that_of_zero_columns(name: str) -> None:
    torch.manual_seed(0)
    make, parts = OWN[name]
    net, x = make().double().eval(), torch.randn(4, 5, 3, dtype=FLOAT)
    graph = trace(net, x)
    width = graph.widths["steps"]
    assert (width.frozen, width.size, width.parts) == (None, net.steps.hidden_size, parts)
    removed = [[(2 * part + 1) % width.size, (2 * part + 4) % width.size] for part in range(parts)]
    before = outputs(net, x)
    with torch.no_grad():
        for part, units in enumerate(removed):
            for columns in consumers(net, part):
                columns[:, units] = 0
    expected = outputs(net, x)
    kept = [[unit for unit in range(width.size) if unit not in units] for units in removed]
    after = evolvenet.resize(net, graph, {"steps": IndexMap.of_parts(kept, width.size)})
    assert distance(before, expected) > 1e-3
    assert distance(outputs(net, x), expected) < 1e-12
    assert without_reasons(after) == without_reasons(trace(net, x))
    assert from_state_dict(to_state_dict(after)) == after


class Learned(nn.Module):
    """The layers begin with a state that is a parameter, the same units for all."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.first, self.out = gru(), nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.steps(x, self.first.repeat(2, len(x), 1))[0][:, -1])


class Shared(nn.Module):
    """A decoder begins with the states in which an encoder ends."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.out = lstm(), lstm(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decoder(x, self.encoder(x)[1])[0])


TIED: dict[str, Callable[[], nn.Module]] = {
    "a sum over the layers": lambda: Net(lstm(), sum_of_layers, 6),
    "a product of two layers": lambda: Net(lstm(), lambda y, h: h[0] * h[1], 6),
    "layers in rows": lambda: Net(lstm(), lambda y, h: h.mean(1), 6),
    "heads of the last layer": lambda: Net(lstm(), heads, 3),
    "a learned first state": Learned,
    "the largest over the layers": lambda: Net(lstm(), largest_of_layers, 6),
    "a factor for each layer": lambda: Net(lstm(), weighted_layers, 6),
    "a contraction of the layers": lambda: Net(gru(), contracted_layers, 6),
    "a sum of the squares of the layers": lambda: Net(lstm(), squares_of_layers, 6),
    "a matrix for the layers": lambda: Net(lstm(), multiplied_layers, 6),
    "the mean over the units": lambda: Net(lstm(), mean_of_units, 6),
}


@pytest.mark.parametrize("name", TIED)
def test_where_the_code_ties_layers_all_keep_the_same_units(name: str) -> None:
    torch.manual_seed(0)
    net, x = TIED[name]().double().eval(), torch.randn(4, 5, 3, dtype=FLOAT)
    graph = trace(net, x)
    width = graph.widths["steps"]
    assert (width.frozen, width.size, width.parts) == (None, 3 if name.startswith("heads") else 6, 1)
    shuffle_and_widen(net, graph, x)


def test_states_that_go_from_module_to_module_keep_each_layer_to_its_own() -> None:
    torch.manual_seed(0)
    net, x = Shared().double().eval(), torch.randn(4, 5, 3, dtype=FLOAT)
    graph = trace(net, x)
    assert graph.sizes == {"encoder": 6}
    parts = {tie.tensor: tie.part for tie in graph.widths["encoder"].ties if "weight_hh" in tie.tensor}
    assert [parts[f"{name}.weight_hh_l{layer}"] for layer in (0, 1) for name in ("encoder", "decoder")] == [0, 0, 1, 1]
    expected = outputs(net, x)
    orders = [[5, 4, 3, 2, 1, 0, -1], [0, 2, -1, 4, 1, 3, 5]]
    after = evolvenet.resize(net, graph, {"encoder": IndexMap.of_parts(orders, 6)})
    assert distance(outputs(net, x), expected) < 1e-12
    assert after.sizes == trace(net, x).sizes


def test_states_that_are_given_or_returned_keep_their_size() -> None:
    state = torch.zeros(2, 4, 6), torch.zeros(2, 4, 6)
    given = trace(nn.LSTM(3, 6, 2, batch_first=True), (torch.zeros(4, 5, 3), state), outputs="0")
    assert given.sizes == trace(nn.LSTM(3, 6, 2), torch.zeros(5, 4, 3)).sizes == {}


def test_maps_for_other_numbers_of_parts_are_refused() -> None:
    net, x = Net(lstm(), last_step, 6), torch.randn(4, 5, 3)
    graph = trace(net, x)
    with pytest.raises(ResizeError, match="has 2 parts, but its map names the units of 3"):
        evolvenet.resize(net, graph, {"steps": IndexMap.of_parts([[0], [1], [2]], 6)})
    assert "2 parts of one size" in graph.explain("steps")
    assert "consumes steps.weight_ih_l1 axis 1 [0:6], part 0" in graph.explain("steps")


class Remembering(Net):
    """Keeps its last states, for a loss."""

    def forward(self, x: Tensor) -> Tensor:
        y, self.state = self.steps(x)
        return self.out(y[:, -1])


def test_a_step_that_ties_layers_is_traced_for_them() -> None:
    net, x = Remembering(gru(), last_step, 6), torch.randn(4, 5, 3)

    def own(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    def tied(model: nn.Module, x: Tensor) -> Any:
        return model(x), cast(Remembering, model).state.sum(0).square().sum()

    alone = trace(net, x)
    found = reconciled(alone, trace(net, Step(own, x)))
    assert found is not None
    assert found.widths["steps"].parts == 2
    whole = trace(net, Step(tied, x))
    assert (whole.widths["steps"].parts, whole.sizes) == (1, {"steps": 6})
    assert reconciled(alone, whole) is None


def test_tied_layers_are_taken_over_by_a_trace_with_other_heads() -> None:
    net, x = Net(lstm(), largest_of_layers, 6), torch.randn(4, 5, 3)
    _, found = trace_with_findings(net, x)
    known, again = trace_with_findings(net, x, heads=True, known=found)
    tied = next(run for run in found.labels if run.tied_layers)
    assert again.labels[tied] is found.labels[tied]
    assert (known.widths["steps"].frozen, known.widths["steps"].parts) == (None, 1)
    assert to_state_dict(known) == to_state_dict(trace(net, x, heads=True))


def test_a_step_may_reduce_over_layers_that_the_network_returns() -> None:
    net, x = lstm(), torch.randn(4, 5, 3)
    assert not trace(net, x).resizable

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[1][0].max(0)[0].square().sum()

    assert list(trace(net, Step(loss, x)).sizes.values()) == [6]
