"""What scales, gates or bounds units and is not trained (kernels, grids of splines): new units get entries of present ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.tracing.trace import trace
from experiments.coverage.kinds.functions import Kan
from tests.helpers.cases import distance, outputs
from tests.helpers.tracing import Between, shuffle_and_widen

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PER_UNIT = torch.linspace(0.5, 2.0, 8)

Code = Callable[..., Tensor]
GATES: dict[str, tuple[Tensor, Code]] = {
    "scaled": (PER_UNIT, lambda net, x, h: h * net.buffer),
    "divided": (PER_UNIT, lambda net, x, h: h / net.buffer),
    "normalised": (PER_UNIT, lambda net, x, h: h * (net.buffer + 1e-5).rsqrt()),
    "bounded": (PER_UNIT, lambda net, x, h: torch.minimum(h, net.buffer).tanh()),
    "picked": (PER_UNIT > 1, lambda net, x, h: torch.where(net.buffer.bool(), h, 0.1 * h)),
    "splines": (PER_UNIT[:, None] * torch.arange(4.0), lambda net, x, h: _hats(h, net.buffer)),
}


def _hats(h: Tensor, grid: Tensor) -> Tensor:
    """The sum of linear splines on the grid of each unit."""
    h = h.unsqueeze(-1)
    left, right = (h - grid[:, :-1]) / (grid[:, 1:] - grid[:, :-1]), 1.0
    return (left.clamp(0, right) * torch.arange(1.0, 4.0, dtype=h.dtype)).sum(-1)


class Gated(Between):
    buffer: Tensor

    def __init__(self, buffer: Tensor, code: Code, trained: bool | None = None) -> None:
        super().__init__(code)
        if trained is None:
            self.register_buffer("buffer", buffer.float())
        else:
            self.buffer = nn.Parameter(buffer.float(), requires_grad=trained)


def gated(name: str, trained: bool | None = None) -> Gated:
    torch.manual_seed(0)
    return Gated(*GATES[name], trained).double()


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("trained", [None, False], ids=["buffer", "fixed parameter"])
def test_new_units_get_entries_of_present_ones_and_change_no_output(name: str, trained: bool | None) -> None:
    model = gated(name, trained)
    graph, expected, before = trace(model, X[:2]), outputs(model, X), model.buffer.clone()
    assert graph.sizes == {"a": 8}
    assert graph.gates == {"buffer"}
    evolvenet.grow(model, graph, {"a": 11})
    assert distance(outputs(model, X), expected) < 1e-12
    assert torch.equal(model.buffer[:8], before)
    assert all((before == row).reshape(8, -1).all(1).any() for row in model.buffer[8:])
    evolvenet.prune(model, trace(model, X[:2]), {"a": 5})
    assert model.buffer.shape[0] == 5


def test_new_units_of_every_method_change_no_output() -> None:
    model = gated("splines")
    graph, expected = trace(model, X[:2]), outputs(model, X)
    for size, method in ((11, "paired"), (13, "orthogonal"), (15, "paired")):
        graph = evolvenet.grow(model, graph, {"a": size}, method=method)
        assert distance(outputs(model, X), expected) < 1e-12


def test_what_is_only_added_or_consumes_units_gets_zeros() -> None:
    def code(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        beside = h @ net.get_buffer("consumer").T
        return F.pad((h - net.get_buffer("mean")).relu(), (0, 0)) * (1 + beside.mean())

    model = Between(code)
    model.register_buffer("mean", torch.ones(8))
    model.register_buffer("consumer", torch.ones(3, 8))
    model.double()
    graph, expected = trace(model, X[:2]), outputs(model, X)
    assert graph.gates == frozenset()
    assert graph.sizes == {"a": 8}
    evolvenet.resize(model, graph, {"a": IndexMap.grow(8, 2)})
    assert not model.get_buffer("mean")[8:].any()
    assert not model.get_buffer("consumer")[:, 8:].any()
    assert distance(outputs(model, X), expected) < 1e-12


def test_the_vectors_of_a_spectral_norm_and_the_statistics_of_a_norm_are_no_gates() -> None:
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 6, 3))
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)).double().eval()
    graph, expected = trace(model, IMAGE), outputs(model, IMAGE)
    assert graph.gates == frozenset()
    evolvenet.resize(model, graph, {name: IndexMap.grow(size, 3) for name, size in graph.sizes.items()})
    assert distance(outputs(model, IMAGE), expected) < 1e-12
    vectors = {name: buffer for name, buffer in model.named_buffers() if name.endswith("_u")}
    assert [float(vector[6:].abs().sum()) for vector in vectors.values()] == [0.0]


def test_a_fixed_kernel_blurs_new_channels_as_it_does_the_others() -> None:
    class Blurred(nn.Module):
        kernel: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 1)
            row = torch.tensor([1.0, 2.0, 1.0])
            self.register_buffer("kernel", (torch.outer(row, row) / 16).repeat(6, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.b(F.conv2d(x, self.kernel, stride=2, groups=x.shape[1]))

    model = Blurred().double()
    graph, expected = trace(model, IMAGE), outputs(model, IMAGE)
    evolvenet.grow(model, graph, {"a": 9})
    assert distance(outputs(model, IMAGE), expected) < 1e-12
    assert bool((model.kernel == model.kernel[0]).all())


def test_a_kan_may_have_other_grids_once_it_is_trained() -> None:
    torch.manual_seed(0)
    model, x = Kan().double(), X[:, :4].tanh()
    graph = trace(model, x[:1])
    assert graph.sizes == {"layers.0": 12, "layers.1": 10}
    assert from_state_dict(to_state_dict(graph)) == graph
    for layer in model.layers:
        grid = layer.get_buffer("grid")
        grid += 0.03 * torch.rand(len(grid), 1)
    expected = outputs(model, x)
    evolvenet.grow(model, graph, {"layers.0": 15, "layers.1": 12})
    assert distance(outputs(model, x), expected) < 1e-12
    loss = model(x).square().mean()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_kan_is_permuted_grown_and_pruned_exactly() -> None:
    torch.manual_seed(0)
    model, x = Kan().double(), X[:, :4].tanh()
    graph = shuffle_and_widen(model, trace(model, x), x)
    first = graph.widths["layers.0"]
    with torch.no_grad():
        for layer in model.layers[1:2]:
            for weight in layer.parameters():
                weight[:, 3] = 0
    expected = outputs(model, x)
    rest = [unit for unit in range(first.size) if unit != 3]
    evolvenet.resize(model, graph, {"layers.0": IndexMap.keep(rest, first.size)})
    assert distance(outputs(model, x), expected) < 1e-12
