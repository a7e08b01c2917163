"""New units: they keep the function, their rows are orthogonal to all others, and they get gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from evolvenet.errors import ResizeError, SpectrumError
from evolvenet.graph.width_graph import Tie
from evolvenet.growth.plan import plan_growth
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import Branches, Recurrent, Residual, convnet, images, mlp, mobile, used


class Transposed(nn.Module):
    """An embedding read by a transposed convolution's input axis, a residual dense layer; input `[b, 5]` of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.up = nn.ConvTranspose1d(6, 4, 2)
        self.last = nn.Conv1d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Look up, mix with a shortcut, widen, read."""
        x = self.table(x)
        x = x + self.mix(x).tanh()
        return self.last(self.up(x.mT).relu())


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(6, 5, 4, 3), lambda: torch.randn(20, 6, dtype=torch.float64)),
    "convnet": (convnet, images),
    "residual": (lambda: used(Residual()), images),
    "branches": (lambda: Branches().double(), lambda: torch.randn(20, 4, dtype=torch.float64)),
    "mobile": (mobile, images),
    "recurrent": (lambda: Recurrent().double(), lambda: torch.randn(9, 5, 4, dtype=torch.float64)),
    "transposed": (lambda: Transposed().double(), lambda: torch.randint(0, 11, (9, 5))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("together", [False, True])
def test_growing_keeps_the_output(case: str, together: bool) -> None:
    make, inputs = CASES[case]
    model, x = make().eval(), inputs()
    graph = trace(model, x)
    assert graph.resizable
    larger = {width.name: width.size + 3 for width in graph.resizable}
    for sizes in [larger] if together else [{name: size} for name, size in larger.items()]:
        with torch.no_grad():
            before = model(x)
            undo = install(model, plan_growth(model, graph, sizes))
            after = model(x)
            undo()
        assert (after - before).abs().max() <= 1e-9 * before.abs().max()


@pytest.mark.parametrize("case", ["mlp", "convnet", "residual"])
def test_new_unit_rows_are_orthogonal_to_all_others_and_of_their_norm(case: str) -> None:
    make, inputs = CASES[case]
    model, x = make(), inputs()
    graph = trace(model, x)
    for width in graph.resizable:
        for tie in width.producers:
            old = model.get_parameter(tie.tensor).detach().flatten(1)
            count = min(2, old.shape[1] - len(old))
            if count < 1:
                continue
            surgery = plan_growth(model, graph, {width.name: width.size + count})
            (value,) = [change.value for change in surgery.changes if change.name == tie.tensor]
            rows = value.flatten(1)
            torch.testing.assert_close(rows[: width.size], old, rtol=0, atol=0)
            new_unit, norm = rows[width.size :], old.norm(dim=1).mean()
            assert (new_unit @ old.T).abs().max() < 1e-12 * norm
            torch.testing.assert_close(new_unit @ new_unit.T, norm**2 * torch.eye(count).double())


def test_zero_rows_and_a_full_space_start_all_the_same() -> None:
    model = mlp(3, 7, 2)
    graph = trace(model, torch.zeros(1, 3).double())
    values = {c.name: c.value for c in plan_growth(model, graph, {"0": 12}).changes}
    torch.testing.assert_close(
        values["0.weight"][7:].norm(dim=1), model[0].weight.detach().norm(dim=1).mean().expand(5)
    )
    with torch.no_grad():
        model[0].weight.zero_()
    values = {c.name: c.value for c in plan_growth(model, graph, {"0": 9}).changes}
    assert (values["0.weight"][7:].norm(dim=1) > 0.1).all()


def test_biases_norms_and_buffers_of_new_units() -> None:
    model = convnet()
    values = {c.name: c.value for c in plan_growth(model, trace(model, images(2)), {"0": 10, "3": 8}).changes}
    norm = model[1]
    assert torch.equal(values["1.bias"][8:], torch.zeros(2).double())
    assert torch.equal(values["1.running_mean"][8:], torch.zeros(2).double())
    torch.testing.assert_close(values["1.weight"][8:], norm.weight.detach().abs().mean().expand(2))
    torch.testing.assert_close(values["1.running_var"][8:], norm.running_var.mean().expand(2))
    assert not values["3.weight"][:, 8:].any()
    assert not values["6.weight"][:, 96:].any()
    assert values["6.weight"].shape == (5, 128)


def test_depthwise_kernels_and_slopes_of_new_units_are_alive() -> None:
    model = mobile()
    graph = trace(model, images(2))
    values = {c.name: c.value for c in plan_growth(model, graph, {"0": 10}).changes}
    kernels = model[1].weight.detach().flatten(1)
    torch.testing.assert_close(values["1.weight"][8:].flatten(1).norm(dim=1), kernels.norm(dim=1).mean().expand(2))
    torch.testing.assert_close(values["3.weight"][8:], torch.full((2,), 0.25).double())


@pytest.mark.parametrize("case", CASES)
def test_new_units_get_a_gradient_where_they_are_read_and_then_where_they_are_made(case: str) -> None:
    make, inputs = CASES[case]
    model, x = make().train(), inputs()[:8]
    graph = trace(model, x)
    for width in graph.resizable:
        surgery = plan_growth(model, graph, {width.name: width.size + 2})
        axes = {change.name: change.axes for change in surgery.changes}
        undo = install(model, surgery)
        assert new_unit_gradients(model, axes, width.consumers, x).max() > 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-2 * parameter.grad
        assert new_unit_gradients(model, axes, width.producers, x).max() > 0
        undo()


def new_unit_gradients(model: Any, axes: dict, ties: tuple[Tie, ...], x: Tensor) -> Tensor:
    """Norm of each new unit's entries in these ties together, after one backward pass, `[count]`."""
    model.zero_grad()
    model(x).square().sum().backward()
    norms = []
    for tie in ties:
        index_map = axes[tie.tensor][tie.dim]
        grad = model.get_parameter(tie.tensor).grad.movedim(tie.dim, 0)[list(index_map.new_units)]
        norms.append(grad.reshape(2, -1).norm(dim=1))
    return torch.stack(norms).norm(dim=0)


def test_growth_is_repeatable_and_changes_nothing_yet() -> None:
    model = used(Residual())
    graph = trace(model, images(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plans = [
        plan_growth(model, graph, {"stem": 11}, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    values = [{change.name: change.value for change in plan.changes} for plan in plans]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert not torch.equal(values[0]["stem.weight"], values[2]["stem.weight"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_generator_leaves_the_global_one_alone() -> None:
    model = mlp(6, 4, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    state = torch.get_rng_state()
    plan_growth(model, graph, {"0": 6}, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_other_names_and_the_same_size_are_understood() -> None:
    model = used(Residual())
    graph = trace(model, images(2))
    assert plan_growth(model, graph, {"conv2": 9}).graph.sizes == {"stem": 9, "conv1": 5}
    assert plan_growth(model, graph, {"conv2": 8}).changes == ()


def test_what_cannot_grow_is_refused() -> None:
    model = mlp(6, 4, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    with pytest.raises(ResizeError, match=r"expected a method out of .*orthogonal.*, got 'magic'"):
        plan_growth(model, graph, {"0": 6}, method="magic")
    with pytest.raises(ResizeError, match="'0' has 4 units, expected a new size of 4 or more, got 3"):
        plan_growth(model, graph, {"0": 3})
    with pytest.raises(ResizeError, match="is the model's output"):
        plan_growth(model, graph, {"2": 5})
    with pytest.raises(ResizeError, match="No width is called 'nothing'"):
        plan_growth(model, graph, {"nothing": 5})
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(SpectrumError, match=r"0\.weight"):
        plan_growth(model, graph, {"0": 6})


def test_a_width_that_is_no_stream_grows_under_a_layer_norm_by_whole_copies_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    graph = trace(model, torch.zeros(2, 4).double())
    assert graph.widths["0"].frozen is None
    with pytest.raises(ResizeError, match=r"whole copies of its 6 units .* got 8: .*norm.* Take 12"):
        plan_growth(model, graph, {"0": 8})


def test_a_weight_that_makes_and_reads_the_units_gets_zeros() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model, x = Tied().double(), torch.randint(0, 7, (5, 3))
    graph = trace(model, x)
    (width,) = graph.resizable
    before = model(x).detach()
    install(model, plan_growth(model, graph, {width.name: 6}))
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)


def test_a_weight_that_two_layers_make_the_units_with_gets_new_units() -> None:
    class Replicas(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 2)
            self.right.weight = self.left.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.left(x) - self.right(x.square())).tanh())

    model, x = Replicas().double(), torch.randn(9, 5, dtype=torch.float64)
    before = model(x).detach()
    install(model, plan_growth(model, trace(model, x), {"left": 5}))
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)
    assert model.right.weight is model.left.weight
    assert (model.left.weight[3:].norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_keep_their_type(dtype: torch.dtype) -> None:
    model = mlp(6, 4, 3).to(dtype)
    surgery = plan_growth(model, trace(model, torch.zeros(1, 6, dtype=dtype)), {"0": 6})
    assert all(change.value.dtype == dtype for change in surgery.changes)


def squares(answer: Any, targets: None) -> Tensor:
    return torch.stack([leaf.square().mean() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]).sum()


@pytest.mark.parametrize("method", ["orthogonal", "paired", "gradmax", "tiny"])
@pytest.mark.parametrize("case", ["convnet", "residual", "mobile"])
def test_new_units_under_batch_norm_and_relu_learn(method: str, case: str) -> None:
    """GradMax as published would not: its new units are 0, where ReLU has no gradient."""
    make, inputs = CASES[case]
    model, x = make(), inputs()[:16]
    graph = trace(model, x[:2])
    for width in graph.resizable:
        surgery = plan_growth(model, graph, {width.name: width.size + 2}, method, batches=[(x, None)], loss=squares)
        axes = {change.name: change.axes for change in surgery.changes}
        undo = install(model.train(), surgery)
        reading = new_unit_gradients(model, axes, width.consumers, x)
        making = new_unit_gradients(model, axes, width.producers, x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-2 * parameter.grad
        later = new_unit_gradients(model, axes, width.producers, x)
        undo()
        model.eval()
        # Without data a new unit may point where ReLU leaves nothing of it; one of two does not.
        assert reading.max() > 0
        assert later.max() > 0
        assert (making.max() > 0) == (method == "paired")
        if method in ("gradmax", "tiny"):
            assert reading.min() > 0
            assert later.min() > 0
