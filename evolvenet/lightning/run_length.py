"""How long a run of Lightning is, how much of it is done, and whether an event falls into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from evolvenet._compat.lightning import batches_stepped
from evolvenet.engine.distributed import process_group
from evolvenet.engine.run_checks import UNKNOWN_LENGTH, no_event_possible
from evolvenet.policies.schedule import Schedule


def progress_of(trainer: Trainer) -> float:
    """The share of the run that is done, 0 … 1, whatever ends it first.

    In the epochs' batches, in `max_steps` (the steps of all optimizers), in whole epochs where a data loader has no length,
    or in `max_time`; 0 where nothing of it is known.
    """
    share = min(1.0, max(_shares(trainer), default=0.0))
    # Two processes' clocks differ.
    return process_group().broadcast(share) if _timers(trainer) else share


def length_problem(trainer: Trainer, module: LightningModule, schedule: Schedule) -> str | None:
    """Why no event falls into the run, or no policy knows how much of it is done, and what to do; None if neither is so.

    Args:
        trainer: at the start of its fit.
        module: that it trains.
        schedule: when events come due.
    """
    steps, epoch_steps = None, None
    # Under manual optimization a batch may have any number of steps.
    if module.automatic_optimization:
        estimated = trainer.estimated_stepping_batches
        steps = estimated if 0 < estimated < math.inf else None
        batches = trainer.num_training_batches
        epoch_steps = math.ceil(batches / trainer.accumulate_grad_batches) if batches < math.inf else None
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    problem = no_event_possible(schedule, steps, epoch_steps, epochs, later=1)
    if problem is not None and trainer.fast_dev_run:  # type: ignore[attr-defined]
        return f"{problem} Or leave fast_dev_run={trainer.fast_dev_run} out, which ends the run so early."  # type: ignore[attr-defined]
    if problem is None and not any(True for _ in _shares(trainer)):
        return UNKNOWN_LENGTH.format(stop=schedule.stop)
    return problem


def skipped_validation(trainer: Trainer, resumed: Mapping[str, Any]) -> str | None:
    """Why the last cut is judged later than in the uninterrupted run; None if it is not.

    A checkpoint that is saved right after a batch holds no result of the validation that follows the batch, and Lightning does
    not run that validation after a resume.

    Args:
        trainer: that has read a checkpoint.
        resumed: what the callback saved in it.
    """
    pending = resumed["evolver"].get("pending_cut") or {}
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
    # Lightning counts the batches of the run where no epochs are given, and those of the present epoch where they are.
    done = (progress.total if epochs is None else progress.current).processed
    due = bool(done and every) and every != math.inf and done % int(every or 1) == 0
    due = due and (epochs is None or (trainer.current_epoch + 1) % epochs == 0)
    if not (due and trainer.enable_validation and pending.get("past") and resumed.get("metric") is None):
        return None
    return (
        f"The checkpoint was saved after batch {done}, before the validation that follows it. Lightning does not run that one "
        "after a resume, so the last cut is judged by the next validation, and the run may end otherwise than the "
        "uninterrupted one. Resume from a checkpoint that was saved after a validation, or before the last batch, for the same "
        "decisions."
    )


def _shares(trainer: Trainer) -> Iterator[float]:
    """The share that is done by each measure that is known."""
    steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
    if math.isfinite(trainer.num_training_batches):
        if 0 < steps < math.inf:
            yield batches_stepped(trainer) / steps
    elif epochs is not None and epochs > 1:
        yield trainer.current_epoch / epochs
    if trainer.max_steps > 0:
        yield trainer.global_step / trainer.max_steps
    for timer in _timers(trainer):
        elapsed, remaining = timer.time_elapsed(), timer.time_remaining()
        if remaining is not None and elapsed + remaining > 0:
            yield elapsed / (elapsed + remaining)


def _timers(trainer: Trainer) -> list[Timer]:
    """What ends the run after a time: `Trainer(max_time=…)` adds one."""
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
    return [timer for timer in timers if timer.time_remaining() is not None]
