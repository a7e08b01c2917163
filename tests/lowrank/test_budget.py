"""Ranks for a budget: it is kept, energy goes where it costs least, and what cannot be reached is refused."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.measurement.cost import macs, parameters, size_in_bytes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 24, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(384, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()


def images(samples: int = 128) -> Tensor:
    coarse = torch.randn(samples, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
@pytest.mark.parametrize("kind", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("data", [True, False])
def test_the_model_is_within_its_budget_and_uses_it(share: float, kind: str, data: bool) -> None:
    model, x = network(), images()
    if kind == "macs" and not data:
        with pytest.raises(evolvenet.FactorizationError, match="expected batches"):
            evolvenet.factorize(model, macs=1000)
        return
    count = {"parameters": parameters, "macs": lambda model: macs(model, x), "bytes": size_in_bytes}[kind]
    limit = round(share * count(model))
    budget: dict[str, Any] = {kind: limit}
    report = evolvenet.factorize(model, batches=[x] if data else None, **budget)
    assert 0.85 * limit < count(model) <= limit
    assert all(line.after <= line.before for line in report)


def test_bytes_count_each_layer_in_its_own_dtype() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False).double(), nn.Linear(32, 32, bias=False).half())
    decaying = torch.diag(0.8 ** torch.arange(32.0))
    for layer in model:
        left, _, right = torch.linalg.svd(torch.randn(32, 32))
        layer.get_parameter("weight").data.copy_(left @ decaying @ right)
    report = evolvenet.factorize(model, bytes=7000)
    assert 8 * report["0"].after + 2 * report["1"].after == size_in_bytes(model) <= 7000
    assert report["0"].after < report["1"].after, "an entry of 8 bytes saves more than one of 2"


@pytest.mark.parametrize("limit", [240, 480, 672, 768])
def test_the_losses_are_near_the_least_of_all_choices(limit: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)).double()
    with torch.no_grad():
        for layer, decay in zip(model, (0.5, 0.9), strict=True):
            left, _, right = torch.linalg.svd(layer.get_parameter("weight"))
            layer.get_parameter("weight").copy_(left @ torch.diag(decay ** torch.arange(24).double()) @ right)
    shares = [torch.linalg.svdvals(layer.get_parameter("weight").detach()).square() for layer in model]
    shares = [share / share.sum() for share in shares]

    def loss(ranks: tuple[int, ...]) -> float:
        return -sum(float(share[:rank].sum().clamp_max(1).log()) for share, rank in zip(shares, ranks, strict=True))

    # From rank 12 on the whole layer is as small.
    costs = {**{rank: 48 * rank for rank in range(1, 12)}, 24: 576}
    best = min(loss((one, two)) for one, two in product(costs, repeat=2) if costs[one] + costs[two] <= limit)
    report = evolvenet.factorize(model, parameters=limit)
    found = loss(tuple(line.ranks[0] if line.ranks else 24 for line in report))
    assert parameters(model) <= limit
    assert found <= 1.3 * best + 1e-9


def test_a_budget_that_no_ranks_reach_is_refused_and_changes_nothing() -> None:
    model = network()
    whole = repr(model)
    with pytest.raises(evolvenet.FactorizationError, match="the fewest that factors of these layers reach, got 10"):
        evolvenet.factorize(model, parameters=10)
    with pytest.raises(
        evolvenet.FactorizationError,
        match="one of `parameters`, `macs`, `bytes`, `latency`, got `parameters` and `macs`",
    ):
        evolvenet.factorize(model, parameters=10_000, macs=10, batches=[images()])
    with pytest.raises(evolvenet.FactorizationError, match="no ranks with a budget"):
        evolvenet.factorize(model, 4, parameters=10_000)
    assert repr(model) == whole
