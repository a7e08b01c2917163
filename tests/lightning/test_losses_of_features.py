"""Losses that read more than the output: features, weights, gradients. What they read changes, or says why it stays."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip

import itertools
import logging
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, autograd, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from evolvenet import IndexMap, Threshold, WidthEvolution, resize, trace
from evolvenet.execution.step import Step
from evolvenet.lightning.step import ModuleStep

POINTS = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
CLASSES = (POINTS[:, :4].sum(1) > 0).long()


def dense(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Dense layers with an activation between two of them."""
    layers = [part for one, two in itertools.pairwise(sizes) for part in (nn.Linear(one, two), activation())]
    return nn.Sequential(*layers[:-1])


def fit(module: LightningModule, *callbacks: Any) -> WidthEvolution:
    evolution = WidthEvolution(policy=Threshold(prune=0.05, grow=0.8), every_n_steps=3, stop=1.0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    Trainer(
        max_epochs=3, callbacks=[evolution, *callbacks], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    ).fit(module, DataLoader(TensorDataset(POINTS, CLASSES), 64))  # fmt: skip
    return evolution


class Base(LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([each for each in self.parameters() if each.requires_grad], 1e-2)


class Contrastive(Base):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.projector = dense(8, 24, 16), dense(16, 16, 12)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = batch[0] + 0.1, batch[0] * 0.9
        z = torch.cat([functional.normalize(self.projector(self.encoder(x).relu()), dim=1) for x in views])
        alike = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
        return functional.cross_entropy(alike, torch.arange(len(z)).roll(len(z) // 2))


class DistilledByHooks(Base):
    """Features of the student, recorded by a hook and put through a regressor, against those of a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.regressor = dense(8, 24, 20, 2), nn.Linear(20, 32)
        self.teacher = dense(8, 32, 2).requires_grad_(False)
        self.seen: dict[str, Tensor] = {}
        self.student[2].register_forward_hook(lambda module, args, out: self.note(student=out))
        self.teacher[0].register_forward_hook(lambda module, args, out: self.note(teacher=out))

    def note(self, **outputs: Any) -> None:
        self.seen.update(outputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.teacher(batch[0])
        loss = functional.cross_entropy(self.student(batch[0]), batch[1])
        return loss + functional.mse_loss(self.regressor(self.seen["student"]), self.seen["teacher"])


class Perceptual(Base):
    """Differences and Gram matrices of the features of a frozen network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv1d(12, 1, 3, padding=1))
        self.features = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3)).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0][:, None]
        one, two = self.features(self.net(x)), self.features(x).detach()
        style = functional.mse_loss(one @ one.transpose(1, 2), two @ two.transpose(1, 2))
        return functional.l1_loss(one, two) + 0.01 * style


class Anchored(Base):
    """Elastic weight consolidation, its anchors and weights held as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense(8, 24, 16, 2)
        for name, parameter in self.net.named_parameters():
            self.register_buffer(f"anchor_{name}".replace(".", "_"), parameter.detach().clone())

    def anchor(self, name: str) -> Tensor:
        return self.get_buffer(f"anchor_{name}".replace(".", "_"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        apart = [(parameter - self.anchor(name)).square().sum() for name, parameter in self.net.named_parameters()]
        return functional.cross_entropy(self.net(batch[0]), batch[1]) + 0.01 * torch.stack(apart).sum()


class PenalisedWeights(Base):
    """Sums of weights' absolute values and norms of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense(8, 24, 16, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sums = torch.stack([parameter.abs().sum() for parameter in self.net.parameters()]).sum()
        rows = self.net[0].weight.norm(dim=1).sum()  # type: ignore[union-attr,operator]
        return functional.cross_entropy(self.net(batch[0]), batch[1]) + 1e-4 * (sums + rows)


class Physics(Base):
    """The residual of a differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense(2, 24, 24, 1, activation=nn.Tanh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0][:, :2].clone().requires_grad_()
        u = self.net(x)
        (first,) = autograd.grad(u.sum(), x, create_graph=True)
        (second,) = autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return (first[:, 1] - 0.1 * second[:, 0]).square().mean() + (u - x[:, :1].sin()).square().mean()


class Penalised(Base):
    """A Wasserstein GAN's gradient penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = dense(4, 24, 8), dense(8, 24, 16, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for_generator, for_critic = self.optimizers()  # type: ignore[misc]
        real, fake = batch[0], self.generator(batch[0][:, 4:])
        between = (0.3 * real + 0.7 * fake).detach().requires_grad_()
        value = self.critic(between)
        (slope,) = autograd.grad(value, between, torch.ones_like(value), create_graph=True, retain_graph=True)
        penalty = (slope.norm(2, dim=1) - 1).square().mean()
        loss = self.critic(fake.detach()).mean() - self.critic(real).mean() + 10 * penalty
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        for_generator.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        for_generator.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-3) for net in (self.generator, self.critic)]


KINDS: dict[str, tuple[Callable[[], Base], set[str]]] = {
    "contrastive": (Contrastive, {"encoder.0", "encoder.2", "projector.0", "projector.2"}),
    "hooks": (DistilledByHooks, {"student.0", "student.2"}),
    "perceptual": (Perceptual, {"net.0"}),
    "anchors": (Anchored, {"net.0", "net.2"}),
    "weights": (PenalisedWeights, {"net.0", "net.2"}),
    "physics": (Physics, {"net.0", "net.2"}),
    "penalty": (Penalised, {"generator.0", "critic.0", "critic.2"}),
}


def resizable(evolution: WidthEvolution) -> set[str]:
    """Paths in the module of the widths that may change."""
    assert evolution.evolver is not None
    assert evolution._subject is not None
    return {".".join(filter(None, (evolution._subject.path, name))) for name in evolution.evolver.graph.sizes}


@pytest.mark.parametrize("kind", KINDS)
def test_what_such_a_loss_reads_evolves(kind: str) -> None:
    make, widths = KINDS[kind]
    torch.manual_seed(0)
    module = make()
    before = [tuple(parameter.shape) for parameter in module.parameters()]
    evolution = fit(module)
    assert evolution.history is not None
    assert {event.skipped for event in evolution.history.events} == {None}
    assert resizable(evolution) == widths
    assert [tuple(parameter.shape) for parameter in module.parameters()] != before


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_units_is_nothing_to_such_a_loss(kind: str) -> None:
    torch.manual_seed(0)
    module = KINDS[kind][0]().double()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Its optimizers are the trainer's.
    trainer = Trainer(
        max_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(module, DataLoader(TensorDataset(POINTS, CLASSES), 64))
    batch = POINTS[:32].double(), CLASSES[:32]
    graph = trace(module, Step(ModuleStep(), batch))
    assert KINDS[kind][1] <= set(graph.sizes)
    before = ModuleStep()(module, batch)
    orders = {name: IndexMap.of(torch.randperm(size).tolist(), size=size) for name, size in graph.sizes.items()}
    resize(module, graph, orders)
    torch.testing.assert_close(ModuleStep()(module, batch), before, rtol=1e-9, atol=1e-9)


class AnchoredByTensors(Base):
    """The same with anchors that are no buffers, in the step or only in a hook."""

    def __init__(self, in_step: bool) -> None:
        super().__init__()
        self.net, self.in_step = dense(8, 24, 16, 2), in_step
        self.anchors = {name: each.detach().clone() for name, each in self.net.named_parameters()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.in_step:
            return loss
        return loss + 0.01 * (self.net[0].weight - self.anchors["0.weight"]).square().sum()  # type: ignore[operator]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self.in_step:
            with torch.no_grad():
                for name, parameter in self.net.named_parameters():
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter - self.anchors[name], alpha=0.01)


@pytest.mark.parametrize("in_step", [True, False])
def test_anchors_that_no_change_reaches_keep_the_widths(in_step: bool) -> None:
    torch.manual_seed(0)
    evolution = fit(AnchoredByTensors(in_step))
    assert evolution.evolver is not None
    assert resizable(evolution) == set()
    assert evolution.evolver.graph.reasons


class Average(lightning.Callback):
    """A moving average by hand, as a list of tensors in an object of its own."""

    class Shadow:
        def __init__(self, module: nn.Module) -> None:
            self.values = [parameter.detach().clone() for parameter in module.parameters()]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.shadow = self.Shadow(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **options: Any) -> None:
        for kept, new in zip(self.shadow.values, pl_module.parameters(), strict=True):
            kept.lerp_(new.detach(), 0.1)


def test_an_average_by_hand_keeps_the_widths_and_the_run_goes_on() -> None:
    torch.manual_seed(0)
    evolution = fit(PenalisedWeights(), Average())
    assert evolution.evolver is not None
    assert resizable(evolution) == set()
    reasons = {str(width.frozen) for width in evolution.evolver.graph.widths.values()}
    assert any("Average.shadow.values holds a copy of" in reason for reason in reasons)
