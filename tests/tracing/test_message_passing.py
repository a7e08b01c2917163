"""Graph networks and mixtures of experts: nodes, edges and tokens are routed by data, and the units beside them pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Linear, functional

from tests.helpers.coded import CodedCases

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2, 4], [1, 2, 3, 4, 5, 0, 3, 5, 1]])
NODES = torch.linspace(-1, 1, 30).view(6, 5).sin() * 3
ADJACENCY = torch.zeros(6, 6).index_put((EDGES[1], EDGES[0]), torch.tensor(0.5))
CASES = CodedCases()


def _two(**more: nn.Module | Tensor) -> dict[str, nn.Module | Tensor]:
    return {"a": Linear(5, 8), "b": Linear(8, 3), **more}


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[:, None].expand(-1, like.shape[1])


@CASES.add("attention per target", lambda: _two(att=Linear(16, 1)), NODES, EDGES, sizes={"a": 8})
def _(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h, (i, j) = net.a(x), edges
    score = functional.leaky_relu(net.att(torch.cat([h[i], h[j]], -1))).squeeze(-1)
    highest = torch.full((len(x),), -1e9, dtype=x.dtype, device=x.device).scatter_reduce(0, j, score, "amax")
    weight = (score - highest[j]).exp()
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device).index_add(0, j, weight)
    return net.b(torch.zeros_like(h).index_add(0, j, (weight / total[j])[:, None] * h[i]).relu())


@CASES.add(
    "a learned share of the node itself",
    lambda: _two(eps=nn.Parameter(torch.tensor(0.1))),
    NODES,
    EDGES,
    sizes={"a": 8},
)
def _(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h, (i, j) = net.a(x), edges
    return net.b((1 + net.eps) * h + torch.zeros_like(h).scatter_add(0, _wide(j, h), h[i]))


@CASES.add(
    "differences along edges",
    lambda: {"a": Linear(5, 8), "c": Linear(16, 7), "b": Linear(7, 3)},
    NODES,
    EDGES,
    sizes={"a": 8, "c": 7},
)
def _(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h, (i, j) = net.a(x), edges
    message = net.c(torch.cat([h[j], h[i] - h[j]], -1)).relu()
    lowest = torch.full((len(x), message.shape[1]), -1e9, dtype=x.dtype, device=x.device)
    return net.b(lowest.scatter_reduce(0, _wide(j, message), message, "amax"))


@CASES.add(
    "largest message beside the node",
    lambda: {"a": Linear(5, 8), "s": Linear(8, 7), "t": Linear(8, 7), "b": Linear(7, 3)},
    NODES,
    EDGES,
    sizes={"a": 8, "s": 7},
)
def _(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h, (i, j) = net.a(x), edges
    largest = torch.zeros_like(h).scatter_reduce(0, _wide(j, h), h[i], "amax", include_self=False)
    return net.b((net.s(h) + net.t(largest)).relu())


@CASES.add("mean by index_reduce", _two, NODES, EDGES, sizes={"a": 8})
def _(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h, (i, j) = net.a(x), edges
    return net.b(torch.zeros_like(h).index_reduce(0, j, h[i], "mean"))


@CASES.add("segments", _two, NODES, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.segment_reduce(net.a(x), "sum", lengths=torch.tensor([2, 4]), axis=0))


@CASES.add("segments of units", _two, NODES, sizes={}, frozen={"a": "works along its units"})
def _(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = net.a(x)
    return net.b(h), torch.segment_reduce(h, "sum", lengths=torch.tensor([[3, 5]] * 6), axis=1)


@CASES.add("a sparse adjacency that is a buffer", lambda: _two(adjacency=ADJACENCY.to_sparse()), NODES, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.sparse.mm(net.adjacency, net.a(x)).relu())


@CASES.add("a sparse adjacency that is an input", _two, NODES, ADJACENCY.to_sparse(), sizes={"a": 8})
def _(net: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    return net.b((adjacency @ net.a(x)).relu() + torch.spmm(adjacency, net.a(x)))


@CASES.add("compressed rows", _two, NODES, ADJACENCY.to_sparse_csr(), sizes={"a": 8})
def _(net: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    return net.b((adjacency @ net.a(x)).relu())


@CASES.add("a sparse matrix of learned weights", lambda: _two(s=Linear(8, 1)), NODES, EDGES, sizes={"a": 8})
def _(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h = net.a(x)
    weights = torch.sparse_coo_tensor(edges, net.s(h[edges[0]])[:, 0].sigmoid(), (6, 6))
    return net.b(torch.sparse.mm(weights, h))


@CASES.add(
    "heads with a vector for each",
    lambda: {"a": Linear(5, 12), "att": nn.Parameter(torch.randn(3, 4)), "b": Linear(12, 3)},
    NODES,
    EDGES,
    sizes={"a": 3},
    numbers={"heads": 3},
)
def _(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h, (i, j) = net.a(x).view(len(x), net.heads, -1), edges
    weight = functional.leaky_relu(((h[i] + h[j]) * net.att).sum(-1)).exp()
    total = torch.zeros(len(x), net.heads, dtype=x.dtype, device=x.device).index_add(0, j, weight)
    return net.b(torch.zeros_like(h).index_add(0, j, (weight / total[j])[..., None] * h[i]).flatten(1).relu())


def _experts() -> dict[str, nn.Module | Tensor]:
    experts = [nn.Sequential(Linear(8, 7), nn.GELU(), Linear(7, 8)) for _ in range(3)]
    return _two(gate=Linear(8, 3), experts=nn.ModuleList(experts))


INNER = {f"experts.{k}.0": 7 for k in range(3)}
COMPETE = {"gate": "makes its units compete"}


@CASES.add(
    "two experts of three by where", _experts, NODES, sizes={"a": 8, **INNER}, frozen={"gate": "works on a part"}
)
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    weights, chosen = net.gate(h).softmax(-1).topk(2, -1)
    weights, out = weights / weights.sum(-1, keepdim=True), torch.zeros_like(h)
    mask = functional.one_hot(chosen, 3).permute(2, 1, 0)
    for number, expert in enumerate(net.experts):
        rank, token = torch.where(mask[number])
        current = h[None, token].reshape(-1, h.shape[1])
        out.index_add_(0, token, expert(current) * weights[token, rank, None])
    return net.b(out)


@CASES.add("experts of a capacity", _experts, NODES, sizes={"a": 8, "experts.0.2": 8, **INNER}, frozen=COMPETE)
def _(net: Any, x: Tensor) -> Tensor:
    h, capacity = net.a(x), 3
    weight, chosen = net.gate(h).softmax(-1).max(-1)
    chosen = functional.one_hot(chosen, 3)
    place = (chosen.cumsum(0) - 1) * chosen
    kept = (chosen * (place < capacity))[..., None]
    dispatch = kept.to(x.dtype) * functional.one_hot(place.clamp(max=capacity - 1), capacity).to(x.dtype)
    given = torch.einsum("nec,nd->ecd", dispatch, h)
    found = torch.stack([expert(given[number]) for number, expert in enumerate(net.experts)])
    return net.b(torch.einsum("nec,ecd->nd", dispatch * weight[:, None, None], found))


@CASES.add("tokens sorted by expert", _experts, NODES, sizes={"a": 8, "experts.0.2": 8, **INNER}, frozen=COMPETE)
def _(net: Any, x: Tensor) -> Tensor:
    """One of the experts gets no token."""
    h = net.a(x)
    weight, chosen = net.gate(h).softmax(-1).max(-1)
    chosen = chosen.clamp(max=1)
    order = chosen.argsort()
    parts = h[order].split(torch.bincount(chosen, minlength=3).tolist(), 0)
    found = torch.cat([expert(part) for expert, part in zip(net.experts, parts, strict=True)], 0)
    back = torch.empty_like(found)
    back[order] = found
    return net.b(back * weight[:, None])


@CASES.add("tokens of each expert", _experts, NODES, sizes={"a": 8, **INNER}, frozen=COMPETE)
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    out, (_, chosen) = torch.zeros_like(h), net.gate(h).softmax(-1).max(-1)
    for number, expert in enumerate(net.experts):
        rows = ((chosen + torch.arange(6, device=x.device)) % 3 == number).nonzero().squeeze(-1)
        out = out.index_add(0, rows, expert(h.index_select(0, rows)))
    return net.b(out)


@CASES.add("rows by a mask", _experts, NODES, sizes={"a": 8, **INNER})
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    out, chosen = torch.zeros_like(h), (net.gate(h).argmax(-1) + torch.arange(6, device=x.device)) % 3
    for number, expert in enumerate(net.experts):
        out[chosen == number] = expert(h[chosen == number])
    return net.b(out)


@CASES.add("rows along a dimension", _two, NODES, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.take_along_dim(net.a(x), x[:, :1].argsort(0), 0))


@CASES.add(
    "a token in the place of masked rows", lambda: _two(token=nn.Parameter(torch.randn(8))), NODES, sizes={"a": 8}
)
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).clone()
    h[x[:, 0] > 0] = net.token
    return net.b(h)


@CASES.add("rows scattered by a mask", lambda: _two(c=Linear(5, 8)), NODES, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    mask = x[:, :1] > 0
    return net.b(net.a(x).masked_scatter(mask.expand(-1, net.a.out_features), net.c(x)[mask[:, 0]]))


@CASES.add("rows scattered by a mask of one column", lambda: _two(c=Linear(5, 8)), NODES, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    mask = x[:, :1] > 0
    return net.b(net.a(x).masked_scatter(mask, net.c(x)[mask[:, 0]]))


@CASES.add(
    "some units scattered by a mask",
    lambda: _two(c=Linear(5, 8)),
    NODES,
    sizes={},
    frozen={"a": "picks them by a mask"},
)
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.b(h.masked_scatter(h > 0, net.c(x)))


@pytest.mark.parametrize("name", CASES)
def test_units_beside_what_is_routed_are_resizable(name: str) -> None:
    CASES[name].check()


def test_an_expert_without_a_token_keeps_its_widths() -> None:
    """An axis without places has no labels, but what is beside it has."""
    case = CASES["tokens sorted by expert"]
    model = case.model()
    counts: list[int] = []
    for expert in model.get_submodule("experts").children():
        expert.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    model(NODES.double())
    assert 0 in counts
