"""Inside `Trainer.fit`: schedulers, manual optimization, accumulation, clipping and precisions, none of them the wiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from evolvenet import WidthEvolution
from tests.helpers.optimizer_checks import check_fits
from tests.helpers.policies import InTurn

SIZES = ({"net.0": 7, "net.2": 6}, {"net.0": 11, "net.2": 9}, {"net.0": 5, "net.2": 8})
"""Shrink, grow, and at last one of each."""
STEPS = 36


class Net(lightning.LightningModule):
    """Knows nothing of EvolveNet; writes down its losses and what every group of its optimizers is set to."""

    def __init__(self, optimizer: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__()
        normed = nn.Sequential(nn.BatchNorm1d(9), nn.Tanh())
        self.net = nn.Sequential(nn.Linear(6, 9), normed, nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
        self.make = optimizer or (lambda model: torch.optim.AdamW(model.parameters(), lr=0.01))
        self.losses: list[float] = []
        self.settings: list[list[dict[str, Any]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        self.settings.append(
            [
                {key: value for key, value in group.items() if key != "params"}
                for optimizer in self.trainer.optimizers
                for group in optimizer.param_groups
            ]
        )
        x, y = batch
        loss = nn.functional.cross_entropy(self(x).float(), y)
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("steady", 1.0)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make(self)


class Checks(lightning.Callback):
    """After every batch: what the optimizers hold fits."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
        check_fits(trainer.optimizers)


def fit(tmp_path: Path, model: Net, evolve: bool = True, every: int = 5, sizes: Any = SIZES, **options: Any) -> Net:
    """Train through all sizes, or without any event."""
    torch.manual_seed(3)
    evolution = WidthEvolution(InTurn(*sizes), every_n_steps=every, stop=1.0)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    callbacks = [*([evolution] if evolve else []), Checks(), *options.pop("callbacks", [])]
    identities = [id(parameter) for parameter in model.parameters()]
    trainer = lightning.Trainer(callbacks=callbacks, **{**settings, **options})
    trainer.fit(model, loader())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert torch.tensor(model.losses).isfinite().all()
    if evolve:
        assert evolution.history is not None
        assert not [event.skipped for event in evolution.history.events if event.skipped]
        changed = [event.sizes for event in evolution.history.events if event.changes]
        assert [{name: found[name] for name in SIZES[0] if name in sizes[0]} for found in changed] == list(sizes)
        assert model.net[4].weight.shape == (3, sizes[-1]["net.2"])
    return model


def loader() -> DataLoader:
    """Ten batches, which is no multiple of what is accumulated."""
    x = torch.randn(320, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)


SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, factor=0.1, total_iters=7), schedules.ExponentialLR(o, gamma=0.9)], optimizer=o
    ),
    "ConstantLR": lambda o: schedules.ConstantLR(o, factor=0.3, total_iters=11),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=10),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "CyclicLR": lambda o: schedules.CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=4, cycle_momentum=True),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, gamma=0.95),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: schedules.LinearLR(o, total_iters=20),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, milestones=[3, 12, 21]),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.05, total_steps=STEPS + 4, cycle_momentum=True),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, total_iters=30, power=2),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=3, factor=0.5),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=8), schedules.StepLR(o, 3)], milestones=[8]
    ),
    "StepLR": lambda o: schedules.StepLR(o, step_size=6),
}
"""Each so that it changes the learning rate within the run."""
CYCLE_MOMENTUM = {"CyclicLR", "OneCycleLR"}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    found = {
        each.__name__
        for each in vars(schedules).values()
        if inspect.isclass(each) and issubclass(each, LRScheduler) and each.__name__.strip("_") != "LRScheduler"
    }
    assert found == set(SCHEDULERS)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "adamw") for name in SCHEDULERS), *((name, "sgd") for name in sorted(CYCLE_MOMENTUM))]
)
def test_schedulers_do_step_by_step_as_without_events(name: str, kind: str, tmp_path: Path) -> None:
    def make(model: nn.Module) -> Any:
        optimizer = OPTIMIZERS[kind](model)
        plan = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step", "monitor": "steady"}
        return {"optimizer": optimizer, "lr_scheduler": plan}

    with_events, without = (fit(tmp_path, Net(make), evolve) for evolve in (True, False))
    assert with_events.settings == without.settings
    assert len(with_events.settings) == STEPS
    assert with_events.settings[0] != with_events.settings[-1]
    if name in CYCLE_MOMENTUM:
        cycled = "betas" if kind == "adamw" else "momentum"
        assert len({groups[0][cycled] for groups in with_events.settings}) > 3
    assert with_events.losses != without.losses


class Manual(Net):
    """Two optimizers that take turns, a scheduler each, gradients clipped by hand."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate

    def configure_optimizers(self) -> Any:
        made = [
            torch.optim.SGD([*self.net[0].parameters(), *self.net[2].parameters()], lr=0.05, momentum=0.9),
            torch.optim.Adam(self.net[4].parameters(), lr=0.01, fused=True),
        ]
        return made, [schedules.StepLR(each, step_size=4) for each in made]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for index, (optimizer, scheduler) in enumerate(zip(optimizers, self.schedulers(), strict=True)):
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch) / self.accumulate)
            if (batch_idx + 1) % self.accumulate == 0:
                self.clip_gradients(optimizer, 0.5, "value" if index else "norm")
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            self.untoggle_optimizer(optimizer)
        assert all(parameter.requires_grad for parameter in self.parameters())

    def schedulers(self) -> list[Any]:
        found: Any = self.lr_schedulers()
        return found


@pytest.mark.parametrize("accumulate", [1, 3])
def test_manual_optimization_with_several_optimizers(accumulate: int, tmp_path: Path) -> None:
    with_events, without = (
        fit(tmp_path, Manual(accumulate), evolve, every=8, max_steps=2 * STEPS) for evolve in (True, False)
    )
    assert with_events.settings == without.settings
    assert with_events.settings[0] != with_events.settings[-1]


@pytest.mark.parametrize("accumulate", [3, 4, 10])
def test_gradients_accumulated_over_batches(accumulate: int, tmp_path: Path) -> None:
    model = fit(tmp_path, Net(), accumulate_grad_batches=accumulate, max_steps=20)
    assert len(model.losses) > 2 * 20


def test_an_accumulation_that_changes_on_the_way(tmp_path: Path) -> None:
    fit(tmp_path, Net(), callbacks=[GradientAccumulationScheduler({0: 1, 1: 3, 3: 2})])


class KeepsGradients(Net):
    """Zeroes its gradients in place, so that every event finds some."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step:
            assert all(parameter.grad is not None for parameter in self.parameters())


def test_gradients_that_are_zeroed_in_place(tmp_path: Path) -> None:
    fit(tmp_path, KeepsGradients())


class Clipped(Net):
    """Writes down how large its gradients are once they are clipped."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.largest: list[float] = []

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        order = 2.0 if gradient_clip_algorithm == "norm" else float("inf")
        self.largest.append(float(nn.utils.get_total_norm(gradients, order)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_gradients(algorithm: str, precision: Any, tmp_path: Path) -> None:
    model = fit(
        tmp_path,
        Clipped(),
        gradient_clip_val=0.01,
        gradient_clip_algorithm=algorithm,
        precision=precision,
        max_steps=24,
    )
    assert model.largest == pytest.approx([0.01] * 24, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("bf16-mixed", torch.float32),
        ("16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_precisions(precision: Any, kind: torch.dtype, fused: bool, tmp_path: Path) -> None:
    model = fit(
        tmp_path,
        Net(lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)),
        precision=precision,
    )
    optimizer: Any = model.optimizers(use_pl_optimizer=False)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert {parameter.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {kind}
    assert sum(model.losses[-5:]) < sum(model.losses[:5])


class Prepared(Net):
    """Calls its network, not itself, with what autocast has already made of the batch."""

    mixing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.eye(6).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x @ self.mixing)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_inputs_that_autocast_has_made(precision: Any, tmp_path: Path) -> None:
    class ByChild(Prepared):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.forward(x).float(), y)
            self.losses.append(float(loss.detach()))
            return loss

    fit(tmp_path, ByChild(), precision=precision)


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_half_precision_with_a_scaler(algorithm: str | None, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)
    clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm} if algorithm else {}
    model = fit(tmp_path, Net(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **clipping)
    assert scaler.get_scale() > 256
    assert sum(model.losses[-5:]) < sum(model.losses[:5])


@pytest.mark.parametrize("options", [{"detect_anomaly": True}, {"deterministic": True}], ids=str)
def test_what_a_trainer_switches_on(options: dict[str, Any], tmp_path: Path) -> None:
    try:
        fit(tmp_path, Net(), **options)
        assert not torch.is_anomaly_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3),
        lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
        lambda model: torch.optim.Rprop(model.parameters(), lr=1e-3),
        lambda model: torch.optim.ASGD(model.parameters(), lr=0.01, t0=4),
    ],
    ids=["lbfgs", "adafactor", "rprop", "asgd"],
)
def test_optimizers_that_keep_other_things_than_momenta(make: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    fit(tmp_path, Net(make))


def test_frozen_groups_stay_frozen_and_decay_groups_apart(tmp_path: Path) -> None:
    seen: list[tuple[Any, Tensor]] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((pl_module.net[0].weight, pl_module.net[0].weight.detach().clone()))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
            assert torch.equal(*seen[-1])

    def make(model: Any) -> torch.optim.Optimizer:
        frozen = [*model.net[0].requires_grad_(False).parameters()]
        rest = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": frozen, "weight_decay": 0.5},
            {"params": [parameter for parameter in rest if parameter.dim() > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in rest if parameter.dim() == 1], "weight_decay": 0.0},
        ]
        model.groups = [[id(parameter) for parameter in group["params"]] for group in groups]
        return torch.optim.AdamW(groups, lr=0.01)

    # What is frozen keeps its sizes.
    sizes = [{"net.2": each["net.2"]} for each in SIZES]
    model: Any = fit(tmp_path, Net(make), callbacks=[Watch()], sizes=sizes)
    assert model.net[0].weight.shape == (9, 6)
    optimizer: Any = model.optimizers(use_pl_optimizer=False)
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == model.groups
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.1, 0.0]
    assert not any(p.requires_grad or p.grad is not None or p in optimizer.state for p in model.net[0].parameters())
    assert {len(value) for _, value in seen} == {9}
