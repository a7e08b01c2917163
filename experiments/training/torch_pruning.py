"""A control: Torch-Pruning in place of EvolveNet, in a run that is otherwise the same."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterable
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.engine.history import Event, History, changed
from evolvenet.errors import MissingPackageError
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lightning.run_length import progress_of
from evolvenet.measurement.cost import macs, parameters
from evolvenet.policies.front import Front
from evolvenet.policies.schedule import Schedule
from evolvenet.tracing.trace import trace
from experiments.training.classifier import Classifier
from experiments.training.controls import ControlError

log = logging.getLogger(__name__)

LEAST = 2
"""Units that a width keeps, as where EvolveNet cuts depthwise convolutions. Torch-Pruning alone would leave one."""


class TorchPruning(lightning.Callback):
    """Prunes at the steps, and to the parameters, at which `evolvenet.WidthEvolution` would prune.

    Torch-Pruning chooses the units of all widths together (`global_pruning`) and removes them. It creates new parameters and
    does not carry an optimizer's state, so the optimizer starts without state each time.

    Args:
        policy: budgets of parameters; only their targets are used.
        every_n_steps: as in `WidthEvolution`, and so are the next three.
        start_step: no event before this optimizer step.
        stop: share of the run's optimizer steps, 0 … 1, after which widths stay.
        calibration_batches: number of batches between the step at which an event is due and the event; nothing is measured.

    Raises:
        MissingPackageError: if Torch-Pruning is not installed.
        ControlError: for budgets of another kind; during training, if the network cannot become as small as it should.
    """

    def __init__(
        self,
        policy: Front,
        every_n_steps: int,
        start_step: int = 0,
        stop: float = 0.75,
        calibration_batches: int = 4,
    ) -> None:
        package()
        if policy.points[0].kind != "params":
            raise ControlError(f"Torch-Pruning: expected budgets of params, got {policy.points[0].kind}.")
        self.policy = policy
        self.schedule = Schedule(every_n_steps=every_n_steps, start_step=start_step, stop=stop)
        self.delay = min(calibration_batches, every_n_steps)
        self.history: History | None = None
        self._example = torch.empty(0)
        self._start: WidthGraph | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Trace the network and record its sizes before training."""
        assert isinstance(pl_module, Classifier)
        images = next(iter(trainer.datamodule.val_dataloader()))[0]  # pyright: ignore[reportAttributeAccessIssue]
        self._example = images[:1].to(pl_module.device)
        self._start = trace(pl_module.model, self._example)
        self.history = History(self._event(pl_module.model, 0, None, 0.0))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if an event was due `calibration_batches` batches ago."""
        assert isinstance(pl_module, Classifier)
        assert self._start is not None
        assert self.history is not None
        due = trainer.global_step - self.delay
        if not self.schedule.due(due, progress_of(trainer) - self.delay / trainer.estimated_stepping_batches):
            return
        began, before = time.perf_counter(), [self.history.initial, *self.history.events][-1]
        target = self.policy.target(self._start.parameters, progress_of(trainer))
        if before.parameters > target:
            prune(pl_module.model, self._example, target, sum(before.sizes.values()))
            renew(trainer.optimizers[0], pl_module.parameters())
        event = self._event(pl_module.model, trainer.global_step, before, time.perf_counter() - began)
        self.history.events.append(event)
        for change in event.changes:
            log.info("step %d: %s %d → %d", event.step, change.width, change.before, change.after)

    def _event(self, model: nn.Module, step: int, before: Event | None, seconds: float) -> Event:
        assert self._start is not None
        sizes, count = sizes_of(model, self._start), parameters(model)
        past = before.sizes if before else sizes
        changes = tuple(changed(past, sizes, dict.fromkeys(sizes, "Torch-Pruning")))
        work = macs(model, self._example)
        return Event(step, changes, sizes, before.parameters if before else count, count, work, seconds)


def package() -> Any:
    """Torch-Pruning.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise MissingPackageError(
            "Torch-Pruning: expected the package torch_pruning, which this control needs, got none in this environment. "
            "Run it in the environment of the comparisons: `make compare-install`, then `.venv-compare/bin/python train.py …`."
        ) from error


def prune(model: nn.Module, example: Tensor, target: float, units: int) -> None:
    """Torch-Pruning, unit by unit until the network has no more than `target` parameters.

    The progressive pruning of its own benchmarks, in as many steps as there are units, with the importance computed before each.
    It is the importance of its README's first example, the norm of all weights that a unit touches (Fang et al. 2023); its
    gradient-based scores would need a labelled backward pass each.

    Args:
        model: pruned in place; its parameters are new objects afterwards.
        example: images `[N, channels, height, width]`.
        target: number of parameters.
        units: of all widths.

    Raises:
        ControlError: if it stops above the target.
    """
    peer: Any = package()
    training = model.training
    *_, head = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    pruner = peer.pruner.BasePruner(
        model, example, importance=peer.importance.GroupMagnitudeImportance(p=2), global_pruning=True, pruning_ratio=1.0,
        iterative_steps=units, ignored_layers=[head],
    )  # fmt: skip
    while parameters(model) > target and pruner.current_step < units:
        for group in pruner.step(interactive=True):
            if pruner.DG.get_out_channels(group[0].dep.target.module) - len(group[0].idxs) >= LEAST:
                group.prune()
    model.train(training)
    if parameters(model) > target:
        raise ControlError(
            f"Torch-Pruning: expected at most {target:,.0f} parameters, got {parameters(model):,} and nothing more that it "
            "prunes. Take a larger budget."
        )


def renew(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give an optimizer new parameters and clear its state; the object stays, so its learning rate schedule continues.

    >>> optimizer = torch.optim.AdamW(nn.Linear(4, 3).parameters())
    >>> renew(optimizer, nn.Linear(4, 2).parameters())
    >>> [tuple(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]
    [(2, 4), (2,)]
    """
    [group] = optimizer.param_groups
    group["params"] = list(parameters)
    optimizer.state.clear()


def sizes_of(model: nn.Module, graph: WidthGraph) -> dict[str, int]:
    """Units of each width, by the names in the graph of the unpruned network.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> sizes_of(model, trace(model, torch.zeros(1, 4)))
    {'0': 3}
    """
    first = {width.name: width.producers[0] for width in graph.resizable}
    return {name: model.get_parameter(tie.tensor).shape[tie.dim] for name, tie in first.items()}
