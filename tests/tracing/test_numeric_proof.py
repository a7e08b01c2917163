"""The proof compares numbers: what the ties and the shapes of a network do not show freezes a width, with op and line."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from evolvenet._compat.torch import TorchDispatchMode
from evolvenet.engine.functional import resize
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.numbers_mode import NumbersMode
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, FLOAT, Case, distance, graph_of, outputs, shuffled
from tests.helpers.states import State


class FromShape(nn.Module):
    """Dense layers whose code computes a factor from a number of units."""

    def __init__(self, factor: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(4, 16), nn.Linear(16, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return nn.functional.linear(h, self.b.weight * self.factor(self.b.weight), self.b.bias)


FACTORS: dict[str, Callable[[Tensor], float]] = {
    "equalised learning rate": lambda weight: math.sqrt(2 / weight.shape[1]),
    "one over the units": lambda weight: 1 / weight.shape[1],
    "even or odd": lambda weight: 1.0 + weight.shape[1] % 2,
    "one more beyond sixteen": lambda weight: 2.0 if weight.shape[1] > 16 else 1.0,
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_factor_computed_from_a_number_of_units_keeps_that_number(name: str, dtype: torch.dtype) -> None:
    model = FromShape(FACTORS[name]).to(dtype)
    graph = trace(model, torch.randn(2, 4, dtype=dtype))
    reason = graph.widths["a"].frozen or ""
    assert reason.startswith("aten::mul in FromShape computes other values once units of zeros are added")
    assert f"{Path(__file__).name}:" in reason
    assert "self.factor(self.b.weight)" in reason


def test_other_widths_stay_resizable_beside_one_that_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), FromShape(FACTORS["one over the units"]))
    graph = trace(model, torch.randn(2, 5))
    assert graph.sizes == {"0": 7, "2": 4}


class Mean(nn.Module):
    """Divides by a number of units where the op itself mixes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[1]


def test_a_dead_branch_does_not_hide_a_difference() -> None:
    """Residual branches begin at zero: what they compute shows in the outputs only because the copy's weights vary."""
    net = nn.Sequential(nn.Linear(4, 16), Mean(), nn.Linear(16, 3))
    nn.init.zeros_(net[2].weight)  # type: ignore[arg-type]
    assert "aten::div in 1 (Mean)" in (trace(net, torch.randn(2, 4)).widths["0"].frozen or "")


def test_inputs_of_zeros_do_not_hide_a_difference() -> None:
    net = nn.Sequential(nn.Linear(4, 16, bias=False), Mean(), nn.Linear(16, 3))
    assert "aten::div in 1 (Mean)" in (trace(net, torch.zeros(2, 4)).widths["0"].frozen or "")


class InHalf(nn.Module):
    """A factor so close to 1 that the bfloat16 to which the code casts its product does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        half = (h * (1 + 1e-6 * h.shape[1])).to(torch.bfloat16)
        return self.b(half.to(self.b.weight.dtype))


def test_code_that_casts_to_bfloat16_is_compared_in_float64() -> None:
    assert "aten::mul in InHalf" in (trace(InHalf(), torch.randn(2, 4)).widths["a"].frozen or "")


class Fusion(nn.Module):
    """Two widths of which the code holds the sum: one more of the one and one less of the other would pass."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.head = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(16, 2)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.text(text)], -1).relu().view(-1, 16))


def test_two_widths_of_a_fixed_sum_fail_their_trials() -> None:
    graph = trace(Fusion(), (torch.randn(2, 5), torch.randn(2, 3)))
    assert graph.sizes == {}
    assert all((graph.widths[name].frozen or "").startswith("a trial raised") for name in ("image", "text"))


class Noisy(nn.Module):
    """An autoencoder that draws its latent numbers, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), self.mean.out_features) + torch.rand_like(self.mean(x))
        return self.out(nn.functional.dropout(self.mean(x) + self.spread(x).exp() * noise, 0.5))


def test_random_numbers_do_not_freeze_what_they_are_added_to() -> None:
    assert trace(Noisy(), torch.randn(2, 4)).sizes == {"mean": 6}


class Counting(nn.Module):
    """Computes something else each time."""

    def __init__(self, count: Iterator[int]) -> None:
        super().__init__()
        self.count = [count]

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.count[0])


def test_a_model_without_reproducible_outputs_is_traced_by_shapes_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        model = nn.Sequential(nn.Linear(4, 6), Counting(iter(range(1, 99))), nn.Linear(6, 2))
        assert trace(model, torch.randn(2, 4)).sizes == {"0": 6}
    assert "computes other outputs each time it is run" in caplog.text


def test_inputs_that_cannot_be_run_with_data_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Indices beyond the vocabulary pass on shadows without data."""
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        trace(nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2)), torch.tensor([[7]]))
    assert "gives no finite outputs on the example inputs" in caplog.text


class Single(nn.Module):
    """A float32 tensor of the code's own, and halves: what the model computes in double precision stays comparable."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.table = torch.randn(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).float().softmax(0, dtype=torch.float32)
        return self.b(h.to(self.b.weight.dtype)) @ self.table.to(self.b.weight.dtype)


def test_code_that_asks_for_less_precision_is_compared_in_double_precision() -> None:
    assert trace(Single(), torch.randn(4, 4)).sizes == {"a": 8}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_proved_widths_take_zeros_in_any_order_by_unequal_amounts(case: Case) -> None:
    """What the proof promises, by the slow way: one resize after the other on the model itself."""
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    expected = outputs(model, inputs)
    graph = resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    for number, width in enumerate(graph.resizable):
        if width.mixed is None:
            graph = resize(model, graph, {width.name: IndexMap.grow(width.size, 1 + number % 4)})
    assert distance(outputs(model, inputs), expected) < 1e-9


def test_the_model_and_the_random_numbers_stay_as_they_are() -> None:
    model = Noisy()
    optimizer = torch.optim.Adam(model.parameters())
    before, drawn = State.of(model, [optimizer]), torch.random.get_rng_state()
    trace(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert before.differences(model, [optimizer]) == []
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.get_default_dtype() == torch.float32
    assert torch.float64 == FLOAT


class Momentum(nn.Module):
    """A copy of a layer that follows it, as in MoCo: the forward pass writes to parameters of another module."""

    def __init__(self, write: Callable[[nn.Parameter, Tensor], object]) -> None:
        super().__init__()
        # More entries than those of tensors that the comparison copies anyway.
        self.a, self.b, self.write = nn.Linear(900, 8), nn.Linear(900, 8), write
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, other in zip(self.b.parameters(), self.a.parameters(), strict=True):
                self.write(mine, other)
        return self.head(self.a(x) + self.b(x))


WRITES: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "lerp_": lambda mine, other: mine.lerp_(other, 0.5),
    "data.mul_": lambda mine, other: mine.data.mul_(0.5).add_(other.data, alpha=0.5),
    "view": lambda mine, other: mine.view(-1)[:2].copy_(other.view(-1)[:2]),
    "out=": lambda mine, other: torch.add(mine, other, out=mine.data),
    "foreach": lambda mine, other: torch._foreach_add_([mine], [other]),  # pyright: ignore[reportPrivateImportUsage]
}


@pytest.mark.parametrize("name", WRITES)
def test_parameters_that_the_forward_pass_writes_to_are_as_before(name: str) -> None:
    model = Momentum(WRITES[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, torch.randn(2, 900))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


class SeesStrides(TorchDispatchMode):
    """Keeps whether the inputs of convolutions are contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.contiguous: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.contiguous.append(args[0].is_contiguous())
        return func(*args, **(kwargs or {}))


def test_a_channels_last_convolution_in_double_precision_runs_on_a_contiguous_copy() -> None:
    """The kernel takes ten times as long otherwise; values and strides are those of the op."""
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4).double()
    x = torch.randn(2, 4, 6, 6, dtype=FLOAT).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = conv(x)
        with SeesStrides() as seen, NumbersMode(torch.float64):
            found = conv(x)
    assert seen.contiguous == [True]
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


class SeesDtypes(nn.Linear):
    """Keeps the dtype of its weight, forward pass by forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = self.weight.dtype
        return super().forward(input)


def test_parameters_are_in_double_precision_while_their_module_runs_alone() -> None:
    layer = SeesDtypes(2, 3)
    net = nn.Sequential(layer, nn.LSTM(3, 2, batch_first=True))
    with torch.no_grad(), NumbersMode(torch.float64):
        out, _ = net(torch.randn(1, 4, 2, dtype=FLOAT))
    assert out.dtype == FLOAT
    assert layer.seen == FLOAT
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


class Neighbours(nn.Module):
    """Reads the weight of a layer that it does not call; a factor so close to 1 that single precision would pass it."""

    seen: ClassVar[set[torch.dtype]] = set()
    """The dtypes of that weight beside data in double precision; a trace restores what an instance holds."""

    def __init__(self, convolves: bool) -> None:
        super().__init__()
        self.a, self.b, self.convolves = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 3, 1), convolves

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == FLOAT:
            self.seen.add(self.b.weight.dtype)
        h = self.a(x)
        h = h * (1 + 1e-6 * h.shape[1])
        # Only the functional call compares the dtypes of data and weight while the layer does not run.
        return nn.functional.conv1d(h, self.b.weight, self.b.bias) if self.convolves else self.b(h)


@pytest.mark.parametrize("convolves", [False, True])
def test_the_comparison_is_in_double_precision_whether_or_not_all_parameters_have_to_be(convolves: bool) -> None:
    Neighbours.seen.clear()
    graph = trace(Neighbours(convolves), torch.randn(2, 4, 5))
    assert "aten::mul in Neighbours" in (graph.widths["a"].frozen or "")
    assert Neighbours.seen == ({torch.float32, FLOAT} if convolves else {torch.float32})
