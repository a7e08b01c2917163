"""Models with degenerate values (zero, rank-one or tiny weights, constant activations), and what must hold for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet.graph.width_graph import WidthGraph
from tests.helpers.cases import CASES, Case, run

MODELS = [case for case in CASES if case.name in ("mlp", "conv", "resnet", "attention", "resnext")]

MANY = 40
"""Samples that are enough to measure the widest of the models on."""


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.data for parameter in model.parameters() if parameter.dim() > 1]


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.zeros_(parameter)


def _rank_one(model: nn.Module) -> None:
    for weight in weights(model):
        rows = weight.flatten(1)
        weight.copy_(torch.outer(rows[:, 0], rows[0]).reshape(weight.shape))


def _constant(model: nn.Module) -> None:
    """The first layer's weights are 0, so that no activation differs from sample to sample."""
    nn.init.zeros_(weights(model)[0])


def _zero_channels(model: nn.Module) -> None:
    """The first half of every layer's outputs is 0, whatever its input."""
    for module in [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d))
    ]:
        for parameter in module.parameters():
            parameter.data[: len(parameter) // 2] = 0


def _norms_of_zero(model: nn.Module) -> None:
    for norm in norms(model):
        nn.init.zeros_(norm.weight)


def _norms_without_variance(model: nn.Module) -> None:
    """Channels that never varied: a running variance of 0."""
    for norm in norms(model):
        nn.init.zeros_(norm.running_var)


def _tiny(model: nn.Module) -> None:
    for weight in weights(model):
        weight.mul_(1e-160)


DEGENERATE: Mapping[str, Callable[[nn.Module], None]] = {
    "zero weights": _zero,
    "rank-one weights": _rank_one,
    "constant activations": _constant,
    "zero channels": _zero_channels,
    "batch norms with zero scale": _norms_of_zero,
    "batch norms with zero variance": _norms_without_variance,
    "weights near zero": _tiny,
}
PAIRS = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in MODELS
    for name in DEGENERATE
    if "norms" not in name or case.name in ("conv", "resnet")
]


def degenerate(case: Case, name: str) -> Any:
    model = case.model()
    with torch.no_grad():
        DEGENERATE[name](model)
    return model


def samples(case: Case, count: int = MANY) -> Tensor:
    return torch.cat([case.inputs(seed) for seed in range(3, 4 + count // 2)])[:count]


def halves(graph: WidthGraph) -> dict[str, int]:
    """Half of the units of every width, rounded up."""
    return {w.name: max(w.smallest, -(-w.size // 2)) for w in graph.resizable}


def doubles(graph: WidthGraph) -> dict[str, int]:
    return {width.name: 2 * width.size for width in graph.resizable if width.mixed is None}


def check_alive(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    """No entry is NaN or infinite, neither now nor after a step of training."""
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([out.square().mean() for out in run(model, inputs)]).sum().backward()
        optimizer.step()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert bool(tensor.isfinite().all()), name


def check_values(values: Tensor, size: int) -> None:
    assert values.shape == (size,)
    assert bool(values.isfinite().all())
    assert bool((values >= 0).all())
    assert bool((values.diff() <= 0).all())


def rank(values: Tensor) -> int:
    return int((values > 1e-7 * values[0]).sum())
