"""Short fits of the zoo's modules with `WidthEvolution`, saved in the middle, resumed from there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from evolvenet import Threshold, WidthEvolution
from evolvenet._compat.torch import tree_map_only
from tests.helpers.resuming import Randomness
from tests.helpers.zoo.entry import Entry

POLICY = Threshold(prune=0.5, grow=1.0, start=0, cooldown=0)
"""With the default thresholds twenty steps are too few for a unit to become superfluous."""
EPOCHS, SAVED = 5, 3
"""Epochs of a run, and those after which it is saved: an event is due then, and half of its batches are gathered."""


@dataclass(frozen=True)
class Run:
    """A module after its fit.

    Args:
        entry: of the module.
        module: as trained.
        trainer: that trained it.
        evolution: its callback.
        before: {path: parameters of that submodule before the fit}.
        folder: where its checkpoint is.
    """

    entry: Entry
    module: LightningModule
    trainer: Trainer
    evolution: WidthEvolution
    before: dict[str, int]
    folder: Path

    @property
    def state(self) -> dict[str, Any]:
        """All that must be equal after a resumed run."""
        optimizers = [optimizer.state_dict() for optimizer in self.trainer.optimizers]
        assert self.evolution.history is not None
        sizes = [event.sizes for event in self.evolution.history.events]
        return {"module": dict(self.module.state_dict()), "optimizers": optimizers, "sizes": sizes}


def fit(entry: Entry, folder: Path, resume: Path | None = None) -> Run:
    """Train a new module on the CPU, all arguments of `WidthEvolution` but the times of its events at their defaults."""
    torch.manual_seed(0)
    random.seed(0)
    module = entry.module()
    before = {path: parameters(module, path) for path in entry.cut}
    evolution = WidthEvolution(policy=POLICY, every_n_steps=8)
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=SAVED)
    trainer = Trainer(
        max_epochs=EPOCHS, callbacks=[evolution, Randomness(), saving], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    return Run(entry, module, trainer, evolution, before, folder)


def resumed(run: Run) -> Run:
    """The run once more, from its checkpoint on."""
    return fit(run.entry, run.folder, run.folder / f"epoch={SAVED - 1}.ckpt")


def parameters(module: nn.Module, path: str = "") -> int:
    """The number of parameters in a submodule."""
    return sum(parameter.numel() for parameter in module.get_submodule(path).parameters())


@contextmanager
def first_calls(module: LightningModule) -> Iterator[dict[str, tuple[Any, Any]]]:
    """{path: arguments and keyword arguments} of the first call of the module, or of each of its networks, meanwhile."""
    found: dict[str, tuple[Any, Any]] = {}

    def keep(path: str, called: nn.Module, args: Any, kwargs: Any) -> None:
        found.setdefault(path, tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs)))

    networks = {"": module, **dict(module.named_children())}
    handles = [net.register_forward_pre_hook(partial(keep, path), with_kwargs=True) for path, net in networks.items()]
    yield found
    for handle in handles:
        handle.remove()
