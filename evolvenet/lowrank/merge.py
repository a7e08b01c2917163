"""`merge`: whole layers in the place of factorized ones, with the optimizers, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import parameter_table
from evolvenet.errors import FactorizationError
from evolvenet.lowrank.attention import SplitAttention, parameters_of_split
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.signals import deferred_signals
from evolvenet.surgery.module_replacement import Replacement, exchange_modules, replacements
from evolvenet.surgery.optimizer_parameters import as_list, parameter_names, replace_parameters


@deferred_signals("the merge of factors")
def merge(
    model: nn.Module, names: Iterable[str] | None = None, optimizers: Optimizer | Sequence[Optimizer] = ()
) -> tuple[str, ...]:
    """Put whole layers back in the place of factorized ones, in place, all or nothing. The outputs stay the same.

    Args:
        model: any module.
        names: paths of the layers; None for all that are factorized. Of an attention, all of its projections are merged.
        optimizers: the one or those that hold the model's parameters. A weight takes the place of its first factor, with
            fresh state.

    Returns:
        The paths of the merged layers.

    Raises:
        FactorizationError: if there is no factorized layer of a name. Nothing has changed then.

    >>> from evolvenet.lowrank.factorize import factorize
    >>> model = nn.Sequential(nn.Linear(10, 10))
    >>> _ = factorize(model, 2)
    >>> merge(model)
    ('0',)
    >>> model
    Sequential(
      (0): Linear(in_features=10, out_features=10, bias=True)
    )
    """
    with ExitStack() as undo:
        merged = merge_by(model, names, optimizers, undo)
        undo.pop_all()
    return merged


def merge_by(
    model: nn.Module, names: Iterable[str] | None, optimizers: Optimizer | Sequence[Optimizer], undo: ExitStack
) -> tuple[str, ...]:
    """As `merge`; closing `undo` puts the factors back, also what was done before a failure."""
    there = replacements(model)
    layers = [name for name, module in there.items() if isinstance(module, (FactoredLayer, SplitAttention))]
    wanted = layers if names is None else list(names)
    for name in wanted:
        if name not in there:
            raise FactorizationError(
                f"Merge: expected names of factorized layers, got {name!r}. The model has {', '.join(there) or 'none'}."
            )
    # An attention is put together from its projections once these are whole.
    chains = [name for name in there if any(f"{name}.".startswith(f"{each}.") for each in wanted)]
    chosen = dict.fromkeys(there[name] for name in chains)
    for kind in (FactoredLayer, SplitAttention):
        wholes: dict[nn.Module, nn.Module] = {}
        replaced: dict[Tensor, list[Tensor]] = {}
        for module in chosen:
            if isinstance(module, kind):
                wholes[module] = _whole(module, replaced)
        exchange_modules(model, wholes, undo)
        replace_parameters(as_list(optimizers), replaced, parameter_names(model), undo)
    return tuple(wanted)


def _whole(module: Replacement, replaced: dict[Tensor, list[Tensor]]) -> nn.Module:
    """The whole module; chains that share their factors share its weight."""
    whole = module.whole()
    if isinstance(module, SplitAttention):
        assert isinstance(whole, nn.MultiheadAttention)
        for together, parts in parameters_of_split(whole, module).items():
            replaced[parts[0]] = [together]
            replaced.update({part: [] for part in parts[1:]})
    if isinstance(module, FactoredLayer):
        first, *rest = (factor.get_parameter("weight") for factor in module.factors)
        if first in replaced:
            (weight,) = replaced[first]
            assert isinstance(weight, nn.Parameter)
            parameter_table(whole)["weight"] = weight
        replaced[first] = [whole.get_parameter("weight")]
        replaced.update({factor: [] for factor in rest})
    return whole
