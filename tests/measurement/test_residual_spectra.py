"""Residual blocks: their operator against the Jacobian of the block as it runs, and what only looks like one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.errors import SpectrumError
from evolvenet.measurement.residual_spectra import block_spectra, residual_blocks
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, FLOAT, Case, graph_of
from tests.helpers.small_models import used
from tests.helpers.states import State

LAYERS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    0: (nn.Linear, nn.BatchNorm1d),
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}
BLOCKS = {
    "resnet": {"blocks.0.conv1": "stem", "blocks.2.conv1": "blocks.1.conv2"},
    "channels_last": {"blocks.0.conv1": "stem", "blocks.2.conv1": "blocks.1.conv2"},
    "tied_weights": {"up": "down"},
    "transformer": {"1.linear1": "0"},
}
Code = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Layers `enter`, `leave`, and `one`, `two` inside, of `space` dimensions; the code of the block is given."""

    def __init__(self, code: Code, space: int = 2, **modules: nn.Module) -> None:
        super().__init__()
        layer: Any
        layer, norm = LAYERS[space]
        kernel: Any = {"kernel_size": 3, "padding": 1} if space else {}
        point: Any = {"kernel_size": 1} if space else {}
        self.code = code
        self.enter, self.leave = layer(3, 6, **point), layer(6, 2, **point)
        self.one, self.two = layer(6, 4, **kernel), layer(4, 6, **kernel)
        self.norms = nn.ModuleList(norm(size) for size in (6, 4, 6))
        self.gone = nn.Identity()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.code(self, self.enter(x)))


def made(code: Code, space: int = 2, **modules: nn.Module) -> tuple[Any, Tensor]:
    """A network with norms as after some training, and inputs for it."""
    torch.manual_seed(0)
    model = Net(code, space, **modules).double()
    for name, tensor in model.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return used(model), torch.randn(2, 3, *[5] * space, dtype=FLOAT)


SHAPES: dict[str, tuple[Code, Code]] = {
    # with activations, and the same without them
    "plain": (lambda m, x: x + m.two(m.one(x).relu()), lambda m, x: x + m.two(m.one(x))),
    "post-activation": (
        lambda m, x: functional.relu(m.norms[2](m.two(functional.silu(m.norms[1](m.one(x))))) + x),
        lambda m, x: m.norms[2](m.two(m.norms[1](m.one(x)))) + x,
    ),
    "pre-activation": (
        lambda m, x: x + m.two(functional.relu(m.norms[1](m.one(functional.gelu(m.norms[0](x)))))),
        lambda m, x: x + m.two(m.norms[1](m.one(m.norms[0](x)))),
    ),
    "in place": (
        lambda m, x: m.norms[2](m.two(m.norms[1](m.one(x)).relu_())).add_(x).relu_(),
        lambda m, x: m.norms[2](m.two(m.norms[1](m.one(x)))) + x,
    ),
}


@pytest.mark.parametrize("space", LAYERS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_spectra_are_those_of_what_the_block_does(name: str, space: int) -> None:
    """The Jacobian of one place of the block's output, without activations, is the whole operator's matrix."""
    code, linear = SHAPES[name]
    model, x = made(code, space)
    graph = trace(model, x)
    with torch.no_grad():
        inside = model.enter(x)[:1]
    where = (0, slice(None), *[2] * space)

    def matrix(function: Code) -> Tensor:
        jacobian: Any = torch.autograd.functional.jacobian(lambda t: function(model, t)[where], inside)
        return jacobian.flatten(1)

    spectra = block_spectra(model, graph, x)
    assert set(spectra) == {"one"}
    found = spectra["one"]
    torch.testing.assert_close(found.operator, torch.linalg.svdvals(matrix(linear)))
    assert (len(found.first), len(found.second)) == (4, min(6, model.two.weight[0].numel()))
    assert found.operator.dtype == found.first.dtype == torch.float64


@pytest.mark.parametrize("name", ["plain", "pre-activation"])
def test_both_weights_are_seen_with_the_norms_around_them(name: str) -> None:
    model, x = made(SHAPES[name][0])
    found = block_spectra(model, trace(model, x), x)["one"]
    one, two = model.one.weight.detach(), model.two.weight.detach()
    if name == "pre-activation":
        front, middle = (
            norm.weight.detach() / (norm.running_var + norm.eps).sqrt() for norm in (model.norms[0], model.norms[1])
        )
        one = middle.view(-1, 1, 1, 1) * one * front.view(-1, 1, 1)
    torch.testing.assert_close(found.first, torch.linalg.svdvals(one.flatten(1)))
    torch.testing.assert_close(found.second, torch.linalg.svdvals(two.flatten(1)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_blocks_of_each_model_are_found(case: Case) -> None:
    model, graph = case.model(), graph_of(case)
    before = State.of(model.train(), [])
    found, refused = residual_blocks(model, graph, case.inputs())
    assert {name: block.outer for name, block in found.items()} == BLOCKS.get(case.name, {})
    assert list(refused) == [name for name in graph.sizes if name not in found]
    assert all(refused.values())
    if case.name != "locked":  # it counts its calls
        assert before.differences(model, []) == []


def test_a_block_that_does_nothing_is_the_identity() -> None:
    model, x = made(SHAPES["post-activation"][0])
    nn.init.zeros_(model.norms[2].weight)
    found = block_spectra(model, trace(model, x), x)["one"]
    torch.testing.assert_close(found.operator, torch.ones(6, dtype=FLOAT))
    assert not found.second.any()
    assert found.first.all()


def test_two_layers_over_steps_are_a_block() -> None:
    model, _ = made(lambda m, x: x + m.two(m.one(x).relu()), 0)
    x = torch.randn(2, 7, 3, dtype=FLOAT)
    whole = torch.eye(6, dtype=FLOAT) + model.two.weight.detach() @ model.one.weight.detach()
    torch.testing.assert_close(block_spectra(model, trace(model, x), x)["one"].operator, torch.linalg.svdvals(whole))


def _doubled(x: Tensor) -> Tensor:
    x.view(-1).mul_(2.0)
    return x


def _norm(x: Tensor, weight: Tensor, norm: Any) -> Tensor:
    return functional.batch_norm(x, norm.running_mean, norm.running_var, weight, norm.bias)


def _plain(model: Any, x: Tensor) -> Tensor:
    return x + model.two(model.one(x))


LOOK_ALIKE: dict[str, tuple[Code, int, str]] = {
    "gate": (lambda m, x: x * m.two(m.one(x).relu()).sigmoid(), 2, "mul lies between"),
    "difference": (lambda m, x: x - m.two(m.one(x)), 2, "sub lies between"),
    "twice the branch": (lambda m, x: torch.add(x, m.two(m.one(x)), alpha=2), 2, "add lies between"),
    "scaled branch": (lambda m, x: x + 0.1 * m.two(m.one(x)), 2, "mul lies between"),
    "no identity": (lambda m, x: x.relu() + m.two(m.one(x.sigmoid())), 2, "not computed from"),
    "written since": (lambda m, x: (lambda made: _doubled(x) + made)(m.two(m.one(x))), 2, "not computed from"),
    "from further up": (lambda m, x: x + m.two(m.one(x + m.other(x))), 2, "add lies between"),
    "used twice": (lambda m, x: m.two(m.one(x)) + m.two(m.one(x.relu())) + x, 2, "one.weight is used 2 times"),
    "read twice": (lambda m, x: (lambda made: x + made + made.relu())(m.two(m.one(x))), 2, "is used 2 times"),
    "squared inside": (lambda m, x: x + m.two((lambda made: made * made)(m.one(x))), 2, "mul lies between"),
    "pooled inside": (lambda m, x: x + m.two(functional.avg_pool2d(m.one(x), 3, 1, 1)), 2, "avg_pool2d lies between"),
    "layer norm": (lambda m, x: x + m.two(m.other(m.one(x))), 0, "native_layer_norm lies between"),
    "the batch's own norm": (lambda m, x: x + m.two(m.other(m.one(x))), 2, "without running statistics"),
    "norm of made scales": (lambda m, x: x + m.two(_norm(m.one(x), m.norms[1].weight * 2, m.norms[1])), 2, "as it is"),
    "norm over steps": (lambda m, x: x + m.two(m.other(m.one(x))), 0, "another axis than the units"),
    "weight made of weights": (
        lambda m, x: x + m.two(functional.conv2d(x, m.one.weight * 2, m.one.bias, padding=1)),
        2,
        "one.weight goes into convolution and not as it is",
    ),
    "scaled product": (
        lambda m, x: x + torch.addmm(m.two.bias, m.one(x), m.two.weight.t(), alpha=2),
        0,
        "two.weight goes into addmm and not as it is",
    ),
    "even kernels": (_plain, 2, r"one.weight is a convolution of kernel \(2, 2\)"),
    "dilated": (_plain, 2, r"dilation \[2, 2\]"),
    "padded later": (_plain, 2, r"padding \[0, 0\]"),
    "strided": (_plain, 2, "two.weight"),
    "places of a unit": (lambda m, x: x + m.two(m.one(x).repeat(1, 2, 1, 1)), 2, "axis 1 of two.weight holds more"),
}
WITH: dict[str, dict[str, nn.Module]] = {
    "from further up": {"other": nn.Conv2d(6, 6, 1)},
    "layer norm": {"other": nn.LayerNorm(4)},
    "the batch's own norm": {"other": nn.BatchNorm2d(4, track_running_stats=False)},
    "norm over steps": {"other": nn.BatchNorm1d(5)},
    "even kernels": {"one": nn.Conv2d(6, 4, 2, padding=1), "two": nn.Conv2d(4, 6, 2)},
    "dilated": {"one": nn.Conv2d(6, 4, 3, padding=2, dilation=2)},
    "padded later": {"one": nn.Conv2d(6, 4, 3), "two": nn.Conv2d(4, 6, 3, padding=2)},
    "strided": {"one": nn.Conv2d(6, 4, 3, 2, 1), "two": nn.ConvTranspose2d(4, 6, 3, 2, 1)},
    "places of a unit": {"two": nn.Conv2d(8, 6, 1)},
}


@pytest.mark.parametrize("name", LOOK_ALIKE)
def test_what_only_looks_like_a_block_is_refused(name: str) -> None:
    code, space, reason = LOOK_ALIKE[name]
    model, x = made(code, space, **WITH.get(name, {}))
    if name == "norm over steps":
        x = torch.randn(2, 5, 3, dtype=FLOAT)
    found, refused = residual_blocks(model, trace(model, x), x)
    assert not found
    assert re.search(reason, refused["one"]), refused["one"]
    assert block_spectra(model, trace(model, x), x) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    model, x = made(SHAPES["post-activation"][0])
    model, x = model.to(dtype), x.to(dtype)
    graph = trace(model, x)
    half = block_spectra(model, graph, x)["one"]
    exact = block_spectra(model.double(), graph, x.double())["one"]
    for one, two in ((half.operator, exact.operator), (half.first, exact.first), (half.second, exact.second)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_broken_weights_are_refused_by_name() -> None:
    model, x = made(SHAPES["plain"][0])
    graph = trace(model, x)
    with torch.no_grad():
        model.two.weight[0, 0] = float("nan")
    with pytest.raises(SpectrumError, match="finite"):
        block_spectra(model, graph, x)
