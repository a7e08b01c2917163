"""The private names of Lightning that the package relies on, each reached in this module alone.

Imported by `evolvenet.lightning` only: importing it imports Lightning. `tests/test_compat.py` has one test for each name.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from evolvenet._compat.wrapping import Place

EXTRA_RESULTS: Place = (_MultiProcessingLauncher, "get_extra_results")
"""`get(launcher, trainer)`: what a process that trained hands to the main process beside its weights."""
RECOVER_RESULTS: Place = (_MultiProcessingLauncher, "_recover_results_in_main_process")
"""`recover(launcher, worker_output, trainer)`: loads what that process handed over."""


def forget_static_graph(strategy: DDPStrategy) -> None:
    """After `configure_ddp`: the wrapper is new, so the first backward pass under `static_graph` is still to come."""
    strategy._pl_static_graph_delay_done = False


def communication_state(strategy: DDPStrategy) -> object | None:
    """What the strategy's communication hook keeps."""
    return strategy._ddp_comm_state


def summary_depth(summary: ModelSummary) -> int:
    """How deep a summary lists modules: 0 for not at all, -1 for all."""
    return summary._max_depth


def batches_stepped(trainer: Trainer) -> int:
    """How many batches of this fit have been trained on, whatever number of optimizers stepped on each."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, or None, where the public property raises."""
    return module._trainer
