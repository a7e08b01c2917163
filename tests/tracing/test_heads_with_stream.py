"""Heads whose places norms or decays tie, after the product of queries and keys too: whole heads go, with the stream or alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.tracing import shuffle_and_widen

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Retention(nn.Module):
    """Retention with a decay and a norm for each head (Sun et al. 2023), values of the stream's shape or of their own."""

    decay: Tensor

    def __init__(self, heads: int, places: int, stream: int, like_stream: bool, trained: bool) -> None:
        super().__init__()
        inner = heads * places
        self.heads, self.places, self.like_stream = heads, places, like_stream
        self.norm, self.group_norm = nn.LayerNorm(stream), nn.GroupNorm(heads, inner)
        self.q, self.k, self.v, self.g = (nn.Linear(stream, inner, bias=False) for _ in range(4))
        self.out = nn.Linear(inner, stream, bias=False)
        decay = torch.log(1 - 2 ** (-2.0 - torch.arange(heads)))
        if trained:
            self.decay = nn.Parameter(decay)
        else:
            self.register_buffer("decay", decay)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x)
        steps = torch.arange(x.shape[1])
        distance = steps[:, None] - steps[None]
        mask = torch.exp(distance * self.decay[:, None, None]).masked_fill(distance < 0, 0)
        q, k, v = (
            each.view(*x.shape[:2], self.heads, self.places).transpose(1, 2)
            for each in (self.q(inner), self.k(inner), self.v(inner))
        )
        out = (q @ k.transpose(-1, -2) * self.places**-0.5 * mask) @ v
        out = self.group_norm(out.transpose(1, 2).reshape(-1, self.heads * self.places))
        out = out.view_as(x) if self.like_stream else out.view(*x.shape[:2], -1)
        return x + self.out(F.silu(self.g(inner)) * out)


class RetNet(nn.Module):
    def __init__(self, layers: int, stream: int, like_stream: bool, trained: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, stream), nn.Linear(stream, 3)
        self.blocks = nn.ModuleList([Retention(4, 6, stream, like_stream, trained) for _ in range(layers)])
        self.mlps = nn.ModuleList(
            [nn.Sequential(nn.Linear(stream, 20), nn.GELU(), nn.Linear(20, stream)) for _ in range(layers)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block, mlp in zip(self.blocks, self.mlps, strict=True):
            x = block(x)
            x = x + mlp(x)
        return self.last(x)


def retnet(stream: int, like_stream: bool, trained: bool = False) -> RetNet:
    torch.manual_seed(0)
    return RetNet(2, stream, like_stream, trained).double().eval()


@pytest.mark.parametrize("trained", [False, True])
def test_heads_go_with_the_stream_whose_shape_their_values_take(trained: bool) -> None:
    model = retnet(24, True, trained)
    graph = trace(model, X)
    assert graph.sizes == {"first": 4, "mlps.0.0": 20, "mlps.1.0": 20}
    assert graph.widths["first"].smallest == 2
    places = {tie.tensor: tie.repeat for tie in graph.widths["first"].ties if tie.tensor.startswith("blocks.1")}
    assert places["blocks.1.decay"] == 1
    assert places["blocks.1.q.weight"] == places["blocks.1.norm.weight"] == 6
    graph = shuffle_and_widen(model, graph, X)
    graph = evolvenet.prune(model, graph, {"first": 3})
    norm = model.get_submodule("blocks.1.group_norm")
    assert isinstance(norm, nn.GroupNorm)
    assert (model.first.out_features, norm.num_groups, norm.num_channels) == (18, 3, 18)
    assert outputs(model, X)[0].shape == (2, 6, 3)


def test_heads_go_alone_where_their_values_have_a_shape_of_their_own() -> None:
    model = retnet(16, False)
    graph = trace(model, X)
    heads = {name: size for name, size in graph.sizes.items() if name.startswith("blocks")}
    assert heads == {"blocks.0.q": 4, "blocks.1.q": 4}
    assert graph.sizes["first"] == 16
    graph = shuffle_and_widen(model, graph, X)
    with torch.no_grad():
        model.get_parameter("blocks.0.out.weight")[:, 6:12] = 0
    expected = outputs(model, X)
    evolvenet.resize(model, graph, {"blocks.0.q": IndexMap.keep([0, 2, 3, 4, 5, 6], 7)})
    assert distance(outputs(model, X), expected) < 1e-12
    assert model.get_buffer("blocks.0.decay").shape == (6,)
