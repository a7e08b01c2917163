"""The consumers' updates and the metric of rows, against least squares and second moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import Tie
from evolvenet.growth.expanded_model import Growth, expanded
from evolvenet.growth.tiny import RIDGE, Scale, measure_bottleneck, subtract_updates
from evolvenet.surgery.resize_model import compile_surgery
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import images, mlp


def growth_of(model: nn.Module, x: Tensor, y: Tensor, sizes: dict[str, int], batches: int = 1) -> Growth:
    graph = trace(model, x[:2])
    maps = {name: IndexMap.grow(graph.widths[name].size, count) for name, count in sizes.items()}
    pairs = tuple(zip(x.chunk(batches), y.chunk(batches), strict=True))
    return Growth(model, graph, compile_surgery(model, graph, maps), None, pairs, functional.mse_loss)


@pytest.mark.parametrize("repeat", [1, 3])
def test_the_length_of_a_row_is_that_of_its_outputs(repeat: int) -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    scale = Scale.of(x.T @ x / 50)
    rows, gradients = torch.randn(2, 5, 4 * repeat, dtype=torch.float64)
    answers = (rows.reshape(5 * repeat, 4) @ x.T).square().mean(1).reshape(5, repeat).sum(1)
    torch.testing.assert_close(scale.energy(rows), answers, rtol=0.05, atol=0)
    torch.testing.assert_close(scale.rows(scale.coordinates(rows)), rows)
    # Both sides of a scalar product.
    torch.testing.assert_close((scale.gradients(gradients) * scale.coordinates(rows)).sum(1), (gradients * rows).sum(1))


def test_without_inputs_every_row_counts_by_its_norm() -> None:
    rows = torch.randn(3, 4, dtype=torch.float64)
    for scale in (Scale(), Scale.of(torch.zeros(4, 4, dtype=torch.float64))):
        torch.testing.assert_close(scale.energy(rows), rows.square().sum(1))
        assert torch.equal(scale.gradients(rows), rows)
        assert torch.equal(scale.rows(rows), rows)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_an_update_is_the_best_linear_fit_of_the_gradient(
    batches: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolvenet.linalg.ridge.RIDGES", (1e-12,))
    model, x = mlp(6, 4, 3), torch.randn(300, 6).double()
    if not bias:
        model[2].bias = None
    y = 3 * model(x).detach() + x[:, :3].tanh()
    growth = growth_of(model, x, y, {"0": 2}, batches)
    bottleneck = measure_bottleneck(growth, "tiny")
    inside = model[1](model[0](x)).detach()
    outputs = model[2](inside).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.mse_loss(outputs, y) * batches, outputs)
    columns = torch.cat([inside, torch.ones(300, 1).double()], dim=1) if bias else inside
    best = torch.linalg.lstsq(columns, gradient).solution
    update = bottleneck.updates["2.weight"]
    torch.testing.assert_close(update.weight, best[:4].T, rtol=1e-6, atol=1e-9)
    assert (update.bias is not None) == bias
    if update.bias is not None:
        torch.testing.assert_close(update.bias, best[4], rtol=1e-6, atol=1e-9)
    (scale,) = bottleneck.scales.values()
    assert scale.factor is not None
    second = x.T @ x / 300
    torch.testing.assert_close(
        scale.factor @ scale.factor.T, second + RIDGE * second.diagonal().mean() * torch.eye(6).double()
    )


def test_noise_that_no_update_explains_gives_none() -> None:
    torch.manual_seed(0)
    model, x = mlp(6, 4, 3), torch.randn(12, 6).double()
    assert measure_bottleneck(growth_of(model, x, 9 * torch.randn(12, 3).double(), {"0": 2}), "tiny").updates == {}


def test_an_activation_in_place_does_not_hide_the_gradient() -> None:
    def made(inplace: bool) -> Any:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 4), nn.ReLU(inplace), nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 3)
        ).double()

    x = torch.randn(200, 6).double()
    y = 3 * made(False)(x).detach()
    one, two = (
        measure_bottleneck(growth_of(made(inplace), x, y, {"0": 2}), "tiny").updates["2.weight"].weight
        for inplace in (True, False)
    )
    torch.testing.assert_close(one, two)


def test_measuring_leaves_the_model_alone() -> None:
    model, x = mlp(6, 4, 3).train(), torch.randn(30, 6).double()
    parameters = [parameter.requires_grad_(False) for parameter in model.parameters()]
    growth = growth_of(model, x, 3 * model(x), {"0": 2})
    measure_bottleneck(growth, "tiny")
    assert model.training
    assert all(a is b and not a.requires_grad for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


class TwoReaders(nn.Module):
    """A width read by a dense layer on the flattened map and by a convolution, both of which also grow."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2)
        self.dense, self.last = nn.Linear(4 * 36, 3), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        units = self.make(x).relu()
        return self.dense(units.flatten(1)) + self.last(self.read(units).relu().flatten(1))


def test_a_correction_changes_the_gradients_of_new_units_alone() -> None:
    """By the gradients that the update's output, as a gradient of the consumer's outputs, gives them."""
    model, x = TwoReaders().double(), images(200)
    y = 3 * model(x).detach()
    growth = growth_of(model, x, y, {"make": 2, "read": 3})
    bottleneck = measure_bottleneck(growth, "tiny")
    assert set(bottleneck.updates) == {"dense.weight", "read.weight", "last.weight"}
    start: dict[Tie, Tensor] = {
        tie: torch.randn(growth.count(width), growth.unit_entries(tie, width).shape[1]).double()
        for width in growth.widths
        for tie in (*growth.matrices(width, "produces"), *growth.matrices(width, "consumes"))
    }
    with expanded(growth, start), subtract_updates(growth, bottleneck.updates) as corrections:
        inputs: dict[str, Tensor] = {}
        hook: Callable[[str], Any] = lambda name: lambda m, args: inputs.setdefault(name, args[0])  # noqa: E731
        hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in ("dense", "read", "last")]
        model(x)
        extra = corrections.total()
        assert isinstance(extra, Tensor)
        assert corrections.total() == 0
        weights = [model.make.weight, model.read.weight, model.dense.weight, model.last.weight]
        grads = torch.autograd.grad(extra, weights, retain_graph=True)
        assert not grads[1][:5, :4].any()
        assert not grads[2][:, : 4 * 36].any()
        assert not grads[3][:, :20].any()
        update = bottleneck.updates["dense.weight"]
        assert update.bias is not None
        known = functional.linear(inputs["dense"][:, : 4 * 36], update.weight, update.bias)
        torch.testing.assert_close(grads[2][:, 4 * 36 :], -known.T @ inputs["dense"][:, 4 * 36 :].detach())
        for each in hooks:
            each.remove()


@pytest.mark.parametrize(
    ("layer", "used"),
    [
        (nn.Conv1d(4, 5, 3, stride=2, padding=1), True),
        (nn.Conv1d(4, 5, 3, padding="same", dilation=2), True),
        (nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular"), True),
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), False),
        (nn.ConvTranspose1d(4, 5, 3), False),
    ],
)
def test_updates_are_those_of_whole_ungrouped_plain_products(layer: nn.Conv1d, used: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), layer, nn.ReLU(), nn.Conv1d(layer.out_channels, 2, 1)).double()
    x = torch.randn(400, 3, 8).double()
    growth = growth_of(model, x, 3 * model(x).detach(), {"0": 4})
    assert ("2.weight" in measure_bottleneck(growth, "tiny").updates) == used
