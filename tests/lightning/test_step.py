"""A LightningModule's steps can be run beside training, and nothing is left of them."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from evolvenet.execution.isolation import model_outputs
from evolvenet.execution.step import Step
from evolvenet.execution.weight_ops import WeightOpMode
from evolvenet.lightning.step import ModuleStep
from evolvenet.measurement.cost import macs


class Manual(LightningModule):
    """Manual optimization, two optimizers, a scheduler, a momentum copy, logs, a metric in a list, a logger's method."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two, self.slow = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(4, 6).requires_grad_(False)
        self.losses: list[float] = []
        self.scale = nn.BatchNorm1d(6)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        scheduler = self.lr_schedulers()

        def closure() -> Tensor:
            loss = F.cross_entropy(self.two(self.scale(self.one(batch[0])).relu()), batch[1])
            self.log("train/loss", loss)
            first.zero_grad()
            self.manual_backward(loss)
            return loss

        loss = first.step(closure=closure)
        self.toggle_optimizer(second)
        again = (self.one(batch[0]) - self.slow(batch[0])).square().mean()
        second.zero_grad()
        self.manual_backward(again)
        self.clip_gradients(second, 1.0, "norm")  # type: ignore[arg-type]
        second.step()
        self.untoggle_optimizer(second)
        scheduler.step()  # type: ignore[union-attr]
        with torch.no_grad():
            for kept, new in zip(self.slow.parameters(), self.one.parameters(), strict=True):
                kept.lerp_(new, 0.5)
        self.losses.append(0.0 if loss is None else float(loss))
        self.logger.experiment.add_scalar("x", 1.0, 0)  # type: ignore[union-attr]

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.log_dict({"val/loss": torch.zeros(())})
        return self.two(self.one(batch[0]))

    def configure_optimizers(self) -> Any:
        first, second = torch.optim.SGD(self.two.parameters(), 0.1), torch.optim.Adam(self.one.parameters())
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 1)]


class Beside(Callback):
    """Runs a step in the middle of training, and keeps what was there before and after."""

    def __init__(self, name: str) -> None:
        self.step = ModuleStep(name)
        self.states: list[Any] = []
        self.found: list[Tensor] = []

    def state(self, trainer: Trainer, module: LightningModule) -> Any:
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
        return copy.deepcopy(
            (
                module.state_dict(),
                grads,
                [optimizer.state_dict() for optimizer in trainer.optimizers],
                [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                module.losses,
                dict(trainer.callback_metrics),
                torch.random.get_rng_state(),
            )
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.states.append(self.state(trainer, pl_module))
            self.found = model_outputs(pl_module, Step(self.step, batch))
            self.states.append(self.state(trainer, pl_module))


@pytest.mark.parametrize("name", ["training_step", "validation_step"])
def test_a_step_beside_training_leaves_nothing_behind(name: str) -> None:
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    beside = Beside(name)
    trainer = Trainer(
        max_epochs=1, callbacks=[beside], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Manual()
    trainer.loggers = [DummyLogger()]
    trainer.fit(module, DataLoader(data, 8))
    before, after = beside.states
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert len(module.losses) == 4
    assert "optimizers" not in vars(module)
    shapes = [tuple(output.shape) for output in beside.found]
    assert shapes == ([(8, 6), (8, 6), (8, 2), (8, 6), (8, 6)] if name == "training_step" else [(8, 6), (8, 2)])


def test_parameters_that_a_step_writes_to_are_known_after_its_first_run() -> None:
    step = ModuleStep()

    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.slow = nn.Linear(2, 2), nn.Linear(2, 2)

        def training_step(self, batch: Tensor) -> Tensor:
            with torch.no_grad():
                self.slow.weight.mul_(0.5)
                self.slow.bias.data = 0.5 * self.slow.bias.data
            return (self.net(batch) - self.slow(batch)).square().mean()

    module = Plain()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    places = [parameter.data_ptr() for parameter in module.parameters()]
    macs(module, Step(step, torch.randn(3, 2)))  # on tensors without data
    for _ in range(2):
        model_outputs(module, Step(step, torch.randn(3, 2)))
        assert step.written == ("slow.weight", "slow.bias")
        torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
        assert [parameter.data_ptr() for parameter in module.parameters()] == places


def test_a_step_that_raises_says_nothing_of_what_it_writes_to() -> None:
    step = ModuleStep()

    class Late(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: Tensor) -> Tensor:
            loss = self.net(batch).sum()
            with torch.no_grad():
                self.net.weight.mul_(0.5)
            return loss

    module = Late()
    before = module.net.weight.clone()
    with pytest.raises(RuntimeError):
        step(module, torch.randn(3, 5))
    assert step.written is None
    step(module, torch.randn(3, 2))
    assert step.written == ("net.weight",)
    torch.testing.assert_close(module.net.weight, before, rtol=0, atol=0)


def test_the_copies_that_a_step_is_guarded_by_are_no_uses_of_weights() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

        def training_step(self, batch: Tensor) -> Tensor:
            return self.net(batch).square().mean()

    network = Plain()
    mode = WeightOpMode(network)
    with torch.no_grad(), mode:
        ModuleStep()(network, torch.randn(8, 2))
    assert mode.other_uses == set()
