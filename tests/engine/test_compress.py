"""`compress`: widths and ranks together, in one call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.engine import compress as compress_module
from evolvenet.errors import DistillationError
from evolvenet.lowrank import factorize as factorize_module
from evolvenet.lowrank.latency import Run
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.measurement import cost as cost_module
from evolvenet.measurement.cost import macs, parameters, size_in_bytes
from evolvenet.measurement.output_error import output_divergence, output_error, outputs_on
from tests.helpers.small_models import mlp
from tests.helpers.states import State

COSTS: dict[str, Callable[[nn.Module], float]] = {
    "parameters": parameters,
    "macs": lambda model: macs(model, images(2)),
    "bytes": size_in_bytes,
}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """A network of convolutions with a sum, whose weights have decaying singular values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.fc, self.head = nn.Linear(16 * 16, 32), nn.Linear(32, 5)
        for weight in self.parameters():
            if weight.dim() > 1:
                u, s, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
                weight.data.copy_((2 * u * (s * torch.exp(-torch.arange(len(s)) / 5)) @ v).reshape(weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.two(torch.relu(self.one(x)))
        return self.head(torch.relu(self.fc(nn.functional.avg_pool2d(x, 2).flatten(1))))


@pytest.fixture
def model() -> nn.Module:
    return Residual().eval()


BATCHES = [images(32, seed) for seed in range(4)]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("lowrank", [True, False])
def test_the_network_is_within_its_limit_and_no_worse_than_widths_alone(
    model: nn.Module, cost: str, lowrank: bool
) -> None:
    before = COSTS[cost](model)
    limit = int(0.4 * before)
    whole = outputs_on(model, [images(64, 9)])
    options: dict[str, Any] = {cost: limit}
    done = evolvenet.compress(model, images(2), BATCHES, lowrank=lowrank, **options)
    assert 0.9 * limit <= COSTS[cost](model) <= limit
    assert (done.before, done.after) == (before, COSTS[cost](model))
    assert done.error == min(each.error for each in done.attempts if each.error is not None)
    assert done.attempts[0].name == "widths"
    assert output_error(whole, outputs_on(model, [images(64, 9)])) < 3 * done.error + 1e-3
    found = any(isinstance(module, FactoredLayer) for module in model.modules())
    assert found == (done.layers is not None and done.layers.after < done.layers.before)
    assert lowrank or not found
    for name, (size, now) in done.sizes.items():
        assert now < size
        assert name not in done.graph.widths or done.graph.sizes[name] == now
    assert str(done).endswith(f"output error {done.error:.2g}")


def test_ranks_and_widths_are_better_than_widths_alone_where_weights_have_low_rank(model: nn.Module) -> None:
    done = evolvenet.compress(model, images(2), BATCHES, parameters=parameters(model) // 3)
    assert done.error < 0.5 * (done.attempts[0].error or 0)
    assert any(width.rank_of for width in done.graph.widths.values())


def test_the_uncut_network_is_there_between_attempts_and_after_a_failure(model: nn.Module) -> None:
    state, modules = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    optimizer = torch.optim.AdamW(model.parameters())
    model(images(4)).square().mean().backward()
    optimizer.step()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(evolvenet.ResizeError, match="no attempt reached 10 parameters"):
        evolvenet.compress(model, images(2), BATCHES, parameters=10, optimizers=optimizer)
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(state["exp_avg"].shape == weight.shape for weight, state in optimizer.state.items())


def test_training_goes_on_with_the_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(images(4)).square().mean().backward()
        optimizer.step()
    evolvenet.compress(model, images(2), BATCHES, parameters=parameters(model) // 3, optimizers=optimizer)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in model.parameters()}
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer.zero_grad()
    model(images(4)).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_fresh_network_takes_up_what_was_saved(model: nn.Module, ending: str, tmp_path: Path) -> None:
    evolvenet.compress(model, images(2), BATCHES, parameters=parameters(model) // 3)
    evolvenet.save(model, tmp_path / f"small.{ending}")
    fresh = evolvenet.load(Residual().eval(), tmp_path / f"small.{ending}")
    assert torch.equal(fresh(images(3)), model(images(3)))


def test_steps_bring_the_outputs_nearer_to_those_of_the_uncut_network() -> None:
    torch.manual_seed(0)
    model = mlp(6, 24, 24, 3).float()
    plain, mirroring = copy.deepcopy(model), copy.deepcopy(model)
    batches = [torch.randn(32, 6) for _ in range(8)]
    fresh = torch.randn(256, 6)
    whole = {sign: outputs_on(model, [sign * fresh]) for sign in (1, -1)}
    options: dict[str, Any] = {"parameters": 100, "lowrank": False}
    assert evolvenet.compress(plain, batches[0], batches, **options).polished is None
    done = evolvenet.compress(model, batches[0], batches, **options, steps=100)
    assert done.polished is not None
    assert done.polished.kept
    assert str(done).endswith(f"\n{done.polished}")
    assert parameters(model) == parameters(plain) == done.after
    before = output_error(whole[1], outputs_on(plain, [fresh]))
    assert output_error(whole[1], outputs_on(model, [fresh])) < 0.8 * before
    evolvenet.compress(mirroring, batches[0], batches, **options, steps=100, augment=lambda inputs: -inputs)
    before = output_error(whole[-1], outputs_on(plain, [-fresh]))
    assert output_error(whole[-1], outputs_on(mirroring, [-fresh])) < 0.8 * before


def test_by_the_divergence_attempts_are_compared_and_steps_are_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 6))
    batches = [torch.randn(32, 16) for _ in range(4)]
    whole = outputs_on(model, batches[3:])
    done = evolvenet.compress(model, batches[0][:2], batches, parameters=400, lowrank=False, steps=20, loss="kl")
    assert done.polished is not None
    assert done.polished.after < done.polished.before
    assert "divergence" in str(done)
    assert output_divergence(whole, outputs_on(model, batches[3:])) < done.error
    with pytest.raises(DistillationError, match="expected loss"):
        evolvenet.compress(model, batches[0][:2], batches, parameters=200, loss="ce")  # pyright: ignore[reportArgumentType]


def test_a_failure_in_the_steps_leaves_the_uncut_network(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    model(images(4)).square().mean().backward()
    optimizer.step()
    state = State.of(model, [optimizer])

    def failing(inputs: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolvenet.compress(
            model, images(2), BATCHES, parameters=800, lowrank=False, optimizers=optimizer, steps=2, augment=failing
        )
    assert state.differences(model, [optimizer]) == []


def test_restrictions_hold(model: nn.Module) -> None:
    done = evolvenet.compress(
        model, images(2), BATCHES, parameters=parameters(model) // 3, lowrank=False, fixed="one", multiple=8
    )
    assert "one" not in done.sizes
    assert done.sizes
    assert all(now % 8 == 0 for _, now in done.sizes.values())


def test_attention_is_compressed() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    batches = [torch.randn(16, 5, 16) for _ in range(4)]
    whole, before = outputs_on(model, batches), parameters(model)
    done = evolvenet.compress(model, batches[0][:2], batches, parameters=before // 2)
    assert parameters(model) <= before // 2
    assert 0 < output_error(whole, outputs_on(model, batches)) < 1.5 * done.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of parameters, macs, bytes and latency, got none"),
        ({"parameters": 10, "macs": 10}, "got params, macs"),
        ({"parameters": 10**9}, "It meets the limit already"),
    ],
)
def test_what_cannot_be_done_is_said(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(evolvenet.ResizeError, match=message):
        evolvenet.compress(model, images(2), BATCHES, **options)


@pytest.mark.parametrize("batches", [[], images(4)])
def test_batches_are_a_list_of_some(model: nn.Module, batches: Any) -> None:
    with pytest.raises(evolvenet.TraceError, match="Batches: expected"):
        evolvenet.compress(model, images(2), batches, parameters=100)


@pytest.mark.parametrize("chains_take", [1.0, 3.0])
def test_latency_is_what_was_timed(model: nn.Module, chains_take: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts multiply-accumulates, those in chains several times; where chains are slow, widths are cut."""

    def seconds(module: nn.Module, inputs: Any, gradients: bool = False) -> float:
        chains = [each for each in module.modules() if isinstance(each, FactoredLayer)]
        return macs(module, inputs) * (chains_take if chains or type(module) is nn.Sequential else 1.0)

    def timer(runs: Sequence[Run]) -> list[float]:
        return [seconds(run.module, run.inputs) for run in runs]

    monkeypatch.setattr(cost_module, "latency", seconds)
    monkeypatch.setattr(compress_module, "latency", seconds)
    monkeypatch.setattr(factorize_module, "fastest", timer)
    before = seconds(model, images(2))
    done = evolvenet.compress(model, images(2), BATCHES, latency=0.5 * before)
    assert done.after == seconds(model, images(2)) <= 0.5 * before
    found = any(isinstance(module, FactoredLayer) for module in model.modules())
    assert found == (chains_take == 1.0)


def test_outputs_that_are_no_logits_have_no_divergence_and_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(evolvenet.EvolveNetError, match="logits"):
        evolvenet.compress(model, torch.zeros(1, 8), [torch.randn(16, 8)] * 2, parameters=200, loss="kl")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_masked_logits_are_compared_by_those_that_are_not() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

    torch.manual_seed(0)
    batches = [torch.randn(32, 8) for _ in range(4)]
    done = evolvenet.compress(Masked(), batches[0][:1], batches, parameters=250, lowrank=False, steps=10, loss="kl")
    assert all(attempt.error > 0 for attempt in done.attempts if attempt.error is not None)
    assert done.polished is not None
    assert math.isfinite(done.polished.after)
