"""Rows of GradMax and TINY, against the singular vectors of the fan-out's gradient for every direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.growth import tiny as bottleneck
from evolvenet.growth.plan import plan_growth
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import Residual, convnet, images, mlp, used

Loss = Callable[[Any, Any], Tensor]


def new_unit_rows(model: Any, graph: WidthGraph, name: str, count: int, method: str, pairs: Any, loss: Loss) -> Tensor:
    """The rows of the new units in the width's first producer, `[count, d]` of norm 1."""
    width = graph.widths[name]
    made = torch.Generator().manual_seed(3)
    surgery = plan_growth(model, graph, {name: width.size + count}, method, made, pairs, loss)
    (value,) = [change.value for change in surgery.changes if change.name == width.producers[0].tensor]
    rows = value.flatten(1)[width.size :]
    return rows / rows.norm(dim=1, keepdim=True)


def fan_out(model: Any, graph: WidthGraph, name: str, rows: Tensor, x: Tensor, loss: Callable[[Any], Tensor]) -> Tensor:
    """Gradient of the fan-out of new units with these rows, by growing and one backward pass, `[count, places]`."""
    width = graph.widths[name]
    undo = install(model, plan_growth(model, graph, {name: width.size + len(rows)}))
    (makes,), reads = width.producers, width.consumers
    with torch.no_grad():
        weight = model.get_parameter(makes.tensor)
        weight[width.size :] = rows.reshape(-1, *weight.shape[1:])
    found = []
    for tie in reads:
        weight = model.get_parameter(tie.tensor)
        (grad,) = torch.autograd.grad(loss(model(x)), weight)
        found.append(grad[:, width.size * tie.repeat :].movedim(1, 0).reshape(len(rows), -1))
    undo()
    return torch.cat(found, dim=1)


def linear_net() -> Any:
    return mlp(7, 5, 4, 3, activation=nn.Identity)


def pooled() -> Any:
    """Linear from end to end, but with a norm, pooling and a flatten between the layers."""
    return used(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 5)
        )
    )


def convolutions() -> Any:
    """A strided convolution, a norm, and a dilated one that reads it."""
    return used(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 2, 2, padding=1, dilation=2),
            nn.Flatten(),
        )
    )


LINEAR: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], int, str, int]] = {
    "dense": (linear_net, lambda: torch.randn(200, 7).double(), 3, "0", 2),
    "dense, second": (linear_net, lambda: torch.randn(200, 7).double(), 3, "1", 1),
    "pooled": (pooled, lambda: images(150), 5, "0", 3),
    "convolutions": (convolutions, lambda: images(100), 18, "0", 3),
}
"""Model, inputs, outputs, which width, and new units: no more than what the others leave over has directions."""


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds enough to tell close singular values apart, and least squares as good as without a ridge."""
    monkeypatch.setattr("evolvenet.growth.gradmax.STEPS", 80)
    monkeypatch.setattr("evolvenet.linalg.ridge.RIDGES", (1e-10,))
    monkeypatch.setattr("evolvenet.growth.tiny.ROWS", 100_000)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("case", LINEAR)
def test_gradmax_finds_the_leading_singular_vectors_where_all_is_linear(case: str) -> None:
    make, inputs, out, place, count = LINEAR[case]
    torch.manual_seed(0)
    model, x = make(), inputs()
    y, graph = torch.randn(len(x), out).double(), trace(model, x[:2])
    name = list(graph.sizes)[int(place)]
    found = new_unit_rows(
        model, graph, name, count, "gradmax", [(x[:15], y[:15]), (x[15:], y[15:])], functional.mse_loss
    )
    every = model.get_parameter(graph.widths[name].producers[0].tensor)[0].numel()

    def both(answer: Tensor) -> Tensor:
        return functional.mse_loss(answer[:15], y[:15]) + functional.mse_loss(answer[15:], y[15:])

    matrix = fan_out(model, graph, name, torch.eye(every).double(), x, both)
    best = torch.linalg.svd(matrix, full_matrices=False).U.T[:count]
    assert_same_directions(found, best)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("case", LINEAR)
def test_tiny_finds_the_singular_vectors_of_the_paper_where_all_is_linear(case: str) -> None:
    """S^−½·N by its definition: N by trying every direction under a loss whose gradient is the projected one."""
    make, inputs, out, place, count = LINEAR[case]
    torch.manual_seed(0)
    model, x = make(), inputs()
    # An update of the consumers explains a part of the gradient.
    y = 3 * model(x).detach() + 0.1 * x.flatten(1).tanh() @ torch.randn(x[0].numel(), out).double()
    graph = trace(model, x[:2])
    name = list(graph.sizes)[int(place)]
    found = new_unit_rows(model, graph, name, count, "tiny", [(x, y)], functional.mse_loss)

    width = graph.widths[name]
    makes, reads = model.get_submodule(width.producers[0].module), model.get_submodule(width.consumers[0].module)
    seen = captured(model, [makes, reads], x)
    (gradient,) = torch.autograd.grad(functional.mse_loss(seen["output"][0], y), seen[reads][1])
    inside = columns(reads, seen[reads][0].detach())
    inside = torch.cat([inside, torch.ones(len(inside), 1).double()], dim=1)
    rest = flat(gradient) - inside @ torch.linalg.lstsq(inside, flat(gradient), driver="gelsd").solution

    patches = columns(makes, seen[makes][0].detach())
    second = patches.T @ patches / len(patches)
    second += bottleneck.RIDGE * second.diagonal().mean() * torch.eye(len(second))
    values, vectors = torch.linalg.eigh(second)
    half = vectors / values.sqrt() @ vectors.T

    answers: list[Tensor] = []
    hook = reads.register_forward_hook(lambda module, args, answer: answers.append(answer))
    matrix = fan_out(model, graph, name, torch.eye(len(second)).double(), x, lambda _: (flat(answers[-1]) * rest).sum())
    hook.remove()
    best = (half @ torch.linalg.svd(half @ matrix, full_matrices=False).U[:, :count]).T
    best /= best.norm(dim=1, keepdim=True)
    assert_same_directions(found, best)


def captured(model: Any, modules: list[Any], x: Tensor) -> dict[Any, tuple[Tensor, ...]]:
    """Input and output of each module, and the model's output."""
    seen: dict[Any, tuple[Tensor, ...]] = {}
    hooks = [m.register_forward_hook(lambda m, args, y: seen.update({m: (args[0], y)})) for m in modules]
    seen["output"] = (model(x),)
    for hook in hooks:
        hook.remove()
    return seen


def assert_same_directions(found: Tensor, best: Tensor) -> None:
    """In any order, each of either sign."""
    cosines = (found @ best.T).abs()
    assert sorted(cosines.argmax(1).tolist()) == list(range(len(best)))
    assert cosines.amax(1).min() > 1 - 1e-4


def made_up(name: str) -> tuple[Any, Tensor]:
    """A model with what the papers leave out: ReLU, norms, pooling, several producers and consumers."""
    torch.manual_seed(2)
    if name == "residual":
        return used(Residual()), images(20)
    if name == "convnet":
        return convnet(), images(20)
    return mlp(6, 5, 4, 3, activation={"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}[name]), torch.randn(
        60, 6
    ).double()


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "convnet", "residual"])
def test_no_random_row_gets_as_large_a_gradient(name: str) -> None:
    """As gradient ascent or a random search would find it, through what really lies between."""
    model, x = made_up(name)
    graph = trace(model, x[:2])
    y = torch.randn(len(x), model(x).shape[1]).double() if model(x).dim() == 2 else torch.zeros_like(model(x))
    for width in graph.resizable:
        made = torch.Generator().manual_seed(0)

        def total(method: str, count: int, width: Width = width, made: torch.Generator = made) -> Tensor:
            """Squared gradient of each new unit's fan-out."""
            surgery = plan_growth(
                model, graph, {width.name: width.size + count}, method, made, [(x, y)], functional.mse_loss
            )
            undo = install(model, surgery)
            loss = functional.mse_loss(model(x), y)
            found = torch.zeros(count).double()
            for tie in width.consumers:
                (grad,) = torch.autograd.grad(loss, model.get_parameter(tie.tensor), retain_graph=True)
                found += grad[:, width.size * tie.repeat :].movedim(1, 0).reshape(count, -1).square().sum(1)
            undo()
            return found

        best_of_many = total("orthogonal", 200).max()
        assert total("gradmax", 1).max() > best_of_many
        assert total("gradmax", 3).sum() > best_of_many
        assert total("tiny", 3).min() > 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", ["gradmax", "tiny"])
def test_a_row_that_answers_nothing_at_first_is_turned_round(seed: int, method: str) -> None:
    """Inputs that are all alike: one half of all rows is dead under ReLU, without any gradient to leave it by."""
    model, x = mlp(6, 4, 3), 1 + 0.1 * torch.rand(40, 6).double()
    torch.nn.init.constant_(model[0].bias, 0.5)
    graph, y = trace(model, x[:2]), torch.randn(40, 3).double()
    made = torch.Generator().manual_seed(seed)
    install(model, plan_growth(model, graph, {"0": 5}, method, made, [(x, y)], functional.mse_loss))
    assert model[0](x)[:, 4].max() > 0


def columns(module: Any, x: Tensor) -> Tensor:
    """What the module's weight multiplies, `[rows, columns]`, by torch's own unfold."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)
    patches = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.mT.flatten(0, 1)


def flat(y: Tensor) -> Tensor:
    """`[N, out]` or `[N, out, h, w]` → `[rows, out]`."""
    return y.flatten(2).mT.flatten(0, 1) if y.dim() > 2 else y
