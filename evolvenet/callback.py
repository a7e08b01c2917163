"""`WidthEvolution`: *when* widths change inside a Lightning run. What changes is decided and done below."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from evolvenet.errors import PolicyError, TraceError, UnsupportedStrategyError
from evolvenet.evolver import Evolver
from evolvenet.policy import Policy
from evolvenet.record import History, reshape_before_load

log = logging.getLogger("evolvenet")


class WidthEvolution(Callback):
    """Prunes and grows the widths of whatever the trainer trains.

    The model is traced on the first training batch, with the inputs that its own training step gives it. Events happen
    before a batch, at an accumulation boundary. Each changed width is logged through `logging.getLogger("evolvenet")`;
    "evolve/parameters" and "evolve/macs" go to the trainer's loggers and progress bar.

    Args:
        policy: proposes sizes from spectra, for example `evolvenet.Threshold`.
        every_n_epochs: an event at the start of every n-th epoch; the default, with n = 1, if neither is given.
        every_n_steps: or an event every n optimizer steps.
        start_step: no event before this optimizer step.
        stop: share of the run's optimizer steps, 0 … 1, after which widths stay and the network settles.
        example_inputs: what the model is called with, if the first training batch should not be waited for.
        calibration_batches: how many of the last training batches an event measures on.
        seed: of the newborns' random directions.

    Raises:
        PolicyError: for values out of range.
        TraceError: in the first batches, if nothing in the model can be resized.
        UnsupportedStrategyError: before training starts, under a strategy with several processes.

    >>> from evolvenet import Threshold
    >>> callback = WidthEvolution(policy=Threshold(prune=0.01, grow=0.9), every_n_epochs=1)
    """

    def __init__(
        self,
        policy: Policy,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        start_step: int = 0,
        stop: float = 0.75,
        example_inputs: Any = None,
        calibration_batches: int = 4,
        seed: int = 0,
    ) -> None:
        if every_n_epochs is not None and every_n_steps is not None:
            raise PolicyError("WidthEvolution: expected every_n_epochs or every_n_steps, got both. Give one of them.")
        if every_n_epochs is None and every_n_steps is None:
            every_n_epochs = 1
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise PolicyError(f"WidthEvolution: expected {name} of 1 or more, got {value}.")
        if not 0 <= stop <= 1:
            raise PolicyError(f"WidthEvolution: expected stop as a share of the run in 0 … 1, got {stop}.")
        if calibration_batches < 1:
            raise PolicyError(f"WidthEvolution: expected calibration_batches of 1 or more, got {calibration_batches}.")
        self.policy = policy
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.stop = stop
        self.example_inputs = example_inputs
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.evolver: Evolver | None = None
        self._resumed: dict[str, Any] | None = None
        self._calls: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._last_step = -1
        self._waited = False
        self._owed = False

    @property
    def history(self) -> History | None:
        """The run's events, None before the model is traced."""
        return self.evolver.history if self.evolver else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the model take a checkpoint's widths when one is loaded."""
        if trainer.world_size > 1 or type(trainer.strategy).__name__ not in (
            "SingleDeviceStrategy",
            "SingleDeviceXLAStrategy",
        ):
            raise UnsupportedStrategyError(
                f"WidthEvolution changes parameters of one process, got {type(trainer.strategy).__name__} with "
                f"{trainer.world_size} processes, where the others would keep the old shapes. Take devices=1."
            )
        hooks = pl_module._load_state_dict_pre_hooks.values()
        if not any(getattr(hook, "hook", hook) is reshape_before_load for hook in hooks):
            pl_module.register_load_state_dict_pre_hook(reshape_before_load)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to what the training step calls the model with."""
        self._waited = False
        self._handles = [
            module.register_forward_pre_hook(self._listener(path), with_kwargs=True)
            for path, module in (("", pl_module), *pl_module.named_children())
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Trace once the first inputs are known; from then on change widths when an event is due."""
        if self.evolver is None:
            self._begin(trainer, pl_module)
        if self.evolver is None:
            # A resumed run may start right at an event, before its first batch: it is made up for after that.
            self._owed = self._due(trainer, batch_idx)
            return
        if self._due(trainer, batch_idx) or (self._owed and self._at_boundary(trainer, batch_idx)):
            self._owed = False
            self._last_step = trainer.global_step
            self.evolver.step(at=trainer.global_step)
            torch._dynamo.reset()
        latest = [self.evolver.history.initial, *self.evolver.history.events][-1]
        pl_module.log("evolve/parameters", float(latest.parameters), prog_bar=True)
        pl_module.log("evolve/macs", float(latest.macs))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no hook behind."""
        self._deafen()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._deafen()

    def state_dict(self) -> dict[str, Any]:
        """The events so far, for the checkpoint."""
        return self.evolver.state_dict() if self.evolver else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the events of the resumed run until the model is traced."""
        self._resumed = state_dict or None

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.example_inputs is not None:
            root, inputs = pl_module, self.example_inputs
        elif self._calls:
            root, inputs = self._root(pl_module)
        elif not self._waited:
            self._waited = True
            return
        else:
            raise TraceError(
                f"{type(pl_module).__name__}'s training step has run without calling any module, so there is nothing to "
                "trace. Call the network as a module (self(x) or self.net(x), not self.forward(x)), or give "
                "WidthEvolution(example_inputs=...)."
            )
        self.evolver = Evolver(root, trainer.optimizers, self.policy, inputs, self.calibration_batches, self.seed)
        self.evolver.observe(inputs)
        self._calls = {}
        if self._resumed is not None:
            self.evolver.load_state_dict(self._resumed)
        frozen = [width for width in self.evolver.graph.widths.values() if width.frozen is not None]
        log.info(
            "%d resizable widths hold %.1f %% of the %s parameters; %d frozen",
            len(self.evolver.graph.resizable),
            100 * self.evolver.graph.coverage,
            f"{self.evolver.graph.parameters:,}",
            len(frozen),
        )

    def _root(self, pl_module: LightningModule) -> tuple[nn.Module, Any]:
        """The module to trace: the LightningModule where it was called itself, else the one child that was."""
        if "" in self._calls:
            return pl_module, self._calls[""]
        count = sum(1 for _ in pl_module.parameters())
        for path, inputs in self._calls.items():
            child = pl_module.get_submodule(path)
            if sum(1 for _ in child.parameters()) == count:
                return child, inputs
        raise TraceError(
            f"{type(pl_module).__name__}'s training step calls several networks ({', '.join(self._calls)}), so its inputs to "
            "all of them are not known. Define forward and call self(...), or give WidthEvolution(example_inputs=...)."
        )

    def _listener(self, path: str) -> Any:
        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not module.training:
                return
            inputs = _bound(module, args, kwargs)
            if self.evolver is None:
                self._calls.setdefault(path, inputs)
            elif self.evolver.model is module:
                self.evolver.observe(inputs)

        return listen

    def _due(self, trainer: Trainer, batch_idx: int) -> bool:
        step = trainer.global_step
        if step == self._last_step or step < max(self.start_step, 1) or not self._at_boundary(trainer, batch_idx):
            return False
        total = trainer.estimated_stepping_batches
        if step > self.stop * total:
            return False
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        assert self.every_n_epochs is not None
        return batch_idx == 0 and trainer.current_epoch > 0 and trainer.current_epoch % self.every_n_epochs == 0

    @staticmethod
    def _at_boundary(trainer: Trainer, batch_idx: int) -> bool:
        """Between two optimizer steps, not within the batches of one."""
        return batch_idx % trainer.accumulate_grad_batches == 0

    def _deafen(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._calls = {}


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's inputs as one tensor, tuple or dict."""
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], torch.Tensor) else args
    if not args:
        return kwargs
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return {**bound.arguments, **bound.arguments.pop("kwargs", {})}
