"""Runs on every device: each policy in a plain loop, Lightning's fit, resumed as if it had not been stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import evolvenet
from evolvenet import Budget, Front, Price, Threshold, Tolerance, WidthEvolution
from tests.helpers.devices import Device
from tests.helpers.resuming import Randomness, assert_same, evolution
from tests.helpers.runs import Batches, Classifier, batch, fresh, trainer

POLICIES: dict[str, Any] = {
    "threshold": lambda: Threshold(prune=0.3, grow=0.9),
    "price": lambda: Price(price=1e-3),
    "budget": lambda: Budget(params=400, by=0.6),
    "trials": lambda: Budget(params=400, by=0.6, trials=True),
    "ranks": lambda: Budget(params=400, by=0.6, lowrank=True),
    "front": lambda: Front(points=[Budget(params=600), Budget(params=400)]),
    "tolerance": lambda: Tolerance(metric="acc", drop=0.5, share=0.3, validations=1, lowrank=True),
}
OPTIMIZERS: dict[str, Any] = {
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "foreach": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "capturable": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, capturable=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5),
}


def network(device: Device, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    return made.to(dtype).to(device.place)


def loop(evolver: evolvenet.Evolver, device: Device, steps: int = 24, every: int = 6) -> list[evolvenet.Event]:
    """Train the evolver's model, with an event now and then; the gradients at the outputs are given to it."""
    model, (optimizer,) = evolver.model, evolver.optimizers
    for step in range(steps):
        x, y = (tensor.to(device.place) for tensor in batch(step, 64))
        model.train()
        outputs = model(x)
        outputs.retain_grad()
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, y).backward()
        evolver.observe(x, [outputs.grad])
        optimizer.step()
        if step % every == every - 1:
            evolver.judge(0.9)
            evolver.step(at=step, progress=(step + 1) / steps)
    return evolver.history.events


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_changes_widths_in_a_plain_loop(policy: str, device: Device) -> None:
    model = network(device)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    evolver = evolvenet.Evolver(model, optimizer, POLICIES[policy](), batch(0)[0][:2].to(device.place))
    events = loop(evolver, device)
    assert evolver.off is None
    assert [event.skipped for event in events if event.skipped] == []
    assert any(event.changes for event in events)
    state = [entry for each in optimizer.state.values() for name, entry in each.items() if name != "step"]
    assert all(tensor.device == device.place for tensor in (*model.parameters(), *model.buffers(), *state))
    assert all(bool(tensor.isfinite().all()) for tensor in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_kind_of_optimizer_is_carried(name: str, device: Device) -> None:
    if (name == "fused" and device.place.type == "pretend") or (name == "capturable" and device.place.type != "cuda"):
        return  # There is no such optimizer there.
    model = network(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    evolver = evolvenet.Evolver(model, optimizer, Budget(params=400, by=0.6), batch(0)[0][:2].to(device.place))
    loop(evolver, device)
    assert evolver.off is None
    assert any(event.changes for event in evolver.history.events)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert all(entry.shape in (parameter.shape, ()) for entry in state.values() if isinstance(entry, torch.Tensor))
        if name in ("fused", "capturable"):
            assert state["step"].device == device.place


class DeviceRandomness(Randomness):
    """Saves and restores the device's own random stream too."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "device": self.device.random_state()}

    def on_train_start(self, *args: Any, **_: Any) -> None:
        super().on_train_start(*args)
        if hasattr(self, "state") and self.device.place.type != "cpu":
            torch.get_device_module(self.device.place.type).set_rng_state(self.state["device"].cpu())


class Run:
    """A fit of the classifier on a device."""

    def __init__(
        self, folder: Path, device: Device, callbacks: Any = (), ckpt: Path | None = None, **options: Any
    ) -> None:
        self.model, self.evolution = fresh(), evolution()
        torch.manual_seed(11)
        settings = {**device.trainer(), "deterministic": not device.exact, **options}
        self.trainer = trainer(folder, [DeviceRandomness(device), self.evolution, *callbacks], **settings)
        try:
            self.trainer.fit(self.model, Batches(), ckpt_path=ckpt, weights_only=True)
        finally:
            torch.use_deterministic_algorithms(False)

    @property
    def all(self) -> dict[str, Any]:
        """What two runs must agree on."""
        assert self.evolution.history is not None
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "events": [(event.step, event.changes, event.sizes) for event in self.evolution.history.events],
        }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit(precision: str, device: Device, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = Run(tmp_path, device, [keeper], precision=precision)
    assert whole.evolution.history is not None
    assert [event.step for event in whole.evolution.history.events] == [8, 13, 18, 23]
    assert all(event.changes for event in whole.evolution.history.events)
    for step in (4, 7, 8, 17):
        resumed = Run(tmp_path, device, ckpt=tmp_path / f"step={step}.ckpt", precision=precision)
        assert_same(resumed.all, whole.all)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_of_the_weights_go_along(average: str, device: Device, tmp_path: Path) -> None:
    averages = EMAWeightAveraging(decay=0.9) if average == "ema" else StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    run = Run(tmp_path, device, [averages])
    assert run.evolution.evolver is not None
    assert run.evolution.evolver.off is None
    assert any(event.changes for event in run.evolution.evolver.history.events)
    outputs = run.model.cpu().eval()(batch(99)[0])
    assert bool(outputs.isfinite().all())


def test_a_checkpoint_of_the_device_is_loaded_on_the_cpu(device: Device, tmp_path: Path) -> None:
    run = Run(tmp_path, device)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.cpu())


@pytest.mark.parametrize("policy", [Threshold(prune=0.3, grow=0.9), Budget(params=300)], ids=["threshold", "budget"])
def test_a_fit_with_inputs_given_on_the_device_or_on_the_cpu(policy: Any, device: Device, tmp_path: Path) -> None:
    for place in (device.place, "cpu"):
        evolving = WidthEvolution(policy, every_n_steps=6, example_inputs=torch.zeros(2, 6, device=place))
        trainer(tmp_path, [evolving], **device.trainer()).fit(fresh(), Batches())
        assert evolving.evolver is not None
        assert evolving.evolver.off is None
        assert any(event.changes for event in evolving.evolver.history.events)


def test_what_a_model_is_called_with_may_be_on_the_cpu(device: Device) -> None:
    model, x = network(device), batch(0, 64)[0]
    graph = evolvenet.trace(model, x[:2])
    graph = evolvenet.prune(model, graph, {"0": 12}, batches=[x])
    graph = evolvenet.grow(model, graph, {"4": 18}, batches=[x])
    evolvenet.factorize(model, {"0": 3}, batches=[x])
    evolvenet.compress(model, x[:2], [x, x, x, x], parameters=300)
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {device.place}


def test_tensors_that_are_made_on_the_device_by_default_disturb_nothing(device: Device) -> None:
    x = batch(0, 64)[0].to(device.place)
    found = []
    for place in (torch.device("cpu"), device.place):
        model = network(device)
        evolver = evolvenet.Evolver(
            model, OPTIMIZERS["adam"](model.parameters()), Budget(params=400, by=0.6, lowrank=True), x[:2]
        )
        torch.manual_seed(1)
        with place:
            loop(evolver, device)
            grown = evolvenet.grow(model, evolvenet.trace(model, x[:2]), {"4": 20}, batches=[x])
            evolvenet.allocate(model, grown, parameters=300, batches=[x])
            evolvenet.compress(model, x[:2], [x, x, x, x], parameters=300)
        assert evolver.off is None
        assert [event.skipped for event in evolver.history.events if event.skipped] == []
        found.append([event.sizes for event in evolver.history.events])
    assert found[0] == found[1] or not device.exact


def test_an_average_in_single_precision_goes_along_with_a_model_in_double(tmp_path: Path) -> None:
    evolving = WidthEvolution(Budget(params=300), every_n_steps=5)
    averages = EMAWeightAveraging(decay=0.9)
    trainer(tmp_path, [averages, evolving], precision="64-true", max_epochs=4).fit(fresh(), Batches())
    assert evolving.evolver is not None
    assert evolving.evolver.off is None
    assert [event.skipped for event in evolving.evolver.history.events if event.skipped] == []
    assert any(event.changes for event in evolving.evolver.history.events)
