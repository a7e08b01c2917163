"""Updates of weights after a growth: against least squares, never a higher loss, all or nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.errors import ResizeError
from evolvenet.growth.plan import plan_growth
from evolvenet.growth.weight_update import search_length
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import convnet, images, mlp

Pairs = list[tuple[Tensor, Tensor]]


def task(batches: int = 4, rows: int = 64) -> Pairs:
    x = torch.randn(batches, rows, 6, dtype=torch.float64)
    return [(part, part[:, :3].tanh() - part[:, 3:].square()) for part in x]


def mean_loss(model: nn.Module, pairs: Pairs) -> float:
    with torch.no_grad():
        return math.fsum(float(functional.mse_loss(model(x), y)) for x, y in pairs) / len(pairs)


def values_of(model: nn.Module, pairs: Pairs, update: bool, method: str = "orthogonal") -> dict[str, Tensor]:
    """{tensor: its value after a growth of the first layer, float64}."""
    surgery = plan_growth(
        model, trace(model, pairs[0][0][:2]), {"0": 7}, method, torch.Generator().manual_seed(0), pairs,
        functional.mse_loss, update,
    )  # fmt: skip
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return found | {change.name: change.value for change in surgery.changes}


@pytest.mark.parametrize("bias", [True, False])
def test_each_layer_moves_along_the_least_squares_fit_of_its_gradient(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolvenet.linalg.ridge.RIDGES", (1e-12,))
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), task(batches=1, rows=300)
    if not bias:
        model[2].bias = None
    plain, moved = (values_of(model, pairs, update) for update in (False, True))
    grown: Any = mlp(6, 7, 3)
    if not bias:
        grown[2].bias = None
    (x, y), ones = pairs[0], torch.ones(300, 1, dtype=torch.float64)
    # The second layer's gradient is that after the first one has moved.
    for layer, before in (("0", plain), ("2", plain | {name: moved[name] for name in ("0.weight", "0.bias")})):
        grown.load_state_dict(before)
        inside = x if layer == "0" else grown[1](grown[0](x)).detach()
        outputs = grown[int(layer)](inside).detach().requires_grad_()
        answer = grown[2](outputs.relu()) if layer == "0" else outputs
        (gradient,) = torch.autograd.grad(functional.mse_loss(answer, y), outputs)
        columns = torch.cat([inside, ones], dim=1) if bias or layer == "0" else inside
        best = -torch.linalg.lstsq(columns, gradient).solution.T
        parts = [moved[f"{layer}.weight"] - plain[f"{layer}.weight"]]
        parts += [(moved[f"{layer}.bias"] - plain[f"{layer}.bias"])[:, None]] if bias or layer == "0" else []
        step = torch.cat(parts, dim=1)
        length = step.norm() / best.norm()
        assert length > 0
        torch.testing.assert_close(step, length * best, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["orthogonal", "paired", "tiny"])
def test_the_loss_falls_and_never_rises(method: str) -> None:
    torch.manual_seed(1)
    model, pairs = mlp(6, 4, 3), task()
    before = mean_loss(model, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    functional.mse_loss(model(pairs[0][0]), pairs[0][1]).backward()
    for _ in range(30):
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"][2])
    arguments: dict[str, Any] = {"batches": pairs, "loss": functional.mse_loss, "update": True}
    evolvenet.grow(model, trace(model, pairs[0][0][:2]), {"0": 7}, method, optimizer, **arguments)
    assert mean_loss(model, pairs) < 0.9 * before
    now = optimizer.state[model[2].weight]
    # The estimates are carried, as after fewer steps, so that new gradients soon outweigh them.
    assert (int(state["step"]), int(now["step"])) == (30, 10)
    for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
        torch.testing.assert_close(now[key][:, :4] / (1 - beta**10), state[key] / (1 - beta**30))


def test_convolutions_with_norms_and_their_biases_move() -> None:
    torch.manual_seed(0)
    model, x = convnet(bias=True).eval(), images(32)
    pairs = [(part, part.mean((2, 3)).repeat(1, 2)[:, :5]) for part in x.chunk(4)]
    before = mean_loss(model, pairs)
    names = [name for name, width in trace(model, x[:2]).widths.items() if width.frozen is None]
    evolvenet.grow(
        model, trace(model, x[:2]), dict.fromkeys(names, 10), batches=pairs, loss=functional.mse_loss, update=True
    )
    assert mean_loss(model, pairs) < 0.9 * before


def test_a_step_that_raises_the_loss_of_all_batches_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), task()
    monkeypatch.setattr("evolvenet.growth.weight_update.search_length", lambda loss_at, first: 1e3 * first)
    plain, moved = (values_of(model, pairs, update) for update in (False, True))
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


def test_where_no_step_lowers_the_loss_nothing_moves() -> None:
    torch.manual_seed(0)
    model = mlp(6, 4, 3)
    pairs = [(x, model(x).detach()) for x, _ in task()]
    plain, moved = (values_of(model, pairs, update) for update in (False, True))
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


def test_weights_that_are_not_trained_stay() -> None:
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), task()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    plain, moved = (values_of(model, pairs, update) for update in (False, True))
    same = {name for name in plain if torch.equal(plain[name], moved[name])}
    assert same == {"0.weight", "0.bias", "2.bias"}


@pytest.mark.parametrize("held", [("0.weight", "0.bias"), ("2.weight",), ()])
def test_where_there_is_an_optimizer_what_it_does_not_hold_stays(held: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), task()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in held], lr=0.1) if held else ()
    evolvenet.grow(
        model, trace(model, pairs[0][0][:2]), {"0": 7}, optimizers=optimizer, batches=pairs, loss=functional.mse_loss,
        update=True,
    )  # fmt: skip
    old = {name: value[tuple(map(slice, before[name].shape))] for name, value in model.named_parameters()}
    moved = {name for name in before if not torch.equal(old[name], before[name])}
    assert moved == set(held or before)


def failing_at(call: int) -> Callable[[Any, Any], Tensor]:
    calls = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise ValueError("the loss is out of order")
        return functional.mse_loss(output, target)

    return loss


@pytest.mark.parametrize("call", [1, 6, 12, 30])
def test_a_failure_leaves_everything_as_it_was(call: int) -> None:
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), task()
    optimizer = torch.optim.AdamW(model.parameters())
    functional.mse_loss(model(pairs[0][0]), pairs[0][1]).backward()
    optimizer.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    graph = trace(model, pairs[0][0][:2])
    with pytest.raises(ValueError, match="out of order"):
        evolvenet.grow(model, graph, {"0": 7}, optimizers=optimizer, batches=pairs, loss=failing_at(call), update=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert str(state) == str(optimizer.state_dict())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batches_and_a_loss_are_needed() -> None:
    model = mlp(6, 4, 3)
    with pytest.raises(ResizeError, match="needs batches"):
        plan_growth(model, trace(model, torch.zeros(2, 6).double()), {"0": 7}, update=True)


def test_a_length_is_searched_without_a_rise() -> None:
    def valley(at: float) -> Callable[[float], float]:
        return lambda length: (length - at) ** 2 if length < 50 else math.nan

    for at in (0.05, 0.3, 1.0, 7.0, 49.0):
        loss_at = valley(at)
        best = search_length(loss_at, 1.0)
        assert loss_at(best) < 0.15 * loss_at(0.0)
    assert search_length(lambda length: length, 1.0) == 0.0
    assert search_length(lambda length: math.nan if length else 1.0, 1.0) == 0.0
    assert search_length(lambda length: -math.inf if length else 1.0, 1.0) == 0.0


def test_the_plan_changes_nothing_and_its_undo_restores_all() -> None:
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), task()
    before = copy.deepcopy(model.state_dict())
    surgery = plan_growth(
        model, trace(model, pairs[0][0][:2]), {"0": 7}, batches=pairs, loss=functional.mse_loss, update=True
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert surgery.updated
    assert {change.name for change in surgery.changes} == set(before)
    undo = install(model, surgery)
    assert mean_loss(model, pairs) < math.inf
    undo()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
