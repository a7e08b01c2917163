"""A width between two layers of a factorized layer is marked as a rank of it, everywhere that a graph goes."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import evolvenet
from evolvenet.graph.renaming import in_child, in_parent, renamed
from evolvenet.graph.restriction import Restriction
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.lowrank.layers import factored

KINDS = {
    "svd": ((4,), {"2.0": 4}),
    "spatial": ((4,), {"2.0": 4}),
    "tucker": ((4, 5), {"2.0": 4, "2.1": 5}),
    "tensor_train": ((4, 5, 6), {"2.0": 4, "2.1": 5, "2.2": 6}),
    "cp": ((4,), {"2.0": 4}),
}


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 5))


def dense() -> tuple[nn.Sequential, evolvenet.WidthGraph]:
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))
    evolvenet.factorize(model, {"0": 3})
    return model, evolvenet.trace(model, torch.zeros(1, 10))


def ranks(graph: evolvenet.WidthGraph) -> dict[str, str]:
    return {name: width.rank_of for name, width in graph.widths.items() if width.rank_of is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_every_width_between_the_layers_of_a_chain_is_a_rank_and_no_other(kind: str) -> None:
    given, expected = KINDS[kind]
    model = convolutional()
    evolvenet.factorize(model, {"2": (kind, given)})
    graph = evolvenet.trace(model, torch.zeros(1, 3, 8, 8))
    assert ranks(graph) == dict.fromkeys(expected, "2")
    assert {name: graph.sizes[name] for name in expected} == expected
    assert {"0", list(graph.sizes)[-1]}.isdisjoint(expected)


def test_neither_layers_in_sequence_nor_a_layer_before_a_nonlinearity_have_ranks() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert ranks(evolvenet.trace(model, torch.zeros(1, 8))) == {}


def test_chains_that_share_their_factors_share_one_rank() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x).relu()).relu())

    model = Twice()
    evolvenet.factorize(model, {"one": 3})
    assert ranks(evolvenet.trace(model, torch.zeros(1, 8))) == {"one.0": "one"}


def test_a_factor_that_a_layer_outside_of_chains_uses_too_has_no_rank() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(8, 3, bias=False)
            self.fc = factored(nn.Linear(8, 8), "svd", (3,), [[self.side.weight.detach(), torch.ones(8, 3)]])
            self.side.weight = self.fc.factors[0].get_parameter("weight")
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(x).relu()) + self.side(x).relu().sum(1, keepdim=True)

    model = Tied()
    assert ranks(evolvenet.trace(model, torch.zeros(1, 8))) == {}


def test_a_rank_stays_one_through_surgery_records_renaming_and_restriction() -> None:
    model, graph = dense()
    assert ranks(graph.with_sizes({"0.0": 2})) == {"0.0": "0"}
    assert from_state_dict(to_state_dict(graph)) == graph
    whole = renamed(graph, in_parent("net"))
    assert ranks(whole) == {"net.0.0": "net.0"}
    assert renamed(whole, in_child("net")) == graph
    assert ranks(renamed(graph, in_child("0"))) == {"0": ""}
    assert ranks(Restriction(fixed="0.0", multiple=2).apply(graph)) == {"0.0": "0"}
    assert ranks(evolvenet.prune(model, graph, {"0.0": 2})) == {"0.0": "0"}


def test_records_from_before_ranks_were_marked_load() -> None:
    _, graph = dense()
    state = to_state_dict(graph)
    for width in state["widths"]:
        del width["rank_of"]
    assert ranks(from_state_dict(state)) == {}
    assert from_state_dict(state).sizes == graph.sizes


def test_the_tables_name_the_layer_of_a_rank_where_there_is_one() -> None:
    _, graph = dense()
    console = Console(width=160)
    with console.capture() as shown:
        console.print(graph)
    for text in (str(graph), shown.get()):
        assert "rank of" in text
        assert text.splitlines()[[line.split()[:1] for line in text.splitlines()].index(["0.0"])].split()[-1] == "0"
    assert "rank of 0" in graph.explain("0.0")
    plain = evolvenet.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4))
    assert "rank of" not in str(plain)
