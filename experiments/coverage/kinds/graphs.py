"""Networks over graphs and points, written in plain torch as their authors' code has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def one_graph(x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of graphs as one graph: nodes `[b · n, f]`, and the source and target of each edge `[b · e]`."""
    offsets = torch.arange(len(x), device=x.device).view(-1, 1, 1) * x.shape[1]
    source, target = (edges + offsets).transpose(0, 1).flatten(1)
    return x.flatten(0, 1), source, target


class GcnLayer(nn.Module):
    """Kipf and Welling 2017: neighbours' features, divided by the roots of both degrees, summed."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(fan_in, fan_out, bias=False)
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """`[n, fan_in]` → `[n, fan_out]`."""
        x = self.linear(x)
        degree = torch.ones(len(x), dtype=x.dtype, device=x.device)
        degree = degree.index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        norm = degree.rsqrt()
        messages = x[source] * (norm[source] * norm[target]).unsqueeze(1)
        out = x * (norm * norm).unsqueeze(1)
        return out.index_add(0, target, messages) + self.bias


class Gcn(nn.Module):
    """Three layers, the mean over each graph's nodes, a head."""

    def __init__(self, features: int = 5, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GcnLayer(features, width), GcnLayer(width, width), GcnLayer(width, 12)])
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """`[b, n, 5]` and `[b, 2, e]` → `[b, 3]`."""
        nodes, source, target = one_graph(x, edges)
        for layer in self.layers:
            nodes = functional.relu(layer(nodes, source, target))
        return self.head(nodes.view(len(x), x.shape[1], -1).mean(1))


class GatLayer(nn.Module):
    """Veličković et al. 2018: attention over each node's neighbours, several heads concatenated."""

    def __init__(self, fan_in: int, fan_out: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, fan_out
        self.linear = nn.Linear(fan_in, heads * fan_out, bias=False)
        self.att_source = nn.Parameter(torch.randn(1, heads, fan_out) * 0.1)
        self.att_target = nn.Parameter(torch.randn(1, heads, fan_out) * 0.1)
        self.bias = nn.Parameter(torch.zeros(heads * fan_out))

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """`[n, fan_in]` → `[n, heads · fan_out]`."""
        h = self.linear(x).view(-1, self.heads, self.head_dim)
        score = (h * self.att_source).sum(-1)[source] + (h * self.att_target).sum(-1)[target]
        weight = functional.leaky_relu(score, 0.2).exp()
        total = torch.zeros(len(h), self.heads, dtype=h.dtype, device=h.device)
        total = total.scatter_add(0, target.unsqueeze(1).expand_as(weight), weight)
        weight = weight / (total[target] + 1e-16)
        out = torch.zeros_like(h).index_add_(0, target, h[source] * weight.unsqueeze(-1))
        return out.flatten(1) + self.bias


class Gat(nn.Module):
    """Two layers of attention, the largest value over each graph's nodes, a head."""

    def __init__(self, features: int = 5, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.conv2 = GatLayer(features, width), GatLayer(4 * width, width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """`[b, n, 5]` and `[b, 2, e]` → `[b, 3]`."""
        nodes, source, target = one_graph(x, edges)
        nodes = functional.elu(self.conv1(nodes, source, target))
        nodes = functional.elu(self.conv2(nodes, source, target))
        return self.head(nodes.view(len(x), x.shape[1], -1).amax(1))


class EdgeConv(nn.Module):
    """Wang et al. 2019: a network over each pair of a point and its neighbour, the largest value over the neighbours."""

    def __init__(self, fan_in: int, fan_out: int, k: int = 4) -> None:
        super().__init__()
        self.k = k
        self.mlp = nn.Sequential(nn.Conv2d(2 * fan_in, fan_out, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """`[b, fan_in, n]` → `[b, fan_out, n]`."""
        inner = -2 * x.transpose(1, 2) @ x
        square = (x**2).sum(1, keepdim=True)
        near = (-square - inner - square.transpose(1, 2)).topk(self.k, dim=-1)[1]
        b, c, n = x.shape
        flat = (near + torch.arange(b, device=x.device).view(-1, 1, 1) * n).view(-1)
        neighbours = x.transpose(1, 2).reshape(b * n, c)[flat].view(b, n, self.k, c)
        centre = x.transpose(1, 2).view(b, n, 1, c).expand(-1, -1, self.k, -1)
        pairs = torch.cat([neighbours - centre, centre], dim=3).permute(0, 3, 1, 2)
        return self.mlp(pairs).max(dim=-1)[0]


class Dgcnn(nn.Module):
    """Two EdgeConvs, their outputs concatenated, pooled and classified."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = EdgeConv(3, 16), EdgeConv(16, 24)
        self.fuse = nn.Sequential(nn.Conv1d(40, 32, 1, bias=False), nn.BatchNorm1d(32), nn.LeakyReLU(0.2))
        self.head = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, classes))

    def forward(self, points: Tensor) -> Tensor:
        """`[b, 3, n]` → `[b, 4]`."""
        one = self.conv1(points)
        two = self.conv2(one)
        x = self.fuse(torch.cat([one, two], 1))
        return self.head(torch.cat([x.amax(2), x.mean(2)], 1))


class SetAbstraction(nn.Module):
    """PointNet++: a few centres, the points nearest to each, a network over them, the largest value of each group."""

    def __init__(self, centres: int, k: int, fan_in: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.centres, self.k = centres, k
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        last = fan_in + 3
        for width in widths:
            self.convs.append(nn.Conv2d(last, width, 1))
            self.norms.append(nn.BatchNorm2d(width))
            last = width

    def forward(self, places: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[b, n, 3]` and `[b, n, c]` → `[b, centres, 3]` and `[b, centres, widths[-1]]`."""
        centre = places[:, :: places.shape[1] // self.centres][:, : self.centres]
        near = torch.cdist(centre, places).topk(self.k, dim=-1, largest=False)[1]
        batch = torch.arange(len(places), device=places.device).view(-1, 1, 1)
        grouped = places[batch, near] - centre.unsqueeze(2)
        if features is not None:
            grouped = torch.cat([grouped, features[batch, near]], dim=-1)
        x = grouped.permute(0, 3, 2, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x)))
        return centre, torch.max(x, 2)[0].transpose(1, 2)


class PointNet2(nn.Module):
    """Two set abstractions and a head over all groups."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.sa1 = SetAbstraction(8, 4, 0, (12, 16))
        self.sa2 = SetAbstraction(4, 3, 16, (20, 24))
        self.fc1, self.bn1, self.drop = nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Dropout(0.4)
        self.fc2 = nn.Linear(16, classes)

    def forward(self, points: Tensor) -> Tensor:
        """`[b, n, 3]` → `[b, 4]`."""
        places, features = self.sa1(points, None)
        places, features = self.sa2(places, features)
        x = self.drop(functional.relu(self.bn1(self.fc1(features.amax(1)))))
        return functional.log_softmax(self.fc2(x), -1)
