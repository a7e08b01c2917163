"""A LightningModule's training or validation step as a function of the module and a batch that leaves nothing behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from evolvenet._compat.lightning import trainer_of
from evolvenet._compat.torch import unseen_by_modes, version_of

MUTED = ("log", "log_dict", "print", "manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")
"""Methods of a LightningModule that do nothing in a step beside training."""


class ModuleStep:
    """Runs one of a LightningModule's steps on a batch, for an `execution.step.Step`.

    Logs, optimizers, schedulers and backward passes do nothing meanwhile. Parameters that the step writes to itself, as a
    momentum teacher's are, are found in its first run and are as before after each.

    Args:
        name: "training_step" or "validation_step".
        index: the step is told of its batch: some do something else on every n-th.
    """

    def __init__(self, name: str = "training_step", index: int = 0) -> None:
        self.name, self.index = name, index
        self.written: tuple[str, ...] | None = None

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        """What the step returns."""
        assert isinstance(module, LightningModule)
        parameters = dict(module.named_parameters())
        names = parameters if self.written is None else self.written
        before = {name: _Saved.of(parameters[name]) for name in names}
        done = False
        try:
            with without_effects(module):
                returned = _called(getattr(module, self.name), batch, self.index)
            done = True
            return returned
        finally:
            changed = tuple(name for name, saved in before.items() if saved.restore(parameters[name]))
            # Tensors without data show no writes by `.data = …`, so a run on them says nothing of the next one; nor does
            # a run that raised before it was through.
            if done and not any(parameters[name].is_meta for name in names):
                self.written = changed


@dataclass(frozen=True)
class _Saved:
    """A parameter's values, and the memory that it had, which `parameter.data = …` takes from it.

    That is kept until the step is over: other tensors must not be found where a weight is expected.
    """

    version: int
    data: Tensor
    value: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter) -> _Saved:
        # A dispatch mode that records what the step does with its weights must not take this copy for a use of them.
        with unseen_by_modes():
            return cls(version_of(parameter), parameter.data, parameter.detach().clone())

    def restore(self, parameter: nn.Parameter) -> bool:
        """Put the values back; whether they may have changed."""
        moved = parameter.data_ptr() != self.data.data_ptr()
        if moved:
            parameter.data = self.data
        if moved or version_of(parameter) != self.version:
            with torch.no_grad(), unseen_by_modes():
                parameter.copy_(self.value)
            return True
        return False


def _called(step: Callable[..., Any], batch: Any, index: int) -> Any:
    """The step with what it takes of: the batch, its index, and 0 for the dataloader's."""
    given = inspect.signature(step).parameters.values()
    others = [each for each in given if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    return step(batch, *[index, 0][: len(others) - 1])


@contextmanager
def without_effects(module: LightningModule) -> Iterator[None]:
    """Logs, optimizers, schedulers and backward passes of a LightningModule and of those in it do nothing.

    A closure given to an optimizer's `step` is run, since it holds a part of the training step.
    """
    trainer = trainer_of(module)
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, LightningModule):
                replaced: dict[str, Any] = dict.fromkeys(MUTED, _nothing)
                optimizers = part.optimizers(use_pl_optimizer=False) if trainer is not None else []
                replaced["optimizers"] = _returning(optimizers, StillOptimizer)
                replaced["lr_schedulers"] = _returning(
                    part.lr_schedulers() if trainer is not None else None, StillScheduler
                )
                stack.enter_context(patch.dict(part.__dict__, replaced))
        if trainer is not None:
            stack.callback(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        stack.enter_context(patch.object(torch.Tensor, "backward", _nothing))
        stack.enter_context(patch.object(torch.autograd, "backward", _nothing))
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a method that would have an effect."""


def _returning(real: Any, kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """A method that returns stand-ins in the form of the real objects: one, a list, or none."""
    found = [kind(each) for each in real] if isinstance(real, list) else None if real is None else kind(real)
    return lambda *args, **kwargs: found


class StillOptimizer:
    """An optimizer whose `step` and `zero_grad` do nothing; everything else is the real one's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Run the closure, if there is one."""
        return None if closure is None else closure()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    @contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Leave `requires_grad` as it is."""
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class StillScheduler:
    """A learning rate scheduler whose `step` does nothing; everything else is the real one's."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
