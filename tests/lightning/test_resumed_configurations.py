"""Random configurations of runs, stopped at a random step and resumed: the end is that of the whole run, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from evolvenet import Budget, Price, Threshold, WidthEvolution
from tests.helpers.policies import ShrinkThenGrow
from tests.helpers.resuming import Randomness, assert_same
from tests.helpers.runs import Batches, Classifier, trainer

POLICIES: dict[str, Callable[[], Any]] = {
    "fixed walk": ShrinkThenGrow,
    "threshold": lambda: Threshold(prune=0.05, grow=0.9),
    "budget": lambda: Budget(params=300, by=0.7),
    "price": lambda: Price(5e-4),
    "ranks": lambda: Budget(params=300, by=0.7, lowrank=True),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True),
}


class Configured(Classifier):
    """Layers, an optimizer and a schedule as drawn."""

    def __init__(self, width: int, norm: str, optimizer: str) -> None:
        super().__init__(width)
        self.chosen = optimizer
        layer = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda _: nn.Identity()}[norm]
        self.net[1] = layer(width)

    def configure_optimizers(self) -> Any:
        """The drawn one, with a schedule."""
        optimizer = OPTIMIZERS[self.chosen](self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Configuration:
    """One run as drawn from a seed; each call of `fit` makes everything anew."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        names = list(POLICIES)
        self.policy = names[seed % len(names)]
        self.model = {"width": draw.choice((12, 16, 20)), "norm": draw.choice(("batch", "layer", "none"))}
        self.model["optimizer"] = draw.choice(list(OPTIMIZERS))
        self.evolution: dict[str, Any] = {
            "calibration_batches": draw.choice((1, 2, 3)), "seed": draw.randrange(9), "stop": 1.0,
            "multiple": draw.choice((1, 1, 2)), "fixed": draw.choice(((), ("net.4",))),
            **draw.choice(({"every_n_steps": 4}, {"every_n_steps": 3}, {"every_n_epochs": 1})),
        }  # fmt: skip
        self.trainer = {
            "accumulate_grad_batches": draw.choice((1, 1, 2)),
            "gradient_clip_val": draw.choice((None, 1.0)),
        }
        self.averaged = draw.random() < 0.3
        self.count, self.epochs = draw.choice((5, 6, 8)), 2
        steps = -(-self.count // self.trainer["accumulate_grad_batches"]) * self.epochs
        self.stopped = draw.randrange(1, steps)

    def __repr__(self) -> str:
        return str(vars(self))

    def fit(self, folder: Path, ckpt: Path | None = None) -> dict[str, Any]:
        """Train, and return all that two runs have to agree on."""
        torch.manual_seed(7)
        random.seed(7)
        model, evolution = Configured(**self.model), WidthEvolution(POLICIES[self.policy](), **self.evolution)
        keeper = ModelCheckpoint(folder, every_n_train_steps=self.stopped, save_top_k=-1, filename="{step}")
        averages = [EMAWeightAveraging(decay=0.9)] if self.averaged else []
        fitting = trainer(folder, [Randomness(), evolution, *averages, keeper], max_epochs=self.epochs, **self.trainer)
        fitting.fit(model, Batches(self.count), ckpt_path=ckpt, weights_only=True)
        assert evolution.history is not None
        assert evolution.evolver is not None
        events = [(event.step, event.changes, event.sizes, event.skipped) for event in evolution.history.events]
        return {
            "model": dict(model.state_dict()),
            "optimizer": fitting.optimizers[0].state_dict(),
            "random": torch.random.get_rng_state(),
            "events": events,
            "sizes": evolution.evolver.graph.sizes,
        }


@pytest.mark.parametrize(
    "seeds", [range(9), *(pytest.param(range(k, k + 9), marks=pytest.mark.long) for k in range(9, 90, 9))], ids=str
)
def test_a_run_of_any_configuration_resumes_to_the_same_end(seeds: range, tmp_path: Path) -> None:
    changed = 0
    for seed in seeds:
        run = Configuration(seed)
        whole = run.fit(tmp_path / f"{seed}")
        changed += any(changes for _, changes, _, _ in whole["events"])
        resumed = run.fit(tmp_path / f"{seed} again", tmp_path / f"{seed}" / f"step={run.stopped}.ckpt")
        try:
            assert_same(resumed, whole)
        except AssertionError as error:
            raise AssertionError(f"{seed}: {run}") from error
    assert changed >= len(seeds) / 3  # a configuration may find nothing to change
