"""How each key of an optimizer's state follows its parameter through index maps and changes of basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evolvenet.graph.index_map import NEW_UNIT, IndexMap
from evolvenet.linalg.host_transfers import index_tensor
from evolvenet.linalg.precision import in_float64
from evolvenet.surgery.basis_change import BasisChange, along


class Change(Protocol):
    """The planned change of one parameter; `evolvenet.surgery.resize_model.TensorChange` is one."""

    @property
    def tensor(self) -> Tensor:
        """The live parameter, still of its old shape."""
        ...

    @property
    def name(self) -> str:
        """Its name in the model, for errors."""
        ...

    @property
    def axes(self) -> Mapping[int, IndexMap]:
        """The map of each axis that changes."""
        ...

    @property
    def value(self) -> Tensor:
        """Its new value, of the new shape."""
        ...

    @property
    def bases(self) -> Mapping[int, BasisChange]:
        """The change of basis of each axis whose units get another one, before they are mapped."""
        ...


Carry = Callable[[Tensor, Mapping[int, IndexMap], Change, Mapping[str, Any]], Tensor]
"""(old entry, maps of the axes it has, change, parameter group) → new entry."""

Mix = Callable[[Tensor, int, BasisChange], Tensor]
"""(old entry, axis, change of the basis of its units) → entry in the new basis."""


def _gradients(entry: Tensor, dim: int, basis: BasisChange) -> Tensor:
    """Averages of gradients change as gradients do."""
    return along(entry, basis.gradients, dim)


def _squares(entry: Tensor, dim: int, basis: BasisChange) -> Tensor:
    """Averages of squared gradients, as if the gradients of different units were uncorrelated."""
    return along(entry, basis.gradients.square(), dim)


def _magnitudes(entry: Tensor, dim: int, basis: BasisChange) -> Tensor:
    """Magnitudes of gradients, likewise."""
    return along(entry.square(), basis.gradients.square(), dim).sqrt()


def _step_squares(entry: Tensor, dim: int, basis: BasisChange) -> Tensor:
    """Averages of squared steps, which are changes of values, likewise."""
    return along(entry, basis.values.square(), dim)


def _step_magnitudes(entry: Tensor, dim: int, basis: BasisChange) -> Tensor:
    """Magnitudes of steps, likewise."""
    return along(entry.square(), basis.values.square(), dim).sqrt()


def _weights(entry: Tensor, dim: int, basis: BasisChange) -> Tensor:
    """Averages of values change as values do."""
    return along(entry, basis.values, dim)


def _squares_by_sign(entry: Tensor, dim: int, basis: BasisChange) -> Tensor:
    """A key without a rule: an entry without negative values is taken for squared gradients, any other for gradients."""
    return (_squares if _has_no_sign(entry) else _gradients)(entry, dim, basis)


@dataclass(frozen=True)
class Rule:
    """How one key of an optimizer's state follows its parameter.

    Args:
        carry: computes the new entry from the old one.
        mix: computes the entry in another basis of the units, before it is carried.
        reduced: the axis, counted from the end, along which the entry holds one value for all (Adafactor's factors).
        exact: whether the entry must have the parameter's shape (but for `reduced`); otherwise any axis may be reduced.
    """

    carry: Carry
    mix: Mix = _squares_by_sign
    reduced: int | None = None
    exact: bool = True

    def axes(self, entry: Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The axes that the entry shares with a parameter of this shape, or None if it does not fit it."""
        if self.reduced is not None:
            shape = [1 if dim == len(shape) + self.reduced else size for dim, size in enumerate(shape)]
        pairs = list(enumerate(zip(entry.shape, shape, strict=False)))
        misfits = [dim for dim, (found, expected) in pairs if found != expected and (self.exact or found != 1)]
        if entry.dim() != len(shape) or misfits:
            return None
        skipped = None if self.reduced is None else len(shape) + self.reduced
        return tuple(dim for dim, (found, expected) in pairs if found == expected and dim != skipped)


def _stays(entry: Tensor, axes: Mapping[int, IndexMap], change: Change, group: Mapping[str, Any]) -> Tensor:
    """An entry that is not one value per weight: a step count, a schedule."""
    return entry


def _zeros(entry: Tensor, axes: Mapping[int, IndexMap], change: Change, group: Mapping[str, Any]) -> Tensor:
    """New units have no history: momenta start at 0."""
    for dim, index_map in axes.items():
        entry = index_map.apply(entry, dim)
    return entry


def _means(entry: Tensor, axes: Mapping[int, IndexMap], change: Change, group: Mapping[str, Any]) -> Tensor:
    """New units start at the mean of the kept units: 0 with the old step count would make the first updates far too large."""
    for dim, index_map in axes.items():
        moved = index_map.apply(entry, dim)
        if index_map.new_units:
            kept = [index for index in index_map.indices if index != NEW_UNIT] or list(range(index_map.size))
            mean = entry.index_select(dim, torch.tensor(kept, device=entry.device)).mean(dim, keepdim=True)
            new_units = torch.tensor(index_map.new_units, device=entry.device)
            moved.index_copy_(dim, new_units, mean.repeat_interleave(len(new_units), dim))
        entry = moved
    return entry


def _rates(entry: Tensor, axes: Mapping[int, IndexMap], change: Change, group: Mapping[str, Any]) -> Tensor:
    """New units start at the learning rate, as Rprop's step sizes do."""
    for dim, index_map in axes.items():
        entry = index_map.apply(entry, dim, new_unit=float(group["lr"]))
    return entry


def _values(entry: Tensor, axes: Mapping[int, IndexMap], change: Change, group: Mapping[str, Any]) -> Tensor:
    """Another version of the weights (an average, a copy): new units get their new weights, the others keep their distance.

    With f the map of units, w the weights and e the entry: e' = f(e) + (w' − f(w)). What a refit has added to the weights is
    so added to the entry, and what was between the two before is still between them.
    """
    value = change.value.detach().to(entry.device, entry.dtype)
    moved = _zeros(entry, axes, change, group) + (value - mapped(change).to(entry.device, entry.dtype))
    return with_new_units(moved, axes, value)


def mapped(change: Change) -> Tensor:
    """The parameter's value after the changes of basis and the maps alone, new units 0."""
    value = change.tensor.detach()
    for dim, basis in change.bases.items():
        value = along(value, basis.values, dim)
    return _zeros(value, change.axes, change, {})


def with_new_units(entry: Tensor, axes: Mapping[int, IndexMap], source: Tensor) -> Tensor:
    """The entry, changed in place, with the new units of `source`."""
    for dim, index_map in axes.items():
        new_units = index_tensor(index_map.new_units, entry.device)
        entry.index_copy_(dim, new_units, source.index_select(dim, new_units))
    return entry


def _by_sign(entry: Tensor, axes: Mapping[int, IndexMap], change: Change, group: Mapping[str, Any]) -> Tensor:
    """A key without a rule: an entry without negative values is carried as a second moment, any other as a momentum."""
    return (_means if _has_no_sign(entry) else _zeros)(entry, axes, change, group)


def _has_no_sign(entry: Tensor) -> bool:
    return entry.is_floating_point() and not bool((entry < 0).any())


RULES: dict[str, Rule] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "prev"), Rule(_zeros, _gradients)),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"), Rule(_means, _squares)),
    "exp_inf": Rule(_means, _magnitudes),
    "acc_delta": Rule(_means, _step_squares),
    "row_var": Rule(_means, _squares, reduced=-1),
    "col_var": Rule(_means, _squares, reduced=-2),
    "step_size": Rule(_rates, _step_magnitudes),
    "ax": Rule(_values, _weights),
}
"""The rule of each key of `optimizer.state[parameter]`, torch's own; another optimizer's keys may be added."""

WEIGHTS = RULES["ax"]
"""The rule of another version of the weights."""
NAMED_WEIGHTS = frozenset(
    {"master", "master_param", "master_params", "fp32_param", "slow_param", "slow_params", "slow_buffer", "slow_weights",
     "lookahead_params", "p0", "x0", "init_buffer"}
)  # fmt: skip
"""Keys of other versions of the weights in optimizers other than torch's: copies in float32, slow weights of Lookahead, first
weights of Prodigy, D-Adaptation and DoG."""
NEAR = {"z": 1.0}
"""By key, the distance below which an entry is another version of the weights; `z` of schedule-free optimizers goes far."""
NEAREST = 0.5
"""That distance for every other key without a rule. Averages of gradients are 1 or more from the weights, as zeros are."""


def is_weights(key: str, pairs: Iterable[tuple[Any, Tensor]]) -> bool:
    """Whether the entries of one key are other versions of the weights, by the key or by their values.

    By their values if √(Σ‖e − w‖² / Σ‖w‖²) over all parameters together is small. Zeros are at a distance of 1, whatever the
    weights are, and where all weights are 0 nothing is known.

    Args:
        key: in `optimizer.state[parameter]`.
        pairs: of each parameter that has the key, its entry and the parameter.

    >>> w = torch.tensor([1.0, -2.0])
    >>> is_weights("ema", [(w * 0.9, w)]), is_weights("ema", [(-w, w)]), is_weights("ema", [(w * 0, w)])
    (True, False, False)
    """
    if key in RULES or key in SCALARS:
        return False
    alike = [
        (e.detach(), w.detach().to(e.device, e.dtype))
        for e, w in pairs
        if isinstance(e, Tensor) and e.shape == w.shape and e.is_complex() == w.is_complex() and _is_real_or_complex(e)
    ]
    if key in NAMED_WEIGHTS:
        return bool(alike)
    distance = sum(float(in_float64((e - w).abs()).square().sum()) for e, w in alike)
    length = sum(float(in_float64(w.abs()).square().sum()) for _, w in alike)
    return length > 0 and distance < NEAR.get(key, NEAREST) ** 2 * length


def _is_real_or_complex(entry: Tensor) -> bool:
    return entry.is_floating_point() or entry.is_complex()


SCALARS = frozenset({"step", "eta", "mu", "mu_product"})
SCALAR = Rule(_stays)
UNKNOWN = Rule(_by_sign, exact=False)
