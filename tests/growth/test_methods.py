"""Every method that starts new units: what it keeps, what it needs, and what degenerate input does to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import evolvenet
from evolvenet.errors import ResizeError, SpectrumError, TraceError
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import Tie
from evolvenet.growth.expanded_model import Growth
from evolvenet.growth.initializers import METHODS
from evolvenet.growth.plan import plan_growth
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, distance, graph_of, outputs
from tests.helpers.small_models import convnet, images, mlp


@pytest.mark.parametrize("method", METHODS)
def test_the_public_grow_takes_every_method_with_what_it_needs(method: str) -> None:
    model, x = mlp(6, 4, 3), torch.randn(20, 6, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    graph = evolvenet.grow(
        model,
        evolvenet.trace(model, x[:1]),
        {"0": 7},
        method=method,
        optimizers=optimizer,
        batches=[(x, torch.zeros(20, 3).double())],
        loss=nn.functional.mse_loss,
    )
    assert graph.sizes == {"0": 7}
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (7, 6)


def test_the_table_of_methods_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(growth: Growth) -> dict[Tie, Tensor]:
        (width,) = growth.widths
        return {tie: torch.ones(growth.count(width), 6).double() for tie in width.producers}

    monkeypatch.setitem(METHODS, "ones", ones)
    model = mlp(6, 4, 3)
    evolvenet.grow(model, evolvenet.trace(model, torch.zeros(1, 6).double()), {"0": 5}, method="ones")
    assert model[0].weight[4].detach().unique().numel() == 1


def squares(answer: Any, targets: None) -> Tensor:
    return torch.stack([leaf.square().mean() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]).sum()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_but_random_keeps_the_function(case: Case, method: str) -> None:
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    sizes = {width.name: width.size + 3 for width in graph.resizable if width.mixed is None}
    before, state = outputs(model, inputs), {name: t.clone() for name, t in model.state_dict().items()}
    surgery = plan_growth(model, graph, sizes, method, batches=[(inputs, None)] * 2, loss=squares)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert distance(outputs(model, inputs), before) == 0
    install(model, surgery)
    apart = distance(outputs(model, inputs), before)
    assert apart > 1e-3 if method == "random" else apart < 1e-12


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"random"}))
def test_the_function_is_kept_in_training_too(method: str) -> None:
    model, x = convnet().train(), images()
    graph = trace(model, x[:2])
    before = model(x).detach()
    install(model, plan_growth(model, graph, {"0": 13, "3": 11}, method, batches=[(x, None)], loss=squares))
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["gradmax", "tiny"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got no batches and no loss. Pass both, or take 'orthogonal'"),
        ({"loss": squares}, "got no batches"),
        ({"batches": [torch.zeros(2, 6).double()]}, "got no loss"),
        ({"batches": [torch.zeros(2, 6).double()], "loss": squares}, "a pair of (inputs, targets), got a Tensor"),
        ({"batches": [(1, 2, 3)], "loss": squares}, "a pair of (inputs, targets), got 3 entries"),
        ({"batches": [(torch.zeros(2, 6).double(), None)], "loss": lambda y, t: y}, "one number, got (2, 3)"),
        ({"batches": [(torch.zeros(2, 6).double(), None)], "loss": lambda y, t: 0.5}, "one number, got float"),
        ({"batches": [(torch.zeros(2, 6).double(), None)], "loss": lambda y, t: y.detach().sum()}, "has no gradient"),
    ],
)
def test_an_error_names_what_a_gradient_method_lacks(method: str, given: dict[str, Any], message: str) -> None:
    model = mlp(6, 4, 3)
    with pytest.raises(ResizeError, match=re.escape(message)):
        plan_growth(model, trace(model, torch.zeros(1, 6).double()), {"0": 6}, method, **given)


def test_batches_that_are_none_are_refused() -> None:
    model = mlp(6, 4, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    with pytest.raises(TraceError, match="at least one batch, got none"):
        plan_growth(model, graph, {"0": 6}, batches=[])
    with pytest.raises(TraceError, match="Wrap it in a list"):
        plan_growth(model, graph, {"0": 6}, batches=torch.zeros(2, 6).double())


@pytest.mark.parametrize("method", ["orthogonal", "gradmax", "tiny"])
def test_nan_in_the_batches_is_refused_and_changes_nothing(method: str) -> None:
    model, x = mlp(6, 7, 3), torch.randn(8, 6).double()
    graph, state = trace(model, x), {name: t.clone() for name, t in model.state_dict().items()}
    x[3, 2] = float("nan")
    with pytest.raises(SpectrumError, match="NaN or infinite"):
        plan_growth(model, graph, {"0": 9}, method, batches=[(x, None)], loss=squares)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


DEGENERATE: dict[str, Callable[[Any], object]] = {
    "zero producer": lambda model: model[0].weight.data.zero_(),
    "zero reader": lambda model: model[2].weight.data.zero_(),
    "all zero": lambda model: [parameter.data.zero_() for parameter in model.parameters()],
    "rank one": lambda model: model[0].weight.data.copy_(model[0].weight.data[:1].expand(4, -1)),
    "dead units": lambda model: model[0].bias.data.fill_(-100.0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("state", DEGENERATE)
@pytest.mark.parametrize("count", [1, 9])
def test_degenerate_weights_grow_all_the_same(method: str, state: str, count: int) -> None:
    """More new units than there are directions (9 of 3), fewer samples than either."""
    model, x = mlp(3, 4, 2), torch.randn(2, 3, dtype=torch.float64)
    graph = trace(model, x)
    DEGENERATE[state](model)
    before, norm = model(x).detach(), model[0].weight.detach().norm(dim=1).mean()
    surgery = plan_growth(model, graph, {"0": 4 + count}, method, batches=[(x, None)], loss=squares)
    install(model, surgery)
    new_unit = model[0].weight.detach()[4:]
    torch.testing.assert_close(
        new_unit.norm(dim=1), (norm if norm > 0 else torch.tensor(3**-0.5)).expand(count).double()
    )
    if method != "random":
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)
    if method != "paired" or state in ("zero reader", "all zero"):
        # Replicas with a fan-out of 0 would stay replicas.
        cosines = new_unit @ new_unit.T / new_unit.norm(dim=1).square()
        assert (cosines - torch.eye(count)).max() < 1 - 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "x", [torch.ones(20, 3), torch.zeros(5, 3), torch.randn(1, 3)], ids=["constant", "zero", "one"]
)
@pytest.mark.parametrize("width", [1, 7])
def test_data_that_says_little_is_enough(method: str, x: Tensor, width: int) -> None:
    """Activations that never vary, inputs of 0, one sample; a width of 1, and one whose rows span everything."""
    model, x = mlp(3, width + 1, 2), x.double()
    # By a cut: a trace does not take a single unit for a width.
    graph = evolvenet.resize(model, trace(model, x), {"0": IndexMap.keep(range(width), width + 1)})
    before = model(x).detach()
    surgery = plan_growth(model, graph, {"0": width + 4}, method, batches=[(x, None)], loss=squares)
    assert all(change.value.isfinite().all() for change in surgery.changes)
    install(model, surgery)
    if method != "random":
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)


def test_a_norm_with_scales_of_zero_gets_new_units_that_can_learn() -> None:
    model, x = convnet(), images()
    graph = trace(model, x[:2])
    nn.init.zeros_(model[1].weight)
    values = {change.name: change.value for change in plan_growth(model, graph, {"0": 10}).changes}
    assert torch.equal(values["1.weight"][8:], torch.ones(2).double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_method_takes_narrow_types(method: str, dtype: torch.dtype) -> None:
    model, x = mlp(6, 4, 3).to(dtype), torch.randn(16, 6, dtype=dtype)
    before = model(x)
    install(model, plan_growth(model, trace(model, x), {"0": 7}, method, batches=[(x, None)], loss=squares))
    assert model[0].weight.dtype == dtype
    if method != "random":
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_and_inference_mode_are_no_obstacle(method: str) -> None:
    model, x = mlp(6, 4, 3), torch.randn(16, 6, dtype=torch.float64)
    graph = trace(model, x)
    model.requires_grad_(False)
    with torch.inference_mode():
        surgery = plan_growth(model, graph, {"0": 7}, method, batches=[(x, None)], loss=squares)
    install(model, surgery)
    assert not any(parameter.requires_grad for parameter in model.parameters())
