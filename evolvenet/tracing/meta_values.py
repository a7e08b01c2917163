"""The values of the small tensors of a run on meta tensors that do not depend on weights: indices, masks, positions.

Code that makes an attention mask decides by values: whether anything is padded, whether several texts lie in one row. On meta
tensors there are none, and a copy of a model with billions of weights only for these would not fit in memory. So what is
computed from the model's inputs and from constants is computed beside the run, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evolvenet._compat.torch import schema_of, storage_id, tree_flatten, tree_unflatten

MOST = 65_536
"""Most entries of a tensor whose values are computed."""

aten = torch.ops.aten
BY_SHAPE = frozenset(
    {
        *(aten.new_ones.default, aten.new_zeros.default, aten.new_full.default),
        *(aten.ones_like.default, aten.zeros_like.default, aten.full_like.default),
    }
)
"""Ops that take no values of their tensor, only its shape, dtype and device."""
UNINITIALISED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
"""Ops whose results are memory as it was, for which zeros stand."""
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class MetaValues:
    """Values of meta tensors in one run.

    >>> values, ids = MetaValues(), torch.tensor([[1, 2]])
    >>> on_meta = values.without_data(ids)
    >>> equal = values.run(aten.eq.Scalar, (on_meta, 1), {}, aten.eq.Scalar)
    >>> every = values.run(aten.all.default, (equal,), {}, aten.all.default)
    >>> values.run(aten._local_scalar_dense.default, (every,), {}, aten._local_scalar_dense.default)
    False
    """

    def __init__(self) -> None:
        # By identity; each tensor is kept, so that its number is not given to another one.
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def without_data(self, tensor: Tensor) -> Tensor:
        """A meta tensor in the place of an input, the values of which are known from here on if they are few."""
        found = tensor.to("meta")
        if tensor.layout == torch.strided and tensor.numel() <= MOST and not tensor.is_meta:
            # A copy: the model may write into its inputs.
            self._known[id(found)] = found, tensor.detach().to("cpu", copy=True)
        return found

    def run(self, func: Any, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """The result of an op: what `run` returns for these arguments, or a value where `func` returns one that is known.

        Args:
            func: the op.
            args: its arguments.
            kwargs: its keyword arguments.
            run: of the arguments and keyword arguments; the op on meta tensors.
        """
        if not self._concerns(func, args, kwargs):
            return run(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        real = self._real(func, leaves)
        if real is not None and any(tag in func.tags for tag in _DATA_DEPENDENT):
            real_args, real_kwargs = tree_unflatten(real, spec)
            return self._on_meta(func(*real_args, **real_kwargs))
        out = run(*args, **kwargs)
        made = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        if real is None or any(leaf.numel() > MOST or not leaf.is_meta for leaf in made):
            self._forget_written(func, leaves)
            return out
        real_args, real_kwargs = tree_unflatten(real, spec)
        values = [leaf for leaf in tree_flatten(func(*real_args, **real_kwargs))[0] if isinstance(leaf, Tensor)]
        if schema_of(func).name.rpartition("::")[2] in UNINITIALISED:
            values = [torch.zeros_like(value) for value in values]
        self._known.update({id(one): (one, value) for one, value in zip(made, values, strict=True)})
        return out

    def _concerns(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an op may have a value, or change one. Fast, as it is called for every op."""
        known = self._known
        for each in args:
            if isinstance(each, Tensor):
                if id(each) in known:
                    return True
            elif isinstance(each, (list, tuple)) and any(id(leaf) in known for leaf in each):
                return True
        device = kwargs.get("device")
        return func in BY_SHAPE or (device is not None and device.type == "meta")

    def _real(self, func: Any, leaves: list[Any]) -> list[Any] | None:
        """The arguments on the CPU; None if one has no value, or the result is random."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        found: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.device):
                found.append(torch.device("cpu"))
            elif not isinstance(leaf, Tensor):
                found.append(leaf)
            elif (value := self._value(func, leaf)) is not None:
                found.append(value)
            else:
                return None
        return found

    def _value(self, func: Any, tensor: Tensor) -> Tensor | None:
        if not tensor.is_meta:
            small = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.numel() <= MOST
            return tensor.clone() if small and schema_of(func).is_mutable else tensor if small else None
        if (known := self._known.get(id(tensor))) is not None:
            # An op that changes a tensor's shape in place is not followed.
            return known[1] if known[1].shape == tensor.shape else None
        if func in BY_SHAPE and tensor.numel() <= MOST:
            return torch.empty_like(tensor, device="cpu")
        return None

    def _on_meta(self, found: Any) -> Any:
        """A result that meta tensors do not have: numbers as they are, tensors without data."""
        leaves, spec = tree_flatten(found)
        return tree_unflatten([self.without_data(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def _forget_written(self, func: Any, leaves: list[Any]) -> None:
        """What an op has written to without known values, and all that shares its memory, has none any more."""
        if not schema_of(func).is_mutable:
            return
        written = {storage_id(known[1]) for leaf in leaves if (known := self._known.get(id(leaf))) is not None}
        self._known = {key: pair for key, pair in self._known.items() if storage_id(pair[1]) not in written}
