"""Modules that no trace has reached: when one of them runs, the subject is traced anew with that step."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import LightningModule

from evolvenet.errors import TraceError
from evolvenet.execution.routes import FirstCalls
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lightning.module import logging_muted
from evolvenet.lightning.step import ModuleStep
from evolvenet.lightning.subject import TRAINING_STEP, Settle, Subject, extended
from evolvenet.tracing.unreached import unreached_parameters

log = logging.getLogger("evolvenet")


class FirstRuns:
    """Watches a subject's unreached modules.

    Args:
        module: the LightningModule.
        subject: as traced so far.
        graph: of the subject now.
        settle: see `evolvenet.lightning.subject.Settle`.
    """

    def __init__(self, module: LightningModule, subject: Subject, graph: WidthGraph, settle: Settle) -> None:
        self._module, self._subject, self._settle = module, subject, settle
        self._calls = self._watch(graph)

    @property
    def any_called(self) -> bool:
        """Whether an unreached module has run since `graph_after` was called last."""
        return bool(self._calls.called)

    def graph_after(self, name: str, batch: Any, index: int) -> WidthGraph | None:
        """The subject's graph where a step has just called an unreached module; None where it has not.

        Args:
            name: of the step: "training_step" or "validation_step".
            batch: that it ran on.
            index: of the batch.
        """
        called, self._calls.called = self._calls.called, set()
        if not called or self._subject.kind != TRAINING_STEP:
            return None
        try:
            with logging_muted(self._module):
                self._subject = extended(self._subject, self._module, ModuleStep(name, index), batch, self._settle)
        except TraceError as problem:
            log.warning("%s has run for the first time, and cannot be traced: %s", ", ".join(sorted(called)), problem)
            return None
        log.info("%s has run for the first time: traced anew", ", ".join(sorted(called)))
        self.close()
        self._calls = self._watch(self._subject.graph)
        return self._subject.graph

    def close(self) -> None:
        """Leave no hook behind."""
        self._calls.close()

    def _watch(self, graph: WidthGraph) -> FirstCalls:
        prefix = f"{self._subject.path}." if self._subject.path else ""
        paths = {(prefix + name).rpartition(".")[0] for name in unreached_parameters(graph)}
        return FirstCalls({path: self._module.get_submodule(path) for path in sorted(paths)})
