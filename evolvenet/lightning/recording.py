"""Records what a LightningModule's training step runs: its networks' inputs, or its batches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from evolvenet.execution.call_recorder import CallRecorder
from evolvenet.execution.step_recorder import StepRecorder
from evolvenet.lightning.subject import NETWORK, TRAINING_STEP


class SubjectRecorder:
    """Records for a subject of one kind, or, before one is chosen, for all kinds.

    Args:
        module: the LightningModule.
        most: calls, or batches, that are kept.
        kind: of the subject, see `Subject.kind`; None for all.
        path: of the network in the module, for that kind.
    """

    def __init__(self, module: LightningModule, most: int, kind: str | None = None, path: str = "") -> None:
        networks = {"": module, **dict(module.named_children())}
        if kind == NETWORK:
            networks = {path: module.get_submodule(path)}
        self._calls = CallRecorder(networks, most if kind else 8, module) if kind != TRAINING_STEP else None
        self._steps = StepRecorder(module, most) if kind in (TRAINING_STEP, None) else None

    @property
    def names(self) -> list[str]:
        """Paths of the networks that were called."""
        return self._calls.names if self._calls else []

    def inputs(self, path: str) -> list[Any]:
        """The inputs of each recorded call of a network."""
        return self._calls.inputs(path) if self._calls else []

    def begin(self, batch: Any) -> None:
        """A training step begins."""
        if self._steps is not None:
            self._steps.begin(batch)

    def end(self) -> None:
        """The training step is over."""
        if self._steps is not None:
            self._steps.end()

    def calls(self, kind: str, path: str) -> list[tuple[Any, Any]]:
        """Of each call of the network, or of each training step, the inputs and the gradients at the outputs.

        Args:
            kind: of the subject.
            path: of the network.
        """
        if kind == TRAINING_STEP:
            return list(self._steps.calls()) if self._steps else []
        if kind == NETWORK:
            return list(self._calls.calls(path)) if self._calls else []
        found = {name: self.inputs(name) for name in self.names if name}
        count = min(map(len, found.values()), default=0)
        return [({name: inputs[-count:][k] for name, inputs in found.items()}, ()) for k in range(count)]

    def close(self) -> None:
        """Leave no hook behind."""
        self.end()
        if self._calls is not None:
            self._calls.close()
