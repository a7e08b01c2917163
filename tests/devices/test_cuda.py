"""What only a CUDA GPU can show: scaled losses, compiled modules, its own kernels and memory formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet import Budget, Threshold, WidthEvolution
from evolvenet.measurement.activation_moments import collect
from tests.helpers.cases import CASES, graph_of
from tests.helpers.devices import device_named
from tests.helpers.networks import ResNet
from tests.helpers.runs import Batches, batch, fresh, trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "32-true"])
def test_a_fit_in_every_precision_changes_widths(precision: Any, tmp_path: Path) -> None:
    evolving = WidthEvolution(Threshold(prune=0.3, grow=0.9), every_n_steps=6)
    model = fresh()
    trainer(tmp_path, [evolving], accelerator="gpu", devices=1, precision=precision).fit(model, Batches())
    assert evolving.evolver is not None
    assert evolving.evolver.off is None
    assert any(event.changes for event in evolving.evolver.history.events)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_changed_and_train_on_with_cudnn(kind: Any) -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(6, 24, batch_first=True, num_layers=2, dropout=0.1)
            self.head = nn.Linear(24, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cell(x)[0][:, -1])

    model = Sequences().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    evolver = evolvenet.Evolver(model, optimizer, Budget(params=3_000, by=0.6), torch.zeros(2, 5, 6, device="cuda"))
    for step in range(12):
        x = torch.randn(64, 5, 6, device="cuda")
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        evolver.observe(x)
        optimizer.step()
        if step % 3 == 2:
            evolver.step(at=step, progress=(step + 1) / 12)
    assert evolver.off is None
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000
    assert torch.backends.cudnn.enabled


def test_a_compiled_model_is_changed_and_trains_on() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).cuda()
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    evolver = evolvenet.Evolver(model, optimizer, Budget(params=100), torch.zeros(2, 6, device="cuda"))
    for step in range(6):
        x = batch(step, 64)[0].cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        evolver.observe(x)
        optimizer.step()
        if step % 3 == 2:
            evolver.step(at=step)
    assert evolver.off is None
    assert sum(parameter.numel() for parameter in model.parameters()) <= 100
    with torch.no_grad():
        assert torch.allclose(compiled(batch(0)[0].cuda()), model(batch(0)[0].cuda()), atol=1e-5)


def test_an_image_network_in_channels_last_under_autocast_keeps_its_layout() -> None:
    model = ResNet().cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(64, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        graph = evolvenet.trace(model, x[:2])
        model(x)
    graph = evolvenet.prune(
        model, graph, {name: width.size - 2 for name, width in graph.widths.items() if not width.frozen}, [x]
    )
    weights = [
        weight for weight in model.parameters() if weight.dim() == 4 and weight.shape[1] > 1 and weight.shape[2] > 1
    ]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with torch.autocast("cuda", torch.bfloat16):
        assert bool(model(x).isfinite().all())


def test_moments_in_float32_have_the_digits_of_float32_whatever_is_allowed_in_training() -> None:
    case = next(case for case in CASES if case.name == "conv")
    graph = graph_of(case)
    with device_named("cuda") as device:
        x = device.batches(case)
        exact = collect(device.model(case), graph, x)
        before: Any = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            found = collect(device.model(case).float(), graph, [each.float() for each in x])
        finally:
            torch.set_float32_matmul_precision(before)
    for tie, moments in exact.items():
        other = found[tie].covariance
        assert float((other - moments.covariance).norm() / moments.covariance.norm()) < 1e-5


def test_attention_by_every_kernel_is_traced_and_changed() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 4)
    ).cuda()
    x = torch.randn(16, 10, 8, device="cuda")
    graph = evolvenet.trace(model, x[:2])
    inner = {name: width.size // 2 for name, width in graph.widths.items() if not width.frozen and width.mixed is None}
    assert inner
    for half in (False, True):
        graph = evolvenet.prune(model, graph, {name: max(1, graph.sizes[name] // 2) for name in inner}, [x])
        model.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            model(x).square().mean().backward()
    assert bool(model(x).isfinite().all())
