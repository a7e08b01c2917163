"""Consumers whose weights weight norm computes are refitted after a cut: direction and length get the fitted weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import evolvenet
from evolvenet.engine.functional import commit
from evolvenet.graph.index_map import IndexMap
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.surgery.resize_model import compile_surgery

Wrap = Callable[..., Any]


def old(layer: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, **options)


def dense(wrap: Wrap) -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(6, 16), nn.ReLU(), wrap(nn.Linear(16, 8)), nn.ReLU(), wrap(nn.Linear(8, 3), dim=1)
    return nn.Sequential(*layers).double(), torch.randn(256, 6, generator=torch.Generator().manual_seed(1)).double()


def images(wrap: Wrap) -> tuple[nn.Module, Tensor]:
    first, second = nn.Conv2d(2, 12, 3, padding=1), wrap(nn.Conv2d(12, 10, 3, bias=False))
    layers = first, nn.ReLU(), second, nn.BatchNorm2d(10), nn.ReLU(), wrap(nn.Conv2d(10, 3, 1))
    x = torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    return nn.Sequential(*layers).double().eval(), x


@pytest.mark.parametrize("make", [dense, images])
@pytest.mark.parametrize("wrap", [old, parametrizations.weight_norm])
def test_a_refit_reaches_direction_and_length_and_lowers_the_error(make: Any, wrap: Wrap) -> None:
    def cut(chosen: bool, refitted: bool) -> float:
        """The error of the outputs, for units that are chosen by measurement or given."""
        torch.manual_seed(0)
        model, x = make(wrap)
        before, graph = model(x).detach(), evolvenet.trace(model, x[:2])
        assert len(graph.sizes) == 2
        if chosen:
            sizes = {name: size - 4 for name, size in graph.sizes.items()}
            evolvenet.prune(model, graph, sizes, batches=[x] if refitted else None)
        else:
            maps = {name: IndexMap.keep(range(2, size - 2), size=size) for name, size in graph.sizes.items()}
            surgery = compile_surgery(model, graph, maps)
            commit(model, reconstruct(model, graph, surgery, [x]) if refitted else surgery)
        after = model(x)
        after.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        return float((after.detach() - before).square().mean())

    for chosen in (False, True):
        assert cut(chosen, refitted=True) < 0.5 * cut(chosen, refitted=False)


@pytest.mark.parametrize("wrap", [old, parametrizations.weight_norm])
def test_a_weight_that_is_used_twice_keeps_the_values_of_the_cut(wrap: Wrap) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.out = nn.Linear(6, 12), nn.Linear(6, 12), wrap(nn.Linear(12, 3))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.one(x).relu()) - self.out(self.two(x).tanh())

    x = torch.randn(128, 6).double()
    found = []
    for batches in ([x], None):
        model = Twice()
        graph = evolvenet.trace(model, x[:2])
        (name, *_) = graph.sizes
        surgery = compile_surgery(model, graph, {name: IndexMap.keep(range(8), size=12)})
        commit(model, reconstruct(model, graph, surgery, batches) if batches else surgery)
        found.append(model(x).detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
