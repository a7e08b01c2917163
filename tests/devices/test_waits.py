"""How often the host waits for a device: never in a step without an event, and a dozen times in one with an event."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional

from evolvenet import Budget, Evolver, Threshold, WidthEvolution
from evolvenet.linalg import host_transfers
from evolvenet.linalg.host_transfers import to_host, values_of
from evolvenet.linalg.precision import has_float64
from evolvenet.measurement import activation_moments
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.host_model import on_host
from evolvenet.tracing.trace import trace
from tests.helpers.devices import Device
from tests.helpers.waits import Waits, waits_of


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class EachStep(Callback):
    """The waits of each step, the callbacks' hooks included; the first callback of a trainer."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps, self._open = device, list[Waits](), ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._open.close()
        self.steps.append(self._open.enter_context(waits_of(self.device)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()


def test_no_step_without_an_event_waits(device: Device) -> None:
    """Steps that keep a batch for an event, too."""
    torch.manual_seed(0)
    data = [(torch.randn(16, 4, device=device.place), torch.arange(16, device=device.place) % 3) for _ in range(14)]
    evolution = WidthEvolution(Threshold(prune=0.5), every_n_steps=4, calibration_batches=3, stop=1.0)
    each = EachStep(device.place)
    Trainer(
        **device.trainer(), callbacks=[each, evolution], max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Net(), torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]  # fmt: skip
    assert evolution.history is not None
    events = {event.step for event in evolution.history.events}
    assert len(events) > 1
    # The first step traces, and the last one ends with the epoch.
    waited = {step: waits.places for step, waits in enumerate(each.steps[:-1]) if waits.count and step}
    assert set(waited) <= events, waited
    assert set(waited) == events or device.place.type == "cpu" or not has_float64(device.place)


def event_of(model: nn.Module, policy: Any, device: Device) -> tuple[Waits, bool]:
    """The waits of an event in which the policy changes a model, and whether it changed."""
    model.to(device.place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [torch.randn(64, 8, device=device.place) for _ in range(2)]
    evolver = Evolver(model, optimizer, policy, batches[0][:2], calibration_batches=2)
    for batch in batches:
        outputs = model(batch)
        loss = functional.cross_entropy(outputs, torch.zeros(64, dtype=torch.long, device=device.place))
        (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True)
        loss.backward()
        optimizer.step()
        evolver.observe(batch, [gradient])
    with waits_of(device.place) as waits:
        event = evolver.step(progress=0.6)
    return waits, bool(event.changes)


def dense(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(layers - 1) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *hidden, nn.Linear(32, 10))


def test_the_waits_of_an_event_do_not_grow_with_the_layers(device: Device) -> None:
    found = [event_of(dense(layers), Threshold(prune=0.5), device) for layers in (2, 6)]
    assert all(changed for _, changed in found)
    (few, _), (many, _) = found
    # Without float64 each sum is computed on the CPU, after a wait.
    assert not has_float64(device.place) or few.count == many.count <= 12, f"{few.places}\n\n{many.places}"


def test_a_trial_waits_three_times(device: Device) -> None:
    waits, changed = event_of(dense(2), Budget(params=600, by=0.6, trials=True), device)
    assert changed
    trials, others = 2 * 6, 44
    assert not has_float64(device.place) or waits.count <= 3 * trials + others, waits.places


def test_many_tensors_come_to_the_host_in_few_copies(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.randn(n, 3) for n in (1, 5, 2, 7)] + [torch.arange(4), torch.zeros(0, 2), torch.tensor(2.0)]
    there = [tensor.to(device.place) for tensor in given]
    with waits_of(device.place) as waits:
        found = to_host(there)
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(found, given, strict=True))
    assert waits.count == (0 if device.place.type == "cpu" else 2), "one for each type"
    monkeypatch.setattr(host_transfers, "CHUNK", 4 * 3 * 6)
    with waits_of(device.place) as waits:
        found = to_host(there[:4])
    assert all(map(torch.equal, found, given[:4]))
    assert waits.count == (0 if device.place.type == "cpu" else 3), "(1, 5), (2,), (7,)"
    assert values_of([there[0][0, 0], there[4][3], there[6]]) == [float(given[0][0, 0]), 3, 2.0]


def test_moments_that_are_too_many_for_the_device_are_the_same(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense(2).to(device.place)
    batches = [torch.randn(32, 8, device=device.place) for _ in range(3)]
    graph = trace(model, batches[0][:2])
    whole = collect(model, graph, batches)
    monkeypatch.setattr(activation_moments, "MOST_ON_DEVICE", 0)
    apart = collect(model, graph, batches)
    for tie in whole:
        assert whole[tie].count == apart[tie].count
        assert apart[tie].covariance.device.type == "cpu"
        torch.testing.assert_close(apart[tie].covariance, whole[tie].covariance)


def test_the_model_on_the_host_has_the_same_names_and_ties(device: Device) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)
            self.two, self.again = nn.Linear(3, 3), self.one
            self.two.weight = self.one.weight
            self.norm.weight.requires_grad_(False)

    model = Tied()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = nn.Parameter(model.one.weight.detach().to(device.place))
    model.to(device.place)
    model.one.weight = model.two.weight = shared
    host: Any = on_host(model)
    assert (host is model) == (device.place.type == "cpu")
    found = host.state_dict()
    assert list(found) == list(values)
    assert all(torch.equal(found[name], values[name]) for name in values)
    assert host.one.weight is host.two.weight is host.again.weight
    assert host.again is host.one
    assert not host.norm.weight.requires_grad
    assert model.one.weight.device.type == device.place.type, "the model is left as it was"
