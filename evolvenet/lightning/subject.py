"""What of a LightningModule is traced and measured: one network that its steps call, or its training step as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from evolvenet.errors import OutputNameError, TraceError, is_out_of_memory, memory_for_tracing
from evolvenet.execution.chosen_outputs import Outputs, normalized, with_chosen_outputs
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.routes import modules_called, runs_until_every_route
from evolvenet.execution.step import InTurn, Step, run_model
from evolvenet.graph.serialization import from_state_dict
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.lightning.step import ModuleStep
from evolvenet.tracing.reconciled import reconciled
from evolvenet.tracing.trace import trace
from evolvenet.tracing.unreached import freeze_possible_inputs, unreached_parameters

log = logging.getLogger("evolvenet")

Settle = Callable[[nn.Module, WidthGraph], WidthGraph]
"""What replicas and modules that are not trained do to the graph of a network, see `ReplicaDiscovery.settled`."""
NETWORK, TRAINING_STEP, NETWORKS = "network", "training_step", "networks"
"""What a subject runs: one network with its own inputs, the training step, or several networks each with its own inputs."""
SAMPLES = 2
"""Samples of a batch that a trace runs on."""


@dataclass(frozen=True)
class Subject:
    """A model, how it is run, and its widths.

    Args:
        path: of the model in the LightningModule, "" for the module itself.
        inputs: what `run_model` takes.
        graph: the widths.
        runs: what the graph was traced on.
    """

    path: str
    inputs: Any
    graph: WidthGraph
    runs: Any

    @property
    def kind(self) -> str:
        """What runs with the inputs: `NETWORK`, `TRAINING_STEP` or `NETWORKS`."""
        if not isinstance(self.inputs, Step):
            return NETWORK
        return TRAINING_STEP if isinstance(self.inputs.function, ModuleStep) else NETWORKS

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, all but the inputs and the graph, see `resumed_subject`."""
        index = self.inputs.function.index if self.kind == TRAINING_STEP else 0
        return {"root": self.path, "kind": self.kind, "index": index}


def call_networks(module: nn.Module, batch: Mapping[str, Any]) -> list[Any]:
    """Calls networks of a module by themselves, for a `Step`: where the code between them cannot be traced.

    Args:
        module: that holds them.
        batch: {path of a network: its inputs}.

    Returns:
        Their outputs.
    """
    return [run_model(module.get_submodule(path), inputs) for path, inputs in batch.items()]


def subject_of_example(
    module: LightningModule, example_inputs: Any, settle: Settle, outputs: Outputs | None = None
) -> Subject | None:
    """The module itself, called with inputs that the user gave; None where that leaves some of its parameters unused.

    What the module itself does not use, its training step may.

    Raises:
        TraceError: if the module does not run on them.
    """
    found = _alone(module, "", example_inputs, settle, outputs)
    return None if unreached_parameters(found.graph) else found


def _alone(module: nn.Module, path: str, inputs: Any, settle: Settle, outputs: Outputs | None) -> Subject:
    """A network called with its own inputs."""
    root, few = module.get_submodule(path), first_samples(inputs, SAMPLES)
    graph = settle(root, trace(root, few, outputs))
    return Subject(path, inputs, graph, with_chosen_outputs(few, normalized(outputs)))


def resumed_subject(state: Mapping[str, Any], inputs: Any) -> Subject:
    """What an interrupted run had chosen.

    Args:
        state: the callback's, from the checkpoint.
        inputs: of the network, or a batch of the step.
    """
    functions = {TRAINING_STEP: ModuleStep(TRAINING_STEP, state["index"]), NETWORKS: call_networks}
    step = inputs if state["kind"] == NETWORK else Step(functions[state["kind"]], inputs)
    return Subject(state["root"], step, from_state_dict(state["evolver"]["graph"]), step)


def choose_subject(
    module: LightningModule,
    path: str | None,
    calls: Mapping[str, Any],
    batches: Mapping[str, tuple[Any, int]],
    settle: Settle,
    outputs: Outputs | None = None,
    with_loss: bool = False,
) -> Subject:
    """The one network of a module if its own graph says all about it, else the training step, else its networks.

    The graph of the network alone knows nothing of losses that read a layer, of heads beside it, or of modules that have
    not run. It is used where the graph of the steps has the same ties for every width that it would resize; reasons to
    keep a size are taken over from there.

    Args:
        module: the LightningModule.
        path: of the one network that its training step calls, None if there are several.
        calls: {path: inputs} of all networks that it calls.
        batches: {"training_step": its first batch and that batch's index, "validation_step": as far as it is known}.
        settle: see `Settle`.
        outputs: those of the network that count, as for `trace`.
        with_loss: whether the training step is preferred, since it returns the loss.

    Raises:
        TraceError: if neither the steps nor any network can be traced.
    """
    alone, problem = None, None
    if path is not None:
        try:
            alone = _alone(module, path, calls[path], settle, outputs)
        except OutputNameError:
            raise
        except TraceError as error:
            problem = error
    whole = _trace_steps(module, batches, settle)
    if whole is None and alone is None:
        networks = {name: inputs for name, inputs in calls.items() if name}
        if problem is not None and len(networks) < 2:
            raise problem
        step = Step(call_networks, networks)
        return Subject("", step, settle(module, trace(module, first_samples(step, SAMPLES))), step)
    if whole is None or alone is None:
        return whole or alone  # type: ignore[return-value]
    return whole if with_loss else _reconciled(module, alone, whole) or whole


def _trace_steps(module: LightningModule, batches: Mapping[str, tuple[Any, int]], settle: Settle) -> Subject | None:
    """The module's steps, traced together; None where its training step does not run beside training."""
    steps = {name: Step(ModuleStep(name, index), batch) for name, (batch, index) in batches.items()}
    try:
        runs = [first_samples(steps["training_step"], SAMPLES)] * runs_until_every_route(
            module, first_samples(steps["training_step"], SAMPLES)
        )
        for name in set(steps) - {"training_step"}:
            few = first_samples(steps[name], SAMPLES)
            try:
                runs_until_every_route(module, few, tries=1)
                runs.append(few)
            except Exception as problem:
                if is_out_of_memory(problem):
                    raise
                log.debug("%s does not run beside training, so it is not traced", name, exc_info=problem)
        graph, together = _traced(module, runs, steps["training_step"], settle)
    except Exception as problem:
        if is_out_of_memory(problem):
            # The network alone would be traced without what the step does with it.
            with memory_for_tracing():
                raise
        log.debug("training_step does not run beside training, so its networks are traced alone", exc_info=problem)
        return None
    if len(unreached_parameters(graph)) == len(graph.trainable):
        return None
    return Subject("", steps["training_step"], graph, together)


def _reconciled(module: LightningModule, alone: Subject, whole: Subject) -> Subject | None:
    """The network alone, with the steps' reasons to keep a size; None where the steps reach more or tie its widths to more."""
    prefix = f"{alone.path}." if alone.path else ""
    beside = [module.get_parameter(prefix + name) for name in unreached_parameters(alone.graph)]
    if unreached_parameters(whole.graph) or any(parameter.requires_grad for parameter in beside):
        return None
    graph = reconciled(alone.graph, whole.graph, alone.path)
    return None if graph is None else replace(alone, graph=graph)


def extended(subject: Subject, module: LightningModule, step: ModuleStep, batch: Any, settle: Settle) -> Subject:
    """The subject traced anew, with one run more in which a module has run for the first time.

    Args:
        subject: as it was traced before.
        module: the LightningModule.
        step: that ran.
        batch: that it ran on.
        settle: see `Settle`.

    Raises:
        TraceError: if that cannot be traced.
    """
    whole = Step(step, batch)
    run = first_samples(whole, SAMPLES)
    before = subject.runs.each if isinstance(subject.runs, InTurn) else (subject.runs,)
    graph, runs = _traced(module, [*before, *[run] * runs_until_every_route(module, run)], whole, settle)
    return replace(subject, graph=graph, runs=runs)


def _traced(module: LightningModule, runs: Sequence[Any], whole: Step, settle: Settle) -> tuple[WidthGraph, InTurn]:
    """The graph of some runs, and of a whole batch where its samples reach modules that those of the runs do not (experts)."""
    graph = settle(module, trace(module, InTurn(tuple(runs))))
    unreached = {name.rpartition(".")[0] for name in unreached_parameters(graph)}
    if unreached and unreached & modules_called(module, whole):
        runs = [*runs, whole]
        graph = settle(module, trace(module, InTurn(tuple(runs))))
    return freeze_possible_inputs(graph), InTurn(tuple(runs))
