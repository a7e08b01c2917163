"""Modules whose forward pass does not say how they are used: the whole training step is traced, and no run ends."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip

import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from evolvenet import Threshold, WidthEvolution
from evolvenet.lightning import evolution as evolution_module

POINTS = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
CLASSES = (POINTS[:, :4].sum(1) > 0).long()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(POINTS, CLASSES), 64)


def fit(module: LightningModule, epochs: int = 3, **options: Any) -> WidthEvolution:
    evolution = WidthEvolution(
        policy=Threshold(prune=0.5, grow=1.0, start=0, cooldown=0), **{"every_n_steps": 3, **options}
    )
    Trainer(
        max_epochs=epochs, callbacks=[evolution], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    ).fit(module, loader())  # fmt: skip
    return evolution


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Base(LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class AutoEncoder(Base):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.mse_loss(self.decoder(self.encoder(batch[0])), batch[0])
        self.log("train/loss", loss)
        return loss


class BackboneAndHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


class Gan(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
        self.critic = nn.Sequential(nn.Linear(16, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()  # type: ignore[misc]
        real, noise = batch[0], torch.randn(len(batch[0]), 8)
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        loss = functional.binary_cross_entropy_with_logits(self.critic(real), ones)
        loss = loss + functional.binary_cross_entropy_with_logits(self.critic(self.generator(noise).detach()), zeros)
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        loss = functional.binary_cross_entropy_with_logits(self.critic(self.generator(noise)), ones)
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.critic.parameters())], []


class FeaturesInTheLoss(Base):
    """Forward is the head on the backbone; the training step also gives the features to a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(16, 64), nn.ReLU()), nn.Linear(64, 2)
        self.projection = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = functional.normalize(self.projection(self.backbone(batch[0])))
        return functional.cross_entropy(self(batch[0]), batch[1]) + (z @ z.T).mean()


@pytest.mark.parametrize(
    ("kind", "widths"),
    [
        (AutoEncoder, {"encoder.0", "encoder.2", "decoder.0"}),
        (BackboneAndHead, {"backbone.0", "backbone.2"}),
        (Gan, {"generator.0", "critic.0"}),
        (FeaturesInTheLoss, {"backbone.0", "projection"}),
    ],
)
def test_every_width_that_the_step_leaves_free_evolves(kind: type[Base], widths: set[str]) -> None:
    torch.manual_seed(0)
    module = kind()
    before = parameters(module)
    evolution = fit(module)
    assert evolution.history is not None
    assert set(evolution.history.initial.sizes) == widths
    assert not [event.skipped for event in evolution.history.events if event.skipped]
    assert parameters(module) < before


def test_example_inputs_of_a_forward_that_training_does_not_call_do_not_hinder() -> None:
    torch.manual_seed(0)
    evolution = fit(module := AutoEncoder(), example_inputs=POINTS[:4])
    assert evolution.history is not None
    assert "decoder.0" in evolution.history.initial.sizes
    assert module.decoder[0].out_features < 64  # type: ignore[union-attr]


class LateHead(Base):
    """An auxiliary head that starts in the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.aux = nn.Linear(16, 64), nn.Linear(64, 32), nn.Linear(32, 2), nn.Linear(32, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.b(self.a(batch[0]).relu()).relu()
        loss = functional.cross_entropy(self.head(hidden), batch[1])
        return loss if self.current_epoch < 1 else loss + functional.mse_loss(self.aux(hidden), batch[0])


def test_what_might_feed_a_head_that_has_not_run_stays_until_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "evolvenet"):
        evolution = fit(module := LateHead(), epochs=4)
    assert "aux has not run on the example inputs, so the size of b stays" in caplog.text
    assert "aux has run for the first time: traced anew" in caplog.text
    assert evolution.history is not None
    assert all(change.width != "b" for event in evolution.history.events if event.step < 4 for change in event.changes)
    assert module.b.out_features < 32
    assert module.aux.in_features == module.head.in_features == module.b.out_features


class ProbeInValidation(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head, self.probe = (
            nn.Sequential(nn.Linear(16, 64), nn.ReLU()),
            nn.Linear(64, 2),
            nn.Linear(64, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/probe", self.probe(self.net(batch[0])).mean())

    def val_dataloader(self) -> Any:
        return loader()


def test_a_probe_of_the_validation_step_is_a_consumer() -> None:
    torch.manual_seed(0)
    fit(module := ProbeInValidation())
    assert module.net[0].out_features < 64  # type: ignore[operator]
    assert module.probe.in_features == module.head.in_features == module.net[0].out_features


class Routes(Base):
    """Two layers of one size, either of which a step may leave out."""

    def __init__(self, plan: list[tuple[bool, bool]]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 2)
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)
        self.plan = plan

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = self.plan[self.global_step % len(self.plan)]
        hidden = self.first(batch[0]).relu()
        hidden = self.one(hidden).relu() if one else hidden
        hidden = self.two(hidden).relu() if two else hidden
        return functional.cross_entropy(self.last(hidden), batch[1])


@settings(max_examples=12)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_no_order_of_modules_ends_a_run(plan: list[tuple[bool, bool]]) -> None:
    torch.manual_seed(0)
    module = Routes(plan)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fit(module, epochs=4, every_n_steps=2, stop=1.0)
    assert module.global_step == 16


class RandomSkip(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.a(batch[0]).relu()
        return functional.cross_entropy(self.c(self.b(hidden).relu() if random.random() < 0.5 else hidden), batch[1])


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_a_random_step_leaves_out_fit_each_other(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    evolution = fit(module := RandomSkip())
    assert evolution.evolver is not None
    assert evolution.evolver.off is None
    assert module.a.out_features == module.b.in_features == module.b.out_features == module.c.in_features < 32


def test_layers_that_only_some_samples_reach_are_traced_from_the_whole_batch(caplog: pytest.LogCaptureFixture) -> None:
    class Sides(Base):
        """One layer for the negative samples, one for the positive ones."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 2)
            self.sides = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24)])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            positive = x[:, 0] > POINTS[:2, 0].max()
            hidden = self.first(x).relu()
            mixed = torch.zeros_like(hidden)
            for layer, chosen in zip(self.sides, (positive, ~positive), strict=True):
                if chosen.any():
                    mixed[chosen] = layer(hidden[chosen]).relu()
            return functional.cross_entropy(self.last(mixed), y)

    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "evolvenet"):
        evolution = fit(module := Sides())
    assert "has not run" not in caplog.text
    assert evolution.history is not None
    assert not [event.skipped for event in evolution.history.events if event.skipped]
    assert module.sides[0].out_features == module.sides[1].out_features == module.last.in_features < 24


@pytest.mark.parametrize("kind", [ZeroDivisionError, RuntimeError, torch.OutOfMemoryError])
def test_an_error_of_the_users_own_is_raised_as_it_is_and_widths_stay(kind: type[Exception]) -> None:
    tries: list[int] = []

    class Fails(AutoEncoder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 8:
                tries.append(self.encoder[0].out_features)  # type: ignore[arg-type]
                raise kind("the user's own")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Fails()
    with pytest.raises(kind, match="the user's own"):
        fit(module)
    assert module.encoder[0].out_features == tries[0] < 64
    assert tries[1:] == ([64] if kind is RuntimeError else [])


def test_with_several_processes_a_step_that_raises_is_not_run_again_and_the_log_says_what_to_do(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    class Fails(AutoEncoder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 8:
                # The others would wait for this rank's gradients.
                monkeypatch.setattr(evolution_module, "process_group", lambda: SimpleNamespace(rank=1, size=2))
                tries.append(self.encoder[0].out_features)  # type: ignore[arg-type]
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fit(Fails())
    assert len(tries) == 1
    assert tries[0] < 64
    assert "A step on rank 1 of 2 has raised RuntimeError after widths had changed" in caplog.text
    assert "Resume from the last checkpoint with WidthEvolution(fixed=[...])" in caplog.text


def test_a_resumed_run_of_a_traced_step_is_the_uninterrupted_one(tmp_path: Path) -> None:
    class StopAfter(Callback):
        """Interrupts a run; its length, of which policies are given shares, stays what it was."""

        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 >= self.epochs

    def run(epochs: int, resume: Path | None = None) -> tuple[AutoEncoder, WidthEvolution]:
        torch.manual_seed(0)
        module = AutoEncoder()
        evolution = WidthEvolution(
            policy=Threshold(prune=0.5, grow=1.0, start=0, cooldown=0), every_n_steps=3, stop=1.0
        )
        trainer = Trainer(
            max_epochs=4, callbacks=[evolution, StopAfter(epochs)], logger=False, enable_checkpointing=False,
            accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, evolution

    whole, history = run(4)
    run(2)
    resumed, again = run(4, tmp_path / "2.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert history.history is not None
    assert again.history is not None
    assert [event.sizes for event in again.history.events] == [event.sizes for event in history.history.events]
