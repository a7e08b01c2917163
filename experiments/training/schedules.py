"""Learning rates over a run: `scheduler=cosine` and the others; each takes an optimizer and the run's number of steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler


def constant(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The optimizer's learning rate to the end."""
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=steps)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the optimizer's learning rate to 0 as a cosine."""
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))


def one_cycle(optimizer: Optimizer, steps: int, rise: float = 0.3) -> LRScheduler:
    """Up to the optimizer's learning rate and down again (Smith and Topin 2018).

    Args:
        optimizer: its learning rates are the highest.
        steps: of the run.
        rise: share of the run in which the rate rises, 0 … 1.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    return lr_scheduler.OneCycleLR(optimizer, rates, total_steps=max(1, steps), pct_start=rise, cycle_momentum=False)


def step(optimizer: Optimizer, steps: int, at: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> LRScheduler:
    """Times a factor at some places.

    Args:
        optimizer: its learning rates are those of the beginning.
        steps: of the run.
        at: shares of the run, 0 … 1.
        factor: by which the rate is multiplied at each.
    """
    return lr_scheduler.MultiStepLR(optimizer, [round(share * steps) for share in at], factor)
