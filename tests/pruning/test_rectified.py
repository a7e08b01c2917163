"""Fits of outputs that a rectifier takes: nearer after it, and only where nothing else takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.execution.choices import Choices
from evolvenet.linalg.ridge import Fit, refit_or_keep
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.pruning.reconstruction_batch import ONE_SHOT_LIMITS
from evolvenet.pruning.recorded_outputs import OutputRecorder, recorded
from evolvenet.pruning.rectified import Kink, rectified_fit
from evolvenet.pruning.selection import plan_prune
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.small_models import used

FLOAT = torch.float64


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT, generator=torch.Generator().manual_seed(0))


class Returned(nn.Module):
    """The outputs of its second layer are returned, and rectified for a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(torch.tanh(self.first(x)))
        return y, self.third(y.relu())


def test_what_is_returned_is_needed_where_it_is_negative() -> None:
    model, x = used(Returned()), data(20, 6)
    recorder = OutputRecorder(frozenset({"second.weight"}), ONE_SHOT_LIMITS)
    (target,) = recorded(model, x, recorder, False, Choices())["second.weight"]
    assert target.rectified is False


@pytest.mark.parametrize("groups", [1, 2])
def test_rounds_lower_the_error_of_the_rectified_outputs(groups: int) -> None:
    x, whole = data(groups, 200, 9), data(groups, 5, 9)
    y, slope = x @ whole.mT + 0.3, torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0] * groups, dtype=FLOAT)
    kink = Kink(torch.full((1, 5 * groups), 0.1, dtype=FLOAT), slope)
    few, odd = x[..., :6], torch.arange(200) % 2 == 1
    zeros = torch.zeros(groups, 5, 6, dtype=FLOAT), torch.zeros(groups, 5, dtype=FLOAT)

    def solve(moved: Tensor) -> Fit | None:
        return refit_or_keep(few, moved, *zeros, odd)

    linear = solve(y)
    assert linear is not None

    def error(rounds: int) -> Tensor:
        found = rectified_fit(solve, linear, few, y, kink, rounds)
        made = few @ found.weight.mT + found.offset.reshape(groups, 1, 5)
        by = slope.reshape(groups, 1, 5)
        apart = [torch.where(by == 0, each - 0.1, ((each - 0.1) * by).relu() / by.abs()) for each in (made, y)]
        return (apart[0] - apart[1]).square().sum((0, 1))

    errors = torch.stack([error(rounds) for rounds in range(6)])
    rectified, linear_units = errors[:, slope[:5] != 0].sum(1), errors[:, slope[:5] == 0]
    # The ridge is selected anew in each round.
    assert (rectified[1:] <= rectified[:-1] * (1 + 5e-3)).all()
    assert rectified[-1] < 0.99 * rectified[0]
    assert torch.allclose(linear_units[0], linear_units[-1], rtol=1e-2)


class Uses(nn.Module):
    """A width between two layers, and some use of what the second one puts out; input `[b, 6]`."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=bias)
        self.norm, self.last, self.function = nn.BatchNorm1d(6), nn.Linear(6, 3), function
        nn.init.uniform_(self.norm.weight, -1.5, 1.5)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.second(torch.tanh(self.first(x)))
        return self.last(self.function(self.norm(inside) if self.second.bias is None else inside, x))


@pytest.mark.parametrize(
    ("function", "expected", "bias"),
    [
        (lambda y, x: y.relu(), True, True),
        (lambda y, x: y.relu(), True, False),
        (lambda y, x: functional.relu(y, inplace=True) * 2, True, True),
        (lambda y, x: (y + x).relu(), True, True),
        (lambda y, x: (y + x).relu(), True, False),
        (lambda y, x: (y + x).relu_(), True, False),
        (lambda y, x: functional.gelu(y), False, True),
        (lambda y, x: y.relu() + y, False, True),
        (lambda y, x: y * y.relu(), False, True),
        (lambda y, x: y, False, True),
        (lambda y, x: (s := y + x).relu() + s, False, False),
        (lambda y, x: (y + x) * 2, False, True),
        (lambda y, x: (y.relu() + x).relu(), True, True),
    ],
)
def test_what_goes_into_a_rectifier_and_nothing_else_is_found(
    function: Callable[[Tensor, Tensor], Tensor], expected: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    model, x = used(Uses(function, bias)), data(20, 6)
    recorder = OutputRecorder(frozenset({"second.weight"}), ONE_SHOT_LIMITS)
    (target,) = recorded(model, x, recorder, False, Choices())["second.weight"]
    assert bool(target.rectified) is expected
    if expected and not target.summed:
        # At the floor the rectifier's argument is 0.
        assert target.floor is not None
        assert target.slope is not None
        with torch.no_grad():
            y = model.second(torch.tanh(model.first(x)))
            y = y if bias else model.norm(y)
        raw = target.outputs - target.floor
        assert torch.allclose(raw * target.slope, y[: len(raw)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [lambda y, x: y.relu(), lambda y, x: (y + x).relu()], ids=["plain", "sum"])
def test_rounds_bring_the_outputs_of_a_cut_model_nearer(
    function: Callable[[Tensor, Tensor], Tensor], bias: bool
) -> None:
    torch.manual_seed(0)
    model, x = used(Uses(function, bias)), data(400, 6)
    model.last = nn.Identity()
    graph = trace(model, x[:2])
    before = outputs(model, x)
    surgery = plan_prune(model, graph, {"first": 4}, collect(model, graph, [x], ["first"]))
    errors = []
    for rounds in (0, 1, 3):
        undo = install(model, reconstruct(model, graph, surgery, [x], replace(ONE_SHOT_LIMITS, rounds=rounds)))
        errors.append(distance(outputs(model, x), before))
        undo()
    assert errors[1] < errors[0]
    # The ridge is selected anew in each round.
    assert errors[2] < errors[0] * 1.01
    assert distance(outputs(model, x), before) == 0
