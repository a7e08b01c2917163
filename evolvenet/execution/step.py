"""Running a model: by a call with its inputs, or by a step function on a batch, as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from evolvenet._compat.torch import register_pytree_node
from evolvenet.errors import TraceError
from evolvenet.execution.collectives import without_collectives
from evolvenet.execution.inputs import arguments, tensors_of


@dataclass(frozen=True)
class Step:
    """A batch with the function that runs a model on it. It stands wherever a model's inputs stand.

    A training step may call several networks of a model, read features of them in its loss, and never call the model
    itself. Whatever traces, measures or compares the model then runs this function. Functions over nested tensors
    (`torch.utils._pytree`) reach the batch: it can be moved, cut to its first samples, and joined with others.

    Args:
        function: of the model and the batch. It returns the loss, or whatever the step returns, and must leave nothing
            behind: no optimizer step, no log.
        batch: tensors in any nesting.

    >>> nets = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
    >>> def reconstruction(model, x):
    ...     return (model["decoder"](model["encoder"](x)) - x).square().mean()
    >>> run_model(nets, Step(reconstruction, Tensor([[1.0, 2.0, 3.0, 4.0]]))).shape
    torch.Size([])
    """

    function: Callable[[nn.Module, Any], Any]
    batch: Any


def batch_of(inputs: Any) -> Any:
    """The batch of a `Step`; other inputs as they are."""
    return inputs.batch if isinstance(inputs, Step) else inputs


def _unflatten(parts: Any, function: Callable[[nn.Module, Any], Any]) -> Step:
    (batch,) = parts
    return Step(function, batch)


register_pytree_node(Step, lambda step: ([step.batch], step.function), _unflatten)


@dataclass(frozen=True)
class InTurn:
    """Several inputs that the model is run on one after the other: a training step and a validation step, say.

    Args:
        each: tensors, tuples, dicts, or a `Step` each.

    >>> run_model(nn.Linear(2, 3), InTurn((Tensor([[1.0, 2.0]]), Tensor([[3.0, 4.0]]))))[1].shape
    torch.Size([1, 3])
    """

    each: tuple[Any, ...]


register_pytree_node(InTurn, lambda runs: (list(runs.each), None), lambda parts, _: InTurn(tuple(parts)))


def run_model(model: nn.Module, inputs: Any, device: str | None = None) -> Any:
    """What the model returns for its inputs, or the step function for its batch.

    Args:
        model: any module.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, a `Step`, or several `InTurn`.
        device: where the tensors among the inputs are moved first, if one is named.

    Raises:
        CollectiveError: where the code exchanges tensors with other processes, which may not run it now.

    >>> run_model(nn.Linear(2, 3), Tensor([[1.0, 2.0]])).shape
    torch.Size([1, 3])
    """
    if isinstance(inputs, InTurn):
        return [run_model(model, each, device) for each in inputs.each]
    args, kwargs = arguments(inputs, device, model)
    with without_collectives():
        if isinstance(inputs, Step):
            (step,) = args
            return step.function(model, step.batch)
        return model(*args, **kwargs)


def returned_loss(returned: Any, _targets: Any = None) -> Tensor:
    """The loss in what a training step, or a model that computes its own, has returned.

    Args:
        returned: the loss itself, or a mapping with it as "loss", or an object with it as `loss`.

    Raises:
        TraceError: if there is none.

    >>> returned_loss({"loss": Tensor([2.0]).sum(), "logits": Tensor([1.0, 2.0])})
    tensor(2.)
    """
    found = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", returned)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise TraceError(
            "Expected the training step to return its loss, a tensor with one number or a mapping with one as 'loss', got "
            f"{type(returned).__name__}. Return it, or give Evolver(step=...) a function of the batch that does."
        )
    return found


def network_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that the model returns; in a step, those that its networks return to the step's code.

    A step returns a loss, one number, which says little about what a change of weights has done. What is compared then
    are the outputs of the outermost modules that the step calls, in the order of the calls; where it calls none, what the
    step itself returns.

    >>> nets = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
    >>> step = Step(lambda model, x: model["decoder"](model["encoder"](x)).sum(), Tensor([[1.0, 2.0, 3.0, 4.0]]))
    >>> [tuple(output.shape) for output in network_outputs(nets, step)]
    [(1, 2), (1, 4)]
    """
    if isinstance(inputs, InTurn):
        return [tensor for each in inputs.each for tensor in network_outputs(model, each)]
    if not isinstance(inputs, Step):
        return tensors_of(run_model(model, inputs))
    with _outermost_outputs(model) as found:
        returned = run_model(model, inputs)
    return [tensor for output in found for tensor in tensors_of(output)] or tensors_of(returned)


@contextmanager
def _outermost_outputs(model: nn.Module) -> Iterator[list[Any]]:
    """What those modules of a model return that are not called by another one of its modules."""
    own = {id(module) for module in model.modules()}
    depth, found = [0], []

    def enter(module: nn.Module, args: Any) -> None:
        depth[0] += id(module) in own

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in own:
            depth[0] -= 1
            if depth[0] == 0:
                found.append(output)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
