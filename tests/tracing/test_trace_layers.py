"""Widths in attributes that the model's code uses, and in weights that are computed from other weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.trace import trace
from tests.helpers.cases import FLOAT, distance, outputs, without_reasons
from tests.helpers.tracing import Between, shuffle_and_widen


class Scales(nn.Module):
    """Res2Net's way: pieces of `width` channels, each convolved together with what the one before has become."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Conv2d(3, width * count, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(count - 1))
        self.leave = nn.Conv2d(width * count, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.enter(x).split(self.width, 1)
        made = [first]
        for conv, piece in zip(self.convs, rest, strict=True):
            made.append(conv(made[-1] + piece).relu())
        return self.leave(torch.cat(made, 1))


def test_pieces_of_one_split_resize_together_with_the_attribute_of_its_size() -> None:
    model, x = Scales(4, 3).double(), torch.randn(2, 3, 5, 5, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    assert graph.sizes == {"enter": 4, "convs.1": 4}
    graph = evolvenet.resize(model, graph, {"enter": IndexMap.grow(4, 2)})
    assert distance(outputs(model, x), expected) < 1e-9
    assert model.width == 6
    assert {name: width.ties for name, width in graph.widths.items()} == {
        name: width.ties for name, width in trace(model, x).widths.items()
    }


class Scaled(nn.Module):
    """MetaFormer's way: the shape of the scale is kept in a tuple."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shape = (channels, 1, 1)
        self.enter, self.leave = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 2, 1)
        self.scale = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x) * self.scale.view(self.shape))


def test_a_size_in_a_tuple_attribute_is_updated() -> None:
    model, x = Scaled(6).double(), torch.randn(2, 3, 5, 5, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    graph = evolvenet.resize(model, graph, {"enter": IndexMap.grow(6, 3)})
    assert distance(outputs(model, x), expected) < 1e-9
    assert model.shape == (9, 1, 1)
    assert without_reasons(graph) == without_reasons(trace(model, x))


class LowRank(nn.Module):
    """LoRA: a product of two thin matrices is added to a weight `[out, in]`."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(rows, rank)), nn.Parameter(torch.randn(rank, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * self.up @ self.down


PARAMETRIZED = {
    "weight norm": (nn.utils.parametrizations.weight_norm, {"a": 8, "c.parametrizations.weight": 8}),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, {"a": 8, "c.parametrizations.weight": 8}),
    "low rank": (
        lambda layer: parametrize.register_parametrization(layer, "weight", LowRank(8, 8, 3)),
        {"a": 8, "c.parametrizations.weight": 8, "c.parametrizations.weight.0": 3},
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_parametrized_layer_resizes_with_the_tensors_of_its_parametrization(name: str) -> None:
    wrap, sizes = PARAMETRIZED[name]
    model = nn.Sequential(
        OrderedDict(a=nn.Linear(5, 8), f=nn.ReLU(), c=wrap(nn.Linear(8, 8)), g=nn.ReLU(), h=nn.Linear(8, 2))
    )
    x = torch.randn(2, 5, dtype=FLOAT)
    graph, expected = trace(model.double().eval(), x), outputs(model, x)
    assert graph.sizes == sizes
    (full,) = [n for n, shape in graph.shapes.items() if n.startswith("c.") and shape == (8, 8)]
    assert full in {tie.tensor for tie in graph.widths["c.parametrizations.weight"].producers}
    assert full in {tie.tensor for tie in graph.widths["a"].consumers}
    graph = shuffle_and_widen(model, graph, x)
    grown = {width.name: width.size + 2 for width in graph.resizable if width.mixed is None}
    evolvenet.grow(model, graph, grown)
    assert distance(outputs(model, x), expected) < 1e-9
    layer: Any = model.get_submodule("c")
    assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)


LENGTHS: dict[str, Callable[[], nn.Module]] = {
    "of columns": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 3), dim=1),
    "of columns, by hooks": lambda: nn.utils.weight_norm(nn.Linear(8, 3), dim=1),
    "of input channels": lambda: nn.Sequential(
        nn.Unflatten(1, (8, 1)), nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(8, 3, 1)), nn.Flatten()
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LENGTHS)
def test_units_whose_columns_have_lengths_of_their_own_do_not_grow(name: str) -> None:
    """A new column of that length would be read at once, whatever its direction; the units can be permuted and cut."""
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), LENGTHS[name]()).double(), torch.randn(6, 5, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    assert "scales the column of each unit to a length" in (graph.widths["0"].mixed or "")
    with pytest.raises(evolvenet.ResizeError, match="without changing the function"):
        evolvenet.grow(model, graph, {"0": 12})
    graph = evolvenet.resize(model, graph, {"0": evolvenet.IndexMap.of(range(7, -1, -1), 8)})
    assert distance(outputs(model, x), expected) < 1e-9
    assert evolvenet.prune(model, graph, {"0": 5}).sizes == {"0": 5}


class Biased(nn.Module):
    """Swin v2's way: a dense layer reads a table of coordinates, which is a buffer, and makes a bias for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 2))
        self.mlp = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + self.mlp(self.table).flatten())


def test_a_product_with_a_buffer_counts_as_one_with_data() -> None:
    """Not a weight made of weights: whichever made the units would count as reading them, and growth change the output."""
    model, x = Biased().double(), torch.randn(2, 5, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    assert [tie.tensor for tie in graph.widths["mlp.0"].producers] == ["mlp.0.weight"]
    assert [tie.tensor for tie in graph.widths["mlp.0"].consumers] == ["mlp.2.weight"]
    evolvenet.grow(model, graph, {"mlp.0": 9})
    assert distance(outputs(model, x), expected) < 1e-9


def test_a_layer_of_which_a_parameter_is_unused_is_frozen() -> None:
    """Its weight could be resized and its idle bias not: nothing could load such a layer again."""
    graph = trace(Between(lambda m, x, h: functional.linear(h, m.c.weight), c=nn.Linear(8, 8)), torch.randn(2, 5))
    assert graph.sizes == {"a": 8}
    assert "expected bias of shape (7,)" in (graph.widths["c"].frozen or "")


class Decoder(nn.Module):
    """From a vector to channels × rows × columns by a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = (6, 2, 2)
        self.first, self.last = nn.Linear(3, 24), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().view(-1, *self.shape))


@pytest.mark.parametrize("kind", ["module", "attribute"])
def test_channels_that_a_vector_is_laid_out_as_resize_with_the_shape_that_says_so(kind: str) -> None:
    layers = [nn.Linear(3, 24), nn.ReLU(), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 2, 1)]
    model = (nn.Sequential(*layers) if kind == "module" else Decoder()).double().eval()
    x = torch.randn(2, 3, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    ((name, size),) = graph.sizes.items()
    assert size == 6
    graph = evolvenet.grow(model, graph, {name: 9})
    assert distance(outputs(model, x), expected) < 1e-9
    evolvenet.prune(model, graph, {name: 4})
    assert [tuple(output.shape) for output in outputs(model, x)] == [(2, 2, 2, 2)]
