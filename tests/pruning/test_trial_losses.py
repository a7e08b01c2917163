"""Losses of trials: of outputs, of probabilities, of a task; and ops that trials share are computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.errors import PolicyError
from evolvenet.execution.op_cache import OpCache
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning import trial_data
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
from evolvenet.pruning.selection import plan_prune
from evolvenet.pruning.trials import trial_curves
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.cases import outputs
from tests.helpers.small_models import convnet, mlp


def images(count: int = 40) -> Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_curves_with_and_without_the_cache_are_equal_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convnet(), images()
    graph, caches = trace(model, x[:2]), list[OpCache]()

    def counted() -> OpCache:
        caches.append(OpCache())
        return caches[-1]

    monkeypatch.setattr(trial_data, "OpCache", counted)
    fast = trial_curves(model, graph, [x[:20], x[20:]], shares=(0.5, 0.3))
    assert caches[0].hits > 20
    monkeypatch.setattr(trial_data, "OpCache", lambda: None)
    assert trial_curves(model, graph, [x[:20], x[20:]], shares=(0.5, 0.3)) == fast


@pytest.mark.parametrize("loss", ["kl", functional.mse_loss])
def test_a_loss_is_what_a_cut_by_itself_loses(loss: trial_data.Loss) -> None:
    torch.manual_seed(0)
    model, x = mlp(6, 12, 10, 3), torch.randn(60, 6, dtype=torch.float64)
    labels = outputs(model, x)[0]
    graph = trace(model, x[:2])
    batches = [(x, labels)] if callable(loss) else [x]
    curves = trial_curves(model, graph, batches, shares=(0.5, 0.3), loss=loss)
    limits, before = replace(TRAINING_LIMITS, samples=256), outputs(model, x)
    for size, found in curves["2"][1:-1]:
        surgery = plan_prune(model, graph, {"2": size}, collect(model, graph, [x], ["2"]))
        undo = install(model, reconstruct(model, graph, surgery, [x], limits))
        after = outputs(model, x)
        undo()
        if callable(loss):
            expected = loss(after[0], labels) - loss(before[0], labels)
        else:
            moved, whole = (each[0].log_softmax(1) for each in (after, before))
            expected = functional.kl_div(moved, whole, reduction="batchmean", log_target=True)
        assert found == pytest.approx(float(expected), rel=1e-9)


class Towers(nn.Module):
    """Two networks side by side; input `[b, 6]`, an output of each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = mlp(6, 16, 1), mlp(6, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], dim=1)


def test_by_the_loss_of_a_task_widths_go_that_it_does_not_need() -> None:
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(128, 6, dtype=torch.float64)
    graph, labels = trace(model, x[:2]), outputs(model, x)[0][:, :1]

    def first_output(found: Tensor, labels: Tensor) -> Tensor:
        return (found[:, :1] - labels).square().mean()

    pairs = [(x[:64], labels[:64]), (x[64:], labels[64:])]
    by_task = evolvenet.allocate(model, graph, graph.parameters // 2 + 10, pairs, loss=first_output)
    by_outputs = evolvenet.allocate(model, graph, graph.parameters // 2 + 10, [x])
    assert by_task["one.0"] >= 15
    assert by_task["two.0"] <= 2
    assert by_outputs["two.0"] > 4


def test_an_unknown_loss_and_batches_without_labels_are_refused() -> None:
    model, x = mlp(6, 8, 3), torch.zeros(4, 6, dtype=torch.float64)
    graph = trace(model, x)
    with pytest.raises(PolicyError, match=r'Expected loss to be "outputs", "kl" or a function .* got \'accuracy\''):
        evolvenet.allocate(model, graph, 50, [x], loss="accuracy")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=r"Batch 1: expected a pair of inputs and labels, .* got a Tensor"):
        evolvenet.allocate(model, graph, 50, [(x, x), x], loss=functional.mse_loss)


class TwoSums(nn.Module):
    """Two layers side by side, their weights slices of one tensor or not."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.q, self.v = nn.Linear(6, 12), nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)
        if shared:
            both = torch.cat([self.q.weight, self.v.weight]).detach()
            self.q.weight, self.v.weight = nn.Parameter(both[:8]), nn.Parameter(both[8:])

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).tanh()
        return self.one(self.q(h).tanh()) + self.two(self.v(h).tanh())


def test_weights_that_are_slices_of_one_tensor_are_told_apart() -> None:
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    apart, shared = (
        trial_curves(model, trace(model, x[:2]), [x], shares=(0.5, 0.25)) for model in (TwoSums(False), TwoSums(True))
    )
    assert shared == apart


def test_a_loss_may_write_to_the_outputs() -> None:
    """The outputs of a trial that changes nothing behind an op are the cached ones, which later trials compare with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(256, 8)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    pairs = list(zip(x.split(64), y.split(64), strict=True))
    graph = trace(model, x[:2])
    one, other = (
        evolvenet.allocate(model, graph, 600, pairs, loss=loss)
        for loss in (lambda o, y: (o - y).square().mean(), lambda o, y: o.sub_(y).square().mean())
    )
    assert dict(one) == dict(other)


def test_labels_of_all_places_in_one_row_are_not_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 9))
    pairs = [(torch.randint(9, (30, 5)), torch.randint(9, (150,))) for _ in range(3)]
    graph = trace(model, pairs[0][0][:2])
    found = trial_curves(
        model, graph, pairs, shares=(0.5,), samples=40, loss=lambda o, y: functional.cross_entropy(o.flatten(0, 1), y)
    )
    assert "1" in found
