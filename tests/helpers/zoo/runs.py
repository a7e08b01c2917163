"""Short fits of the zoo's modules with `WidthEvolution`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from evolvenet import Threshold, WidthEvolution

POLICY = Threshold(prune=0.05, grow=0.95)
STEPS = 30


def fit(module: LightningModule, steps: int = STEPS, *callbacks: Any, resume: Any = None) -> WidthEvolution:
    """Train a module for some of the optimizer's steps on the CPU, and return the callback."""
    evolution = WidthEvolution(policy=POLICY, every_n_steps=8)
    Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[evolution, *callbacks], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    ).fit(module, ckpt_path=resume)  # fmt: skip
    return evolution


def parameters(module: LightningModule, path: str = "") -> int:
    """The number of parameters in a submodule."""
    return sum(parameter.numel() for parameter in module.get_submodule(path).parameters())
