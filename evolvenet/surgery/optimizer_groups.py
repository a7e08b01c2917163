"""The parameters of an optimizer's groups by their names in a model, and the groups made from such names again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet.errors import OptimizerStateError
from evolvenet.surgery.optimizer_parameters import parameter_names

GroupNames = Sequence[Sequence[str | None]]
"""Of each group the names of its parameters; None for one that is not the model's."""


def group_names(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[list[str | None]]]:
    """The groups of each optimizer.

    >>> import torch
    >>> model = nn.Linear(2, 2)
    >>> group_names(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    [[['weight', 'bias']]]
    """
    names = parameter_names(model)
    return [
        [[names.get(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def restore_groups(
    model: nn.Module, optimizers: Sequence[Optimizer], names: Sequence[GroupNames], gone: Collection[Tensor]
) -> None:
    """Give the groups of optimizers the parameters of these names, where they hold others; states of those that go are dropped.

    Args:
        model: with the parameters of that moment.
        optimizers: the same as then.
        names: from `group_names`; groups without names stay as they are.
        gone: parameters that have just left the model.

    Raises:
        OptimizerStateError: where a group holds parameters of no model, and not as many as then: copies of the weights that an
            optimizer has made for itself; where an optimizer has another number of groups. Nothing has changed then.
    """
    now = dict(model.named_parameters())
    own = parameter_names(model)
    planned: list[tuple[Optimizer, dict[str, Any], Sequence[Tensor], Sequence[str | None]]] = []
    for optimizer, groups in zip(optimizers, names, strict=False):
        if len(groups) != len(optimizer.param_groups):
            raise OptimizerStateError(
                f"{type(optimizer).__name__}: expected {len(groups)} groups of parameters as before the cut, got "
                f"{len(optimizer.param_groups)}. The cut stays. Add groups before the run, or after the event that judges a cut."
            )
        for group, wanted in zip(optimizer.param_groups, groups, strict=True):
            if [own.get(parameter) for parameter in group["params"]] == list(wanted):
                continue
            foreign = iter([each for each in group["params"] if each not in own and each not in gone])
            made = [next(foreign, None) if name is None else now.get(name) for name in wanted]
            found = [parameter for parameter in made if parameter is not None]
            if len(found) < len(made):
                raise OptimizerStateError(
                    f"{type(optimizer).__name__}: expected a group with {len(wanted)} parameters as before the cut, got one that "
                    "cannot be put together again from the model's. The cut stays."
                )
            planned.append((optimizer, group, found, wanted))
    for optimizer, group, found, wanted in planned:
        for parameter in set(group["params"]) - set(found):
            optimizer.state.pop(parameter, None)
        group["params"][:] = found
        if "param_names" in group:
            group["param_names"][:] = list(wanted)
