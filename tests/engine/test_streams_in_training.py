"""Residual streams under norms grow while a network trains: with optimizer state, averages, undone, resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet import Evolver, Threshold
from evolvenet.engine.snapshot import Snapshot
from evolvenet.surgery.optimizer_state import validate_state
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.networks.residual import ConvNeXt, Encoder, ResidualMlp
from tests.helpers.policies import Fixed

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "RMS norms": (lambda: ResidualMlp(nn.RMSNorm), (16, 6), {"embed": 15, "up.0": 24}),
    "layer norms": (lambda: ResidualMlp(nn.LayerNorm), (16, 6), {"embed": 15, "up.0": 24}),
    "attention": (lambda: Encoder(norm_first=True), (16, 4, 6), {"embed": 6}),
    "copies": (ConvNeXt, (16, 3, 8, 8), {"stem": 16, "up": 20}),
}  # fmt: skip


class Loop:
    """A model in training, an average of its weights beside it."""

    def __init__(self, name: str, sizes: dict[str, int] | None = None) -> None:
        torch.manual_seed(0)
        factory, shape, own = NETWORKS[name]
        self.model = factory().double()
        self.average = copy.deepcopy(self.model)
        self.x = torch.randn(shape, dtype=torch.float64)
        self.targets = torch.randn(shape[0], 3, dtype=torch.float64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.evolver = Evolver(self.model, self.optimizer, Fixed(own if sizes is None else sizes), self.x[:2])
        self.evolver.copies = [self.average]

    def loss(self) -> Tensor:
        out = self.model.train()(self.x)
        return (out.mean(1) if out.dim() == 3 else out).sub(self.targets).square().mean()

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.evolver.observe(self.x)
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            for average, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.data.lerp_(parameter.data, 0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stream_grows_with_its_optimizer_state_and_averages(name: str) -> None:
    loop = Loop(name)
    loop.train()
    before = [outputs(each, loop.x) for each in (loop.model, loop.average)]
    event = loop.evolver.step(at=3)
    assert event.sizes.items() >= NETWORKS[name][2].items()
    for each, old in zip((loop.model, loop.average), before, strict=True):
        assert distance(outputs(each, loop.x), old) < 1e-12
    validate_state(loop.optimizer)
    start = loop.loss().item()
    loop.train(20)
    assert loop.loss().item() < start


@pytest.mark.parametrize("name", NETWORKS)
def test_a_growth_is_undone_bit_for_bit(name: str) -> None:
    loop = Loop(name)
    loop.train()
    before, eps = outputs(loop.model, loop.x), [getattr(module, "eps", None) for module in loop.model.modules()]
    past = Snapshot.of(loop.model, loop.evolver.graph, [loop.optimizer], [loop.average])
    loop.evolver.step(at=3)
    assert loop.evolver.graph.sizes != past.graph.sizes
    Snapshot.from_state_dict(past.state_dict()).restore(loop.model, [loop.optimizer], [loop.average])
    assert distance(outputs(loop.model, loop.x), before) == 0
    assert [getattr(module, "eps", None) for module in loop.model.modules()] == eps


@pytest.mark.parametrize("name", NETWORKS)
def test_a_resumed_run_goes_on_as_the_first_one(name: str, tmp_path: Path) -> None:
    loop, other = Loop(name), Loop(name)
    loop.train()
    loop.evolver.step(at=3)
    loop.train()
    evolvenet.save(loop.model, tmp_path / "model.pt")
    evolvenet.load(other.model, tmp_path / "model.pt")
    evolvenet.load(other.average, tmp_path / "model.pt")
    other.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    other.evolver.load_state_dict(loop.evolver.state_dict())
    for each in (loop, other):
        each.train()
    assert distance(outputs(other.model, loop.x), outputs(loop.model, loop.x)) < 1e-12


def test_policies_test_the_units_of_a_stream_before_they_add_them() -> None:
    torch.manual_seed(0)
    teacher, model = (ResidualMlp(nn.LayerNorm, size).double() for size in (24, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    evolver = Evolver(model, optimizer, Threshold(growth=0.5, grow=0.5), torch.randn(2, 6, dtype=torch.float64))
    assert trace(model, torch.randn(2, 6, dtype=torch.float64)).widths["embed"].can_grow
    for step in range(60):
        x = torch.randn(64, 6, dtype=torch.float64)
        optimizer.zero_grad()
        out = model(x)
        gradient = out.detach() - teacher(x).detach()
        out.backward(gradient / len(x))
        evolver.observe(x)
        optimizer.step()
        if step % 20 == 19:
            evolver.step(at=step, progress=step / 100)
    assert evolver.graph.sizes["embed"] > 3
