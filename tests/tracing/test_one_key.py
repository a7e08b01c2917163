"""Multi-query attention: whole heads of queries go, and what they share stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.networks.grouped_attention import PLACES, GroupedAttention
from tests.helpers.networks.one_key import OneKey
from tests.helpers.tracing import check_units

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WAYS: list[tuple[Any, ...]] = [
    ("sizes", "product", "half"),
    ("last first", "fused", "none"),
    ("as heads", "folded", "half", True),
    ("as heads", "product", "pairs", True, True),
    ("sizes", "sums", "none", False, True),
    ("last first", "folded", "none", False, True),
]
LAYERS: list[dict[str, Any]] = [
    {"repeat": "expand", "turn": "half"},
    {"repeat": "enable_gqa", "turn": "pairs", "norm": True},
    {"repeat": "repeat_interleave", "turn": "none", "sinks": True},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_unit_is_a_head_of_queries_of_a_layer_that_makes_keys_and_values_too(way: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    model = OneKey(*way).double()
    graph = trace(model, X, heads=True)
    name = next(name for name, size in graph.sizes.items() if size == 6)
    assert graph.sizes == {"first": 12, name: 6}
    assert {tie.tensor: tie.repeat for tie in graph.widths[name].ties if tie.tensor.endswith("weight")} == {
        "qkv.weight": PLACES,
        "o.weight": PLACES,
    }
    check_units(model, graph, X, [name])
    assert model.qkv.weight.shape == ((model.heads + 2) * PLACES, 12)
    assert trace(model, X, heads=True).sizes == {"first": 12, name: model.heads}


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_a_unit_is_a_head_of_queries_where_keys_and_values_have_layers_of_their_own(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GroupedAttention(6, 1, **options).double()
    graph = trace(model, X, heads=True)
    assert graph.sizes == {"first": 12, "q": 6}
    assert "shared by all heads" in (graph.widths["v"].frozen or "")
    check_units(model, graph, X, ["q"])
    assert (model.q.out_features, model.v.out_features) == (model.o.in_features, PLACES)


def test_heads_are_units_by_default_where_positions_tie_the_places() -> None:
    turned, plain = (GroupedAttention(6, 1, turn=turn).double() for turn in ("half", "none"))
    assert trace(turned, X).sizes == {"first": 12, "q": 6}
    assert trace(plain, X, heads=True).sizes == {"first": 12, "q": 6}
    assert trace(turned, X, heads=False).sizes == {"first": 12, "q": PLACES // 2}
    assert trace(turned, X, heads=False).widths["q"].patches[0] == ("", "places")
    assert trace(plain, X).sizes == {"first": 12, "q": PLACES}


def test_places_are_units_by_default_where_they_hold_more_of_the_model_than_heads() -> None:
    """A weight for each head ties places in a first run; in one that keeps it as it is they go, and values with them."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
            self.q, self.k, self.v, self.o = (nn.Linear(*sizes) for sizes in ((12, 12), (12, 4), (12, 4), (12, 12)))
            self.heads, self.places, self.found, self.gates = 3, 4, 4, nn.Parameter(torch.rand(3, 1, 1) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            queries = self.q(x).view(*x.shape[:2], self.heads, self.places).transpose(1, 2)
            keys = self.k(x).view(*x.shape[:2], 1, self.places).transpose(1, 2)
            values = self.v(x).view(*x.shape[:2], 1, self.found).transpose(1, 2)
            found = ((queries @ keys.mT) * 0.5).softmax(-1) @ values * self.gates
            return self.last(x + self.o(found.transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    model = Gated().double()
    graph = trace(model, X)
    assert graph.sizes == {"first": 12, "q": 4, "v": 4}
    check_units(model, graph, X, ["v"])


def test_a_number_that_only_equals_the_heads_stays() -> None:
    """Meta's name for the heads of queries that share a key, here for how many times a block is applied."""

    class Repeated(GroupedAttention):
        def __init__(self) -> None:
            super().__init__(4, 1, turn="none")
            self.n_rep = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((super(Repeated, self).forward(x) for _ in range(self.n_rep)), torch.zeros(()))

    graph = trace(Repeated().double(), X, heads=True)
    assert graph.sizes == {"first": 12, "q": 4}
    assert ("", "n_rep") not in graph.widths["q"].patches


def test_new_heads_change_nothing_and_learn() -> None:
    torch.manual_seed(0)
    model = OneKey("sizes", "product", "half").double()
    graph, expected = trace(model, X), outputs(model, X)
    evolvenet.grow(model, graph, {"qkv": 8})
    assert distance(outputs(model, X), expected) < 1e-12
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert float(model.o.weight[:, 6 * PLACES :].detach().abs().min()) > 0
    assert model.qkv.weight.grad is not None
    assert float(model.qkv.weight.grad[6 * PLACES : 8 * PLACES].norm(dim=1).min()) > 0


def test_a_table_that_the_first_axis_of_is_no_head_keeps_its_size() -> None:
    """With as many pairs of places as heads, what has an entry for each is told by what it is tied to."""
    torch.manual_seed(0)
    model = OneKey("sizes", "product", "pairs", bias=True, heads=4).double()
    graph = trace(model, X, heads=True)
    assert graph.sizes["qkv"] == 4
    evolvenet.resize(model, graph, {"qkv": IndexMap.keep([0, 2, 3], 4)})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert (shapes["bias"], shapes["frequencies"]) == ((3, 6, 6), (4,))
