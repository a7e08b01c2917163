"""What a LightningModule consists of: the network, optimizers, copies of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel


def find_network(pl_module: LightningModule, called: Sequence[str], optimizers: Iterable[Optimizer]) -> str | None:
    """Where the network is: the LightningModule itself if it was called, else the one child that is trained.

    Children without a trained parameter (a teacher, a perceptual loss) are passed over. None if several children are
    trained, or tensors beside the one that was called, or its weights are another's too.
    """
    if "" in called:
        return ""
    trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = {parameter for parameter in pl_module.parameters() if parameter in trained and parameter.requires_grad}
    trained = trained or set(pl_module.parameters())
    for path in called:
        inside = set(pl_module.get_submodule(path).modules())
        own = {parameter for module in inside for parameter in module.parameters(recurse=False)}
        tied = any(own & set(module.parameters(recurse=False)) for module in set(pl_module.modules()) - inside)
        if trained <= own and not tied:
            return path
    return None


def optimizers_of(trainer: Trainer, pl_module: LightningModule) -> list[Optimizer]:
    """The trainer's optimizers as they are now, and those that the module keeps for itself."""
    found = list(trainer.optimizers)
    own = [value for value in vars(pl_module).values() if isinstance(value, Optimizer)]
    return found + [each for each in own if not any(each is known for known in found)]


def weight_averages(trainer: Trainer, pl_module: LightningModule) -> Iterator[LightningModule]:
    """Copies of the module that other callbacks keep."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for value in vars(callback).values():
            kept = value.module if isinstance(value, AveragedModel) else value
            if type(kept) is type(pl_module) and kept is not pl_module:
                yield kept


def modules_to_search(trainer: Trainer, pl_module: LightningModule) -> dict[str, nn.Module]:
    """Where copies of the network may be, beside the `averages`: in the module, in its lists, and in callbacks."""
    kept = {
        f"{type(callback).__name__}.{name}": value
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for name, value in vars(callback).items()
    }
    for name, value in vars(pl_module).items():
        kept |= (
            {f"{name}[{k}]": part for k, part in enumerate(value)}
            if isinstance(value, (list, tuple))
            else {name: value}
        )
    known = {id(module) for average in weight_averages(trainer, pl_module) for module in average.modules()}
    known |= {id(module) for module in pl_module.modules()}
    others = {name: value for name, value in kept.items() if isinstance(value, nn.Module) and id(value) not in known}
    return {"": pl_module, **{name: each for name, each in others.items() if not _is_average(each, pl_module)}}


def _is_average(module: nn.Module, pl_module: LightningModule) -> bool:
    return isinstance(module, AveragedModel) and type(module.module) is type(pl_module)


@contextmanager
def logging_muted(pl_module: LightningModule) -> Iterator[None]:
    """Within the body `self.log` does nothing, since the network runs on calibration batches there."""
    parts: list[nn.Module] = [module for module in pl_module.modules() if isinstance(module, LightningModule)]
    before = [(part, "log" in vars(part), vars(part).get("log")) for part in parts]
    try:
        for part in parts:
            vars(part)["log"] = _ignore
        yield
    finally:
        for part, had, value in before:
            vars(part).pop("log", None)
            if had:
                vars(part)["log"] = value


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
