"""Optimizer state and gradients follow a change of the basis of a width's units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import evolvenet
from evolvenet.engine.functional import commit
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.basis_change import BasisChange, along
from evolvenet.surgery.resize_model import Surgery, compile_surgery, install
from evolvenet.tracing.trace import trace
from tests.helpers.factorized import seeded
from tests.helpers.optimizer_cases import ELEMENTWISE, OPTIMIZERS


def example() -> tuple[nn.Sequential, WidthGraph]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    evolvenet.factorize(model, {"0": 3})
    return model, trace(model, torch.zeros(1, 7).double())


def change_by(matrix: Tensor) -> BasisChange:
    return BasisChange(matrix, torch.linalg.inv(matrix).mT.contiguous())


def surgery_of(model: nn.Module, graph: WidthGraph, matrix: Tensor, size: int = 3) -> Surgery:
    return compile_surgery(model, graph, {"0.0": IndexMap.keep(range(size), 3)}, {"0.0": change_by(matrix)})


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> None:
    generator = seeded(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 7, generator=generator).double()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


MIX = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -3.0], [1.0, 0.0, 1.0]]).double()
TURN = torch.linalg.qr(MIX)[0]


def test_an_axis_is_multiplied_and_its_layout_stays() -> None:
    x = torch.randn(4, 3, 2, 2, generator=seeded()).to(memory_format=torch.channels_last)
    expected = torch.stack([sum(float(MIX[i, j]) * x[:, j] for j in range(3)) for i in range(3)], 1)  # pyright: ignore
    found = along(x, MIX, 1)
    torch.testing.assert_close(found, expected)
    assert found.stride() == x.stride()
    torch.testing.assert_close(along(torch.ones(3), MIX, 0), MIX.sum(1).float())


def test_function_and_gradients_are_those_of_the_new_basis() -> None:
    model, graph = example()
    x = torch.randn(9, 7, generator=seeded()).double()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    gradients()
    before = model(x).detach()
    undo = install(model, surgery_of(model, graph, MIX))
    carried = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    torch.testing.assert_close(model(x), before)
    for name, gradient in gradients().items():
        torch.testing.assert_close(carried[name], gradient)
    undo()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_rotation_does_not_change_the_course_of_sgd_with_momentum() -> None:
    runs = []
    for turned in (False, True):
        model, graph = example()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, optimizer, 5, 1)
        if turned:
            commit(model, surgery_of(model, graph, TURN), optimizer)
        train(model, optimizer, 5, 2)
        runs.append(model(torch.ones(1, 7).double()).detach())
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-12)


KEYS: dict[str, Callable[[BasisChange, Tensor, int], Tensor]] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "prev"), lambda c, e, d: along(e, c.gradients, d)),
    **dict.fromkeys(
        ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"), lambda c, e, d: along(e, c.gradients**2, d)
    ),
    "exp_inf": lambda c, e, d: along(e**2, c.gradients**2, d).sqrt(),
    "acc_delta": lambda c, e, d: along(e, c.values**2, d),
    "step_size": lambda c, e, d: along(e**2, c.values**2, d).sqrt(),
    "ax": lambda c, e, d: along(e, c.values, d),
}


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if "fused" not in name])
def test_state_is_mixed_as_what_it_is_an_average_of_and_training_goes_on(name: str) -> None:
    model, graph = example()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    train(model, optimizer, 5, 1)
    made, used = (model.get_parameter(f"0.{k}.weight") for k in (0, 1))
    before = {tensor: dict(optimizer.state[tensor]) for tensor in (made, used)}
    change = change_by(MIX)
    commit(model, surgery_of(model, graph, MIX, 2), optimizer)
    for tensor, dim, basis in ((made, 0, change), (used, 1, change.dual)):
        for key, entry in before[tensor].items():
            found = optimizer.state[tensor][key]
            if isinstance(entry, Tensor) and entry.dim() == 2:
                torch.testing.assert_close(found, KEYS[key](basis, entry, dim).narrow(dim, 0, 2))
            else:
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(entry))
    train(model, optimizer, 3, 2)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_state_without_a_rule_and_factored_state_are_mixed_too() -> None:
    model, graph = example()

    class Own(torch.optim.SGD):
        pass

    optimizer = Own(model.parameters(), lr=0.01)
    made = model.get_parameter("0.0.weight")
    signed, unsigned = torch.randn(3, 7, generator=seeded()).double(), torch.rand(3, 1, generator=seeded()).double()
    optimizer.state[made] = {"signed": signed, "unsigned": unsigned, "count": 3}
    commit(model, surgery_of(model, graph, MIX), optimizer)
    state: dict[str, Any] = optimizer.state[made]
    torch.testing.assert_close(state["signed"], along(signed, change_by(MIX).gradients, 0))
    torch.testing.assert_close(state["unsigned"], along(unsigned, change_by(MIX).gradients ** 2, 0))
    assert state["count"] == 3
    adafactor = torch.optim.Adafactor(model.parameters())
    train(model, adafactor, 3, 1)
    rows = adafactor.state[made]["row_var"].clone()
    commit(model, surgery_of(model, graph, MIX), adafactor)
    torch.testing.assert_close(adafactor.state[made]["row_var"], along(rows, change_by(MIX).gradients ** 2, 0))
    train(model, adafactor, 2, 2)


def test_adams_steps_stay_where_nothing_is_refitted() -> None:
    model, graph = example()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 30, 1)
    evolvenet.prune(model, graph, {"0.0": 2}, optimizers=optimizer)
    assert {float(optimizer.state[parameter]["step"]) for parameter in model.parameters()} == {30.0}
