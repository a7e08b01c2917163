"""Teachers, targets, momentum copies and frozen parts that run in the training step beside what is trained."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from evolvenet import Threshold, WidthEvolution

POINTS = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
CLASSES = (POINTS[:, :4].sum(1) > 0).long()


def dense(*sizes: int) -> nn.Sequential:
    """Dense layers with a ReLU between two of them."""
    layers = [part for one, two in itertools.pairwise(sizes) for part in (nn.Linear(one, two), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def fit(module: LightningModule, epochs: int = 3, ckpt: Path | None = None, **options: Any) -> WidthEvolution:
    policy = options.pop("policy", Threshold(prune=0.5, grow=1.0, start=0, cooldown=0))
    evolution = WidthEvolution(policy=policy, every_n_steps=3, stop=1.0, **options)
    trainer = Trainer(
        max_epochs=epochs, callbacks=[evolution], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer.fit(module, DataLoader(TensorDataset(POINTS, CLASSES), 64), ckpt_path=ckpt)
    return evolution


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


def resizable(evolution: WidthEvolution) -> set[str]:
    """Paths in the module of the widths that may change."""
    assert evolution.evolver is not None
    assert evolution._subject is not None
    return {".".join(filter(None, (evolution._subject.path, name))) for name in evolution.evolver.graph.sizes}


def moving(copy: nn.Module, source: nn.Module, share: float = 0.2) -> None:
    with torch.no_grad():
        for kept, new in zip(copy.parameters(), source.parameters(), strict=True):
            kept.lerp_(new, share)


class Base(LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Byol(Base):
    """Online encoder, projector and predictor; a target of the first two, moved in the step, or by a hook."""

    def __init__(self, in_step: bool = False, requires_grad: bool = False) -> None:
        super().__init__()
        self.in_step = in_step
        self.encoder, self.projector, self.predictor = dense(8, 24, 16), dense(16, 20, 12), dense(12, 14, 12)
        self.slow_encoder, self.slow_projector = copy.deepcopy(self.encoder), copy.deepcopy(self.projector)
        for slow in (self.slow_encoder, self.slow_projector):
            slow.requires_grad_(requires_grad)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = batch[0] + 0.1, batch[0] * 0.9
        with torch.no_grad():
            goal = self.slow_projector(self.slow_encoder(two).relu())
        loss = -functional.cosine_similarity(self.predictor(self.projector(self.encoder(one).relu())), goal).mean()
        if self.in_step:
            self.move()
        return loss

    def move(self) -> None:
        moving(self.slow_encoder, self.encoder)
        moving(self.slow_projector, self.projector)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if not self.in_step:
            self.move()

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.slow_encoder, self.encoder), (self.slow_projector, self.projector)]


class Dqn(Base):
    """A target network that takes the online one's weights now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = dense(8, 24, 16, 3), dense(8, 24, 16, 3)
        self.target.load_state_dict(self.online.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        value = self.online(batch[0]).gather(1, batch[1][:, None]).squeeze(1)
        with torch.no_grad():
            following = self.target(batch[0].roll(1, 0)).amax(1)
        if self.global_step % 2 == 0:
            self.target.load_state_dict(self.online.state_dict())
        return functional.smooth_l1_loss(value, 0.9 * following + batch[0][:, 0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.online.parameters(), 1e-2)

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.target, self.online)]


class Twins(Base):
    """Two critics of one shape with a target each, and an actor."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.actor, self.one, self.two = dense(8, 16, 3), dense(11, 16, 1), dense(11, 16, 1)
        self.slow_one, self.slow_two = copy.deepcopy(self.one), copy.deepcopy(self.two)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_actor, for_critics = self.optimizers()  # type: ignore[misc]
        seen = torch.cat([batch[0], torch.rand(len(batch[0]), 3)], 1)
        with torch.no_grad():
            then = torch.cat([batch[0], self.actor(batch[0]).tanh()], 1)
            goal = batch[0][:, :1] + torch.min(self.slow_one(then), self.slow_two(then))
        loss = functional.mse_loss(self.one(seen), goal) + functional.mse_loss(self.two(seen), goal)
        for_critics.zero_grad()
        self.manual_backward(loss)
        for_critics.step()
        for_actor.zero_grad()
        self.manual_backward(-self.one(torch.cat([batch[0], self.actor(batch[0]).tanh()], 1)).mean())
        for_actor.step()
        moving(self.slow_one, self.one)
        moving(self.slow_two, self.two)

    def configure_optimizers(self) -> Any:
        critics = [*self.one.parameters(), *self.two.parameters()]
        return [torch.optim.Adam(self.actor.parameters(), 1e-2), torch.optim.Adam(critics, 1e-2)]

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.slow_one, self.one), (self.slow_two, self.two)]


class AveragedGenerator(Base):
    """A GAN with an average of its generator that the step does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = dense(4, 24, 8), dense(8, 24, 1)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(batch[0]), 4)
        loss = functional.softplus(-self.critic(batch[0])) + functional.softplus(self.critic(self.generator(noise)))
        for_critic.zero_grad()
        self.manual_backward(loss.mean())
        for_critic.step()
        for_generator.zero_grad()
        self.manual_backward(functional.softplus(-self.critic(self.generator(noise))).mean())
        for_generator.step()

    def on_train_batch_end(self, *unused: Any, **options: Any) -> None:
        moving(self.average, self.generator)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.generator, self.critic)]

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.average, self.generator)]


class Contrast(Base):
    """MoCo: a momentum encoder and a queue of its outputs."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = dense(8, 24, 12)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(12, 128), dim=0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        queries = functional.normalize(self.net(batch[0] + 0.1), dim=1)
        with torch.no_grad():
            moving(self.slow, self.net)
            keys = functional.normalize(self.slow(batch[0]), dim=1)
        alike = torch.einsum("nc,nc->n", queries, keys)[:, None]
        others = torch.einsum("nc,ck->nk", queries, self.queue.clone().detach())
        with torch.no_grad():
            self.queue[:, : len(keys)] = keys.T
        return functional.cross_entropy(torch.cat([alike, others], 1), torch.zeros(len(keys), dtype=torch.long))

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.slow, self.net)]


KINDS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "byol": (Byol, {"encoder.0", "encoder.2", "projector.0", "projector.2", "predictor.0"}),
    "byol, in the step": (
        lambda: Byol(in_step=True),
        {"encoder.0", "encoder.2", "projector.0", "projector.2", "predictor.0"},
    ),
    "byol, of parameters that require gradients": (
        lambda: Byol(requires_grad=True),
        {"encoder.0", "encoder.2", "projector.0", "projector.2", "predictor.0"},
    ),
    "dqn": (Dqn, {"online.0", "online.2"}),
    "twins": (Twins, {"actor.0", "one.0", "two.0"}),
    "averaged generator": (AveragedGenerator, {"generator.0", "critic.0"}),
    "contrast": (Contrast, {"net.0", "net.2"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_that_follow_change_with_what_they_follow(kind: str) -> None:
    make, widths = KINDS[kind]
    torch.manual_seed(0)
    module = make()
    before = [shapes(source) for _, source in module.pairs()]
    evolution = fit(module)
    assert evolution.history is not None
    assert {event.skipped for event in evolution.history.events} == {None}
    assert resizable(evolution) == widths
    for (follower, source), first in zip(module.pairs(), before, strict=True):
        assert shapes(follower) == shapes(source) != first


def test_a_resumed_run_with_a_target_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> Byol:
        torch.manual_seed(0)
        evolution = fit(module := Byol(), epochs, resume)
        assert evolution._module is None
        module.trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = run(4)
    run(2)
    resumed = run(4, tmp_path / "2.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


class Distilled(Base):
    """A student, and a teacher of another shape that the optimizer may hold."""

    def __init__(self, held: bool = False, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.held = held
        self.student, self.teacher = dense(8, 24, 2), (teacher or dense(8, 40, 20, 2)).requires_grad_(held)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            goal = self.teacher(batch[0]).softmax(1)
        answer = self.student(batch[0])
        loss = functional.cross_entropy(answer, batch[1])
        return loss + functional.kl_div(answer.log_softmax(1), goal, reduction="batchmean")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((self if self.held else self.student).parameters(), 1e-2)


@pytest.mark.parametrize("held", [False, True])
def test_a_teacher_keeps_its_widths_and_its_weights(held: bool) -> None:
    torch.manual_seed(0)
    module = Distilled(held)
    before = copy.deepcopy(module.teacher.state_dict())
    evolution = fit(module)
    assert resizable(evolution) == {"student.0"}
    assert module.student[0].out_features != 24
    torch.testing.assert_close(module.teacher.state_dict(), before, rtol=0, atol=0)
    if held:
        assert evolution.evolver is not None
        reason = evolution.evolver.graph.widths["teacher.0"].frozen
        assert reason == "teacher.0.weight is not trained (no step has changed it so far), so its layer keeps its sizes"


def test_a_teacher_of_the_students_own_shape_that_stays_is_no_copy() -> None:
    torch.manual_seed(0)
    module = Distilled(teacher=dense(8, 24, 2))
    fit(module)
    assert module.student[0].out_features != 24
    assert module.teacher[0].out_features == 24  # type: ignore[index]


def test_a_copy_that_did_not_begin_as_one_is_found_when_it_moves() -> None:
    class Late(Byol):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            pass

        def on_train_batch_end(self, *unused: Any, **options: Any) -> None:
            self.move()

    torch.manual_seed(0)
    module = Late()
    for parameter in (*module.slow_encoder.parameters(), *module.slow_projector.parameters()):
        nn.init.normal_(parameter, std=0.1)
    evolution = fit(copy.deepcopy(module))
    assert resizable(evolution) == {"predictor.0"}
    assert evolution.evolver is not None
    reason = str(evolution.evolver.graph.widths["encoder.0"].frozen)
    assert "slow_encoder, which is not trained, has moved and may follow it" in reason
    assert "copies={'slow_encoder': 'encoder'}" in reason

    evolution = fit(module, copies={"slow_encoder": "encoder", "slow_projector": "projector"})
    assert resizable(evolution) == KINDS["byol"][1]
    assert shapes(module.slow_encoder) == shapes(module.encoder)


class FineTuned(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = dense(8, 24, 16).requires_grad_(False), dense(16, 24, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).relu())


def test_a_frozen_backbone_keeps_its_widths_and_the_head_on_it_evolves() -> None:
    torch.manual_seed(0)
    module = FineTuned()
    before = copy.deepcopy(module.backbone.state_dict())
    evolution = fit(module)
    assert resizable(evolution) == {"head.0"}
    assert module.head[0].out_features != 24
    torch.testing.assert_close(module.backbone.state_dict(), before, rtol=0, atol=0)
    assert evolution.evolver is not None
    assert "backbone.2.weight is not trained (requires_grad is False)" in str(
        evolution.evolver.graph.widths["backbone.2"].frozen
    )
