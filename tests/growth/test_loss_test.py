"""What speaks for a growth: against growing for real, against noise, and where nothing can be known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet.growth.loss_test import Evidence, evidence
from evolvenet.growth.plan import plan_growth
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, graph_of, outputs
from tests.helpers.small_models import mlp


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_test_of(
    model: nn.Module, sizes: dict[str, int], x: Any, *gradients: Tensor | None, seed: int = 0
) -> dict[str, Evidence]:
    """The results on one batch."""
    return evidence(model, trace(model, x), sizes, [x], [gradients], seeded(seed))


def test_it_is_what_growing_for_real_shows() -> None:
    """Nothing but the reader is after the new units, so that a step of it moves the outputs in proportion."""
    model, x = mlp(6, 5, 4), torch.randn(40, 6, dtype=torch.float64, generator=seeded(1))
    gradient = torch.randn(40, 4, dtype=torch.float64, generator=seeded(2))
    found = loss_test_of(model, {"0": 8}, x, gradient)["0"]

    grown = copy.deepcopy(model)
    install(grown, plan_growth(grown, trace(model, x), {"0": 8}, generator=seeded(0)))
    reads = torch.relu(grown[0](x)).detach()
    step = -gradient[::2].T @ reads[::2]
    new, old = reads[:, 5:] @ step[:, 5:].T, reads[:, :5] @ step[:, :5].T
    want, new, old = (-gradient[1::2], new[1::2], old[1::2])
    left = new - old * (new * old).sum() / (old * old).sum()
    rest = want - old * (want * old).sum() / (old * old).sum()
    each = (rest * left).sum(1)
    assert found.t_statistic == pytest.approx(float(each.mean() / (each.std() / 20**0.5)), rel=1e-9)
    cosine = float((rest * left).sum() / left.norm() / want.norm())
    assert found.share == pytest.approx(max(cosine, 0.0) ** 2, rel=1e-9)


def test_a_gradient_of_noise_gives_no_large_t_statistic() -> None:
    """Gradients that have nothing to do with the inputs: the certainty is Student's t around 0."""
    model = mlp(6, 5, 4)
    values = []
    for seed in range(120):
        x = torch.randn(64, 6, dtype=torch.float64, generator=seeded(1000 + seed))
        gradient = torch.randn(64, 4, dtype=torch.float64, generator=seeded(seed))
        values.append(loss_test_of(model, {"0": 8}, x, gradient, seed=seed)["0"].t_statistic)
    found = torch.tensor(values)
    assert abs(float(found.mean())) < 0.3
    assert 0.75 < float(found.std()) < 1.25
    assert float((found >= 2).double().mean()) < 0.08


def test_what_more_units_could_do_is_seen_and_what_the_present_ones_can_is_not() -> None:
    """The gradient is |x₀|, which no linear map of two ReLUs of other inputs gives; then something that one gives."""
    model = mlp(6, 2, 1)
    x = torch.randn(512, 6, dtype=torch.float64, generator=seeded(3))
    assert loss_test_of(model, {"0": 12}, x, -x[:, :1].abs())["0"].t_statistic > 5
    reads = torch.relu(model[0](x)).detach()
    reachable = reads @ (reads.T @ reads[:, :1])
    assert loss_test_of(model, {"0": 12}, x, -reachable)["0"].share < 1e-3


def test_the_scale_of_the_loss_does_not_matter() -> None:
    model, x = mlp(6, 5, 4), torch.randn(64, 6, dtype=torch.float64, generator=seeded(1))
    gradient = torch.randn(64, 4, dtype=torch.float64, generator=seeded(2))
    one, two = loss_test_of(model, {"0": 8}, x, gradient)["0"], loss_test_of(model, {"0": 8}, x, 65536 * gradient)["0"]
    assert one.share == pytest.approx(two.share, rel=1e-12)
    assert one.t_statistic == pytest.approx(two.t_statistic, rel=1e-12)


def test_several_batches_count_as_one_and_first_samples_are_enough() -> None:
    model, graph = mlp(6, 5, 4), trace(mlp(6, 5, 4), torch.zeros(1, 6).double())
    x = torch.randn(64, 6, dtype=torch.float64, generator=seeded(1))
    gradient = torch.randn(64, 4, dtype=torch.float64, generator=seeded(2))
    whole = evidence(model, graph, {"0": 8}, [x[:40]], [[gradient[:40]]], seeded())
    halves = evidence(model, graph, {"0": 8}, [x[:30], x[30:]], [[gradient[:30]], [gradient[30:40]]], seeded())
    assert whole["0"].t_statistic == pytest.approx(halves["0"].t_statistic, rel=1e-9)


@pytest.mark.parametrize(
    "gradients",
    [
        (),
        (None,),
        (torch.full((64, 4), torch.inf),),
        (torch.zeros(64, 5),),
        (torch.zeros(64, 4), None),
        (torch.zeros(1, 4),),
    ],
    ids=["none", "no gradient", "overflowed", "other shapes", "other outputs", "one sample"],
)
def test_where_nothing_can_be_known_nothing_is_said(gradients: tuple[Any, ...]) -> None:
    assert loss_test_of(mlp(6, 5, 4), {"0": 8}, torch.randn(64, 6).double(), *gradients) == {}


def test_a_network_without_a_backward_pass_here_says_nothing() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(6, 5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if self.training else self.net(x).detach()

    assert loss_test_of(Detached(), {"net.0": 8}, torch.randn(64, 6).double(), torch.randn(64, 4).double()) == {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_growable_width_can_be_tested_and_the_model_stays_as_it_is(case: Case) -> None:
    """Also what is random, in training mode, and tensors that share memory."""
    model, graph, x = case.model(), graph_of(case), case.inputs()
    sizes = {w.name: w.size + 1 for w in graph.resizable if w.mixed is None and w.producers and w.consumers}
    gradients = [
        torch.randn_like(each) if each.is_floating_point() and each.dim() else None for each in outputs(model, x)
    ]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = evidence(model, graph, sizes, [x], [gradients], seeded())
    assert set(found) == {*sizes}
    assert all(0 <= each.share <= 1 and each.t_statistic == each.t_statistic for each in found.values())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_computed_where_nothing_can_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain loop has no gradients."""
    monkeypatch.setattr("evolvenet.growth.loss_test.compile_surgery", lambda *_: pytest.fail("was planned"))
    assert loss_test_of(mlp(6, 5, 4), {"0": 8}, torch.randn(64, 6).double()) == {}
