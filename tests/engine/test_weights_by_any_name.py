"""A weight is what is multiplied with data, a bias what is added to that, whatever they are called and however it is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.engine.functional import commit
from evolvenet.graph.index_map import IndexMap
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.surgery.resize_model import compile_surgery
from tests.helpers.networks.weights import WAYS, linear_network, rewritten

X = torch.randn(128, 6, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.randint(0, 3, (128,), generator=torch.Generator().manual_seed(2))
ALL = [*WAYS, "one module"]
NEGATED = ("subtracted from a bias", "subtracted by rsub")
"""With the negative weights: the same random direction is another new unit."""


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


def sizes_of(graph: evolvenet.WidthGraph, *sizes: int) -> dict[str, int]:
    return dict(zip(graph.sizes, sizes, strict=True))


def pruned(model: nn.Module, batches: list[Tensor] | None = None) -> Tensor:
    graph = evolvenet.trace(model, X[:2])
    evolvenet.prune(model, graph, sizes_of(graph, 11, 9), batches=batches)
    return model(X).detach()


def grown(model: nn.Module, method: str, with_loss: bool = False) -> Tensor:
    """The outputs after three steps of training: new units' rows, columns, biases all count."""
    graph = evolvenet.trace(model, X[:2])
    data = {"batches": [(X, LABELS)], "loss": loss} if with_loss else {}
    source = torch.Generator().manual_seed(5)
    evolvenet.grow(model, graph, sizes_of(graph, 20, 14), method=method, generator=source, **data)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(X), LABELS).backward()
        optimizer.step()
    return model(X).detach()


def evolved(model: nn.Module, policy: evolvenet.Policy) -> tuple[list[tuple[int, ...]], Tensor]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    evolver = evolvenet.Evolver(model, optimizer, policy, X[:2])
    sizes = []
    for event in range(3):
        optimizer.zero_grad()
        outputs = model(X)
        outputs.retain_grad()
        loss(outputs, LABELS).backward()
        assert outputs.grad is not None
        evolver.observe(X, [outputs.grad])
        optimizer.step()
        assert evolver.step(progress=(event + 1) / 3).skipped is None
        sizes.append(tuple(evolver.graph.sizes.values()))
    return sizes, model(X).detach()


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for one, two in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("way", ALL)
def test_spectra_and_allocations_equal_those_of_linear_layers(way: str) -> None:
    model, reference = rewritten(way), linear_network()
    graph, other = evolvenet.trace(model, X[:2]), evolvenet.trace(reference, X[:2])
    equal(evolvenet.spectra(model, graph), evolvenet.spectra(reference, other))
    equal(evolvenet.spectra(model, graph, [X]), evolvenet.spectra(reference, other, [X]))
    equal(evolvenet.output_spectra(model, graph, [X]), evolvenet.output_spectra(reference, other, [X]))
    ours = evolvenet.allocate(model, graph, parameters=150, batches=[X])
    theirs = evolvenet.allocate(reference, other, parameters=150, batches=[X])
    assert list(ours.values()) == list(theirs.values())


@pytest.mark.parametrize("way", ALL)
def test_cuts_equal_those_of_linear_layers(way: str) -> None:
    for batches in (None, [X[:64], X[64:]]):
        ours, theirs = pruned(rewritten(way), batches), pruned(linear_network(), batches)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("way", [way for way in ALL if way not in NEGATED])
@pytest.mark.parametrize("method", ["orthogonal", "paired"])
def test_new_units_equal_those_of_linear_layers(way: str, method: str) -> None:
    ours, theirs = grown(rewritten(way), method), grown(linear_network(), method)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("way", ["clip", "einsum", "einsum, weight first", "bias of images", "one module"])
@pytest.mark.parametrize("method", ["gradmax", "tiny"])
def test_new_units_by_gradients_equal_those_of_linear_layers(way: str, method: str) -> None:
    ours, theirs = grown(rewritten(way), method, True), grown(linear_network(), method, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("way", ["names swapped", "einsum", "bias of images", "one module"])
@pytest.mark.parametrize(
    "policy",
    [
        evolvenet.Threshold(prune=0.05, grow=0.9),
        evolvenet.Price(price=1e-3),
        evolvenet.Budget(params=150, by=0.6),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_runs_equal_those_of_linear_layers(way: str, policy: evolvenet.Policy) -> None:
    sizes, outputs = evolved(rewritten(way), policy)
    expected_sizes, expected = evolved(linear_network(), policy)
    assert sizes == expected_sizes
    assert sizes[-1] != (16, 12)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", NEGATED)
@pytest.mark.parametrize("method", ["orthogonal", "paired"])
def test_new_units_of_products_that_are_subtracted_leave_the_outputs_as_they_are(way: str, method: str) -> None:
    model = rewritten(way)
    before, graph = model(X), evolvenet.trace(model, X[:2])
    evolvenet.grow(model, graph, sizes_of(graph, 20, 14), method=method)
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-12)


class AtSums(nn.Module):
    """A residual block whose consumer ends in a sum, with a bias that is added, subtracted, or subtracted from."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.inner = way, nn.Conv2d(3, 16, 3, padding=1)
        self.kernel, self.b = nn.Parameter(torch.randn(3, 16, 1, 1) / 4), nn.Parameter(torch.randn(1, 3, 1, 1))
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean = torch.randn(3)
        self.double().eval()
        with torch.no_grad():
            self.kernel.mul_(-1 if way == "from" else 1)
            self.b.mul_(-1 if way == "subtracted" else 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(self.inner(x).relu(), self.kernel)
        shifted = {"added": lambda: y + self.b, "subtracted": lambda: y - self.b, "from": lambda: self.b - y}
        return (self.norm(shifted[self.way]()) + x).tanh()


def test_refits_at_sums_equal_those_of_added_biases() -> None:
    images = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    kept = {"inner": IndexMap.keep(range(9), size=16)}

    def cut(way: str, refitted: bool) -> Tensor:
        model = AtSums(way)
        graph = evolvenet.trace(model, images[:2])
        surgery = compile_surgery(model, graph, kept)
        commit(model, reconstruct(model, graph, surgery, [images]) if refitted else surgery)
        return model(images).detach()

    before, expected = AtSums("added")(images).detach(), cut("added", refitted=True)
    assert (expected - before).norm() < 0.9 * (cut("added", refitted=False) - before).norm()
    for way in ("subtracted", "from"):
        torch.testing.assert_close(cut(way, refitted=True), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "shift",
    [
        lambda y, b, used: torch.add(y, b, alpha=2),
        lambda y, b, used: torch.sub(y, b, alpha=2),
        lambda y, b, used: (y - b) * used.exp(),
        lambda y, b, used: y - b - b,
        lambda y, b, used: y - (y.detach() * 0 + b),
        lambda y, b, used: b - y.relu(),
        lambda y, b, used: (b - y) + used,
        lambda y, b, used: used - (y - b),
    ],
)
def test_a_cut_with_a_refit_is_no_worse_than_without_whatever_is_done_with_the_bias(shift: Any) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.w = nn.Linear(6, 16), nn.Parameter(torch.randn(3, 16))
            self.b, self.used = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return shift(nn.functional.linear(self.inner(x).relu(), self.w), self.b, self.used)

    errors = []
    for batches in ([X], None):
        model = Shifted()
        before, graph = model(X).detach(), evolvenet.trace(model, X[:2])
        kept = IndexMap.keep(range(3, 12), size=16)
        surgery = compile_surgery(model, graph, {"inner": kept})
        commit(model, reconstruct(model, graph, surgery, batches) if batches else surgery)
        errors.append(float((model(X) - before).square().mean()))
    assert errors[0] <= errors[1]


class FixedBasis(nn.Module):
    """A read-out that is not trained: a discrete cosine transform, mel filters, random features."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 16)
        self.register_buffer("basis", torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x).tanh() @ self.get_buffer("basis")


def test_a_buffer_that_consumes_a_width_is_cut_and_never_fitted() -> None:
    model = FixedBasis()
    basis, graph = model.get_buffer("basis").clone(), evolvenet.trace(model, X[:2])
    spectrum = evolvenet.spectra(model, graph, [X])["hidden"]
    linear = nn.Sequential(model.hidden, nn.Tanh(), nn.Linear(16, 3, bias=False).double())
    linear[2].weight.data = basis.T.clone()
    expected = evolvenet.spectra(linear, evolvenet.trace(linear, X[:2]), [X])["0"]
    torch.testing.assert_close(spectrum, expected)
    assert sum(evolvenet.allocate(model, graph, parameters=70, batches=[X]).values()) == 10
    kept = {tuple(row) for row in basis.tolist()}
    evolvenet.prune(model, graph, {"hidden": 12}, batches=[X])
    rows = {tuple(row) for row in model.get_buffer("basis").tolist()}
    assert (len(rows), rows <= kept) == (12, True)


def test_no_policy_grows_a_width_that_only_buffers_consume(caplog: pytest.LogCaptureFixture) -> None:
    model = FixedBasis()
    for policy in (evolvenet.Price(price=1e-9), evolvenet.Threshold(prune=1e-6, grow=0.5)):
        sizes, _ = evolved(model, policy)
        assert sizes[-1][0] <= 16
    # What an event has done is logged too, where another test has made Lightning show it.
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    before = model(X)
    evolvenet.grow(model, evolvenet.trace(model, X[:2]), {"hidden": 20})
    torch.testing.assert_close(model(X), before)
    assert "nothing that consumes the units of hidden is trained (basis)" in caplog.text


class Scaled(nn.Module):
    """A width with a bias and a scale, each named like the other."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.out = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 3)
        self.scale, self.unbiased = nn.Parameter(torch.randn(8)), nn.Parameter(torch.rand(8) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.kernel + self.scale).tanh() * self.unbiased)


def test_new_units_start_with_no_bias_and_a_usual_scale_whatever_these_are_called() -> None:
    model = Scaled().double()
    graph = evolvenet.trace(model, X[:2])
    evolvenet.grow(model, graph, {next(iter(graph.sizes)): 11})
    assert model.scale[8:].tolist() == [0, 0, 0]
    torch.testing.assert_close(model.unbiased[8:], model.unbiased[:8].mean().expand(3))
