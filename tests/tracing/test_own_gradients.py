"""Networks whose own code computes gradients: their widths are found, and a change leaves gradients and outputs as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

import evolvenet
from evolvenet.execution.routes import runs_until_every_route
from evolvenet.execution.step import run_model
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.measurement.cost import macs, uses

POINTS = torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Derivatives(nn.Module):
    """A residual of a differential equation: first and second derivatives of the output by the input."""

    def __init__(self, guarded: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))
        self.guarded = guarded

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.guarded or torch.is_grad_enabled()):
            x = x.detach().requires_grad_()
            u = self.net(x)
            (first,) = grad(u, x, torch.ones_like(u), create_graph=True)
            second = [grad(first[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2)]
        return u, first, second[0] + second[1]


class Forces(nn.Module):
    """F = −dE/dx with convolutions, norms and pooling in E."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8), nn.SiLU(), nn.MaxPool1d(2), nn.Conv1d(8, 12, 3),
            nn.GroupNorm(4, 12), nn.SiLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(36, 16), nn.GELU(), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        x = x[:, :1, None].repeat(1, 1, 16).requires_grad_()
        energy = self.net(x)
        return energy, -grad(energy.sum(), x, create_graph=True)[0]


class ByFeatures(nn.Module):
    """The gradient by a layer in between, times that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 16), nn.Linear(16, 12), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).tanh()
        u = self.c(self.b(hidden).tanh())
        return u, (grad(u.sum(), hidden, create_graph=True)[0] * hidden).sum(1)


class ByWeights(ByFeatures):
    """A penalty on the gradient by weights."""

    def forward(self, x: Tensor) -> Any:
        u = self.c(self.b(self.a(x).tanh()).tanh())
        found = grad(u.square().sum(), [self.b.weight, self.c.weight], create_graph=True)
        return u, torch.stack([each.square().sum() for each in found]).sum()


class Functional(Derivatives):
    """The Jacobian of every sample, by torch.func."""

    def forward(self, x: Tensor) -> Any:
        return self.net(x), torch.func.vmap(torch.func.jacrev(self.net))(x)


class Adapted(Derivatives):
    """A step of gradient descent on the weights inside of forward."""

    def forward(self, x: Tensor) -> Any:
        weights = dict(self.net.named_parameters())
        found = grad(self.net(x).square().mean(), list(weights.values()), create_graph=True)
        moved = {name: weights[name] - 0.1 * each for name, each in zip(weights, found, strict=True)}
        return torch.func.functional_call(self.net, moved, (x,))


KINDS: dict[str, tuple[Callable[[], nn.Module], set[str], bool]] = {
    "derivatives": (Derivatives, {"net.0", "net.2"}, True),
    "guarded": (lambda: Derivatives(guarded=True), {"net.0", "net.2"}, False),
    "forces": (Forces, {"net.0", "net.4", "net.9"}, True),
    "features": (ByFeatures, {"a", "b"}, True),
    "weights": (ByWeights, {"a", "b"}, True),
    "functional": (Functional, {"net.0", "net.2"}, False),
    "adapted": (Adapted, {"net.0", "net.2"}, True),
}


def answers(model: nn.Module) -> list[Tensor]:
    found = run_model(model.eval(), POINTS[:7].clone())
    return [each.detach() for each in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("kind", KINDS)
def test_new_orders_and_new_units_leave_outputs_and_gradients_as_they_are(kind: str) -> None:
    make, widths, differentiates = KINDS[kind]
    torch.manual_seed(0)
    model = make().double()
    graph = evolvenet.trace(model, POINTS[:2])
    assert set(graph.sizes) == widths
    assert graph.differentiates == differentiates
    assert from_state_dict(to_state_dict(graph)) == graph
    before = answers(model)
    orders = {
        name: evolvenet.IndexMap.of(torch.randperm(size).tolist(), size=size) for name, size in graph.sizes.items()
    }
    graph = evolvenet.resize(model, graph, orders)
    torch.testing.assert_close(answers(model), before, rtol=1e-9, atol=1e-9)
    free = [width for width in graph.resizable if width.mixed is None]
    graph = evolvenet.grow(model, graph, {width.name: width.size + 3 + k for k, width in enumerate(free)})
    torch.testing.assert_close(answers(model), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_prunes_and_measures(kind: str) -> None:
    torch.manual_seed(0)
    model = KINDS[kind][0]().double()
    evolver = evolvenet.Evolver(model, None, evolvenet.Threshold(prune=0.02, grow=0.99), POINTS[:2])
    evolver.observe(POINTS)
    event = evolver.step()
    assert event.skipped is None
    assert event.parameters < event.parameters_before
    assert 0 < event.macs < evolver.history.initial.macs


def test_what_a_cut_does_to_gradients_is_no_more_than_what_it_does_to_units() -> None:
    """Units that are nothing are cut without a trace, in the derivatives as well."""
    torch.manual_seed(0)
    model: Any = Derivatives().double()
    with torch.no_grad():
        model.net[0].weight[10:] = 0
        model.net[0].bias[10:] = 0
    before, graph = answers(model), evolvenet.trace(model, POINTS[:2])
    evolvenet.prune(model, graph, {"net.0": 10}, batches=[POINTS])
    assert model.net[0].out_features == 10
    torch.testing.assert_close(answers(model), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("guarded", [False, True])
def test_consumers_are_refitted_on_the_forward_pass_alone(guarded: bool) -> None:
    torch.manual_seed(0)
    model: Any = Derivatives(guarded).double()
    columns = model.net[2].weight.detach().clone()
    evolvenet.prune(model, evolvenet.trace(model, POINTS[:2]), {"net.0": 10}, batches=[POINTS])
    assert model.net[2].weight.shape == (12, 10)
    assert torch.cdist(model.net[2].weight.detach().T, columns.T).min() > 1e-6, "no column is as it was"


def test_a_gradient_of_a_fixed_size_freezes_what_it_is_given_for() -> None:
    class Given(ByFeatures):
        def forward(self, x: Tensor) -> Any:
            x = x.requires_grad_()
            hidden = self.a(x)
            return self.c(self.b(hidden)), grad(hidden, x, torch.ones(len(x), 16).to(x) + x[:1, :1], create_graph=True)

    graph = evolvenet.trace(Given().double(), POINTS[:2])
    assert set(graph.sizes) == {"b"}


def test_backward_passes_inside_count_as_operations_and_their_routes_run() -> None:
    model, x = Derivatives().double(), POINTS[:2]
    forward = 2 * 16 + 16 * 12 + 12
    assert macs(model.net, x) == forward
    assert macs(model, x, gradients=True) > 2 * forward
    assert uses(model, x, gradients=True) == {f"net.{name}": count for name, count in uses(model.net, x).items()}
    assert runs_until_every_route(model, x) == 1
    with torch.inference_mode():
        assert runs_until_every_route(model, x.clone()) == 1


def test_attention_is_differentiated_op_by_op() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attend = nn.Linear(2, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Any:
            x = x[:, None].repeat(1, 3, 1).requires_grad_()
            hidden = self.embed(x)
            with sdpa_kernel(SDPBackend.MATH):
                energy = self.head(self.attend(hidden, hidden, hidden)[0]).sum((1, 2))
            return energy, grad(energy.sum(), x, create_graph=True)[0]

    graph = evolvenet.trace(Attends().double(), POINTS[:2])
    assert graph.differentiates
    assert "embed" in graph.sizes


def test_layers_of_a_model_that_needs_autograd_are_factorized() -> None:
    made = []
    for guarded in (True, False):
        torch.manual_seed(0)
        model = Derivatives(guarded).double()
        evolvenet.factorize(model, {"net.2": 4}, batches=[POINTS])
        made.append(model(POINTS)[1].detach())
        report = evolvenet.factorize(Derivatives(guarded).double(), latency=60.0, batches=[POINTS])
        assert "within the limit" in str(report)
    torch.testing.assert_close(made[0], made[1])


def test_a_run_changes_ranks_of_a_model_that_needs_autograd() -> None:
    model = Derivatives().double()
    evolver = evolvenet.Evolver(model, None, evolvenet.Budget(params=200, by=0.5, lowrank=True), POINTS[:2])
    evolver.observe(POINTS)
    assert evolver.step(progress=0.5).skipped is None
    assert sum(parameter.numel() for parameter in model.parameters()) <= 200
