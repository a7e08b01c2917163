"""Modes under which the numbers that a model computes can be compared between two runs with other widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import in_backward, schema_of, storage_id, tree_leaves, tree_map_only
from evolvenet.tracing.reasons import running_line
from evolvenet.tracing.tracing_mode import TracingMode

NARROWER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
RANDOM = 0.5
"""The number that takes the place of every random one: the random numbers of two runs of other widths never agree."""
SAMPLES = 256
"""Values kept of each tensor to find the first op that computes others."""


CONVOLUTION = torch.ops.aten.convolution.default


class NumbersMode(TracingMode):
    """Runs every op, in double precision if so wanted, also where the code asks for less, and with constants for random numbers.

    Args:
        dtype: that the model computes in; with float64 a module's own parameters have it while the module runs, and
            other narrower tensors are cast on their way into an op.

    Attributes:
        shared: storages that the model's code may not write to, see `storage_id`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.shared: frozenset[int] = frozenset()
        self._narrow: list[list[tuple[Tensor, Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        kwargs = kwargs or {}
        self._refuse_writes(func, args, kwargs)
        if self.dtype == torch.float64:
            args, kwargs = self._widened(func, args, kwargs)
        if func is CONVOLUTION and _is_channels_last(args[0]):
            # The kernel in double precision takes ten times as long on such an input.
            contiguous = super().__torch_dispatch__(func, types, (args[0].contiguous(), *args[1:]), kwargs)
            return contiguous.contiguous(memory_format=torch.channels_last)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            out = _without_chance(func, args, out)
        return out

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        super()._enter_module(module, inputs)
        narrow = [tensor for tensor in module.parameters(recurse=False) if tensor.dtype in NARROWER]
        self._narrow.append([(tensor, tensor.data) for tensor in narrow if self.dtype == torch.float64])
        for tensor, value in self._narrow[-1]:
            tensor.data = value.to(NARROWER[value.dtype])

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        super()._leave_module(module, inputs, output)
        for tensor, value in self._narrow.pop():
            tensor.data = value

    def _refuse_writes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        schema = schema_of(func)
        if not self.shared or not schema.is_mutable:
            return
        positional = dict(enumerate(args))
        for place, argument in enumerate(schema.arguments):
            given = positional.get(place, kwargs.get(argument.name))
            for leaf in tree_leaves(given) if argument.is_write else ():
                if isinstance(leaf, Tensor) and storage_id(leaf) in self.shared:
                    raise RuntimeError(f"{schema.name} writes to a parameter, which the model's copy does not own.")

    def _widened(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wanted = kwargs.get("dtype")
        if wanted in NARROWER:
            kwargs = {**kwargs, "dtype": NARROWER[wanted]}
        schema = schema_of(func)
        # A copy of what an op writes to, or takes a view of, would not be what the code goes on with.
        if schema.is_mutable or any(item.alias_info is not None for item in schema.returns):
            return args, kwargs
        return tree_map_only(Tensor, lambda t: t.to(NARROWER[t.dtype]) if t.dtype in NARROWER else t, (args, kwargs))


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _without_chance(func: Any, args: Any, out: Any) -> Any:
    """The result of a random op with a constant instead of random numbers; random integers, which are indices, stay."""
    if "dropout" in schema_of(func).name:
        return (
            (args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)) if isinstance(out, tuple) else args[0].clone()
        )
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.fill_(RANDOM)
    return out


class Sampled(NumbersMode):
    """Keeps a few values of what each op computes.

    Attributes:
        values: op by op, its name and the values, `[up to 256]`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.values: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and keep values."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not in_backward():
            flat = _numbers(out)
            step = max(1, len(flat) // SAMPLES)
            self.values.append((schema_of(func).name, flat[::step][:SAMPLES].clone()))
        return out


class FirstDifference(NumbersMode):
    """Finds the first op that does not compute what it has computed in another run, in whatever order.

    Args:
        dtype: as of `NumbersMode`.
        values: of the other run, see `Sampled`.
        tolerance: relative to the largest value.

    Attributes:
        found: the op with its module, and the line of the model's code; None as long as there is none.
    """

    def __init__(self, dtype: torch.dtype, values: Sequence[tuple[str, Tensor]], tolerance: float) -> None:
        super().__init__(dtype)
        self.values, self.tolerance = values, tolerance
        self.place = 0
        self.found: tuple[str, str] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and compare values."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.found is None and not in_backward():
            name = schema_of(func).name
            if self.place < len(self.values) and not self._agrees(name, _numbers(out)):
                where = self.path[-1] if self.path else "the model"
                self.found = f"{name} in {where}", running_line()
            self.place += 1
        return out

    def _agrees(self, name: str, numbers: Tensor) -> bool:
        """Whether each value of the other run is among these numbers."""
        before, values = self.values[self.place]
        if before != name or len(numbers) < len(values):
            return False
        if not len(values):
            return True
        ordered = numbers.sort().values
        right = torch.searchsorted(ordered, values).clamp(max=len(ordered) - 1)
        nearest = torch.minimum((ordered[right] - values).abs(), (ordered[(right - 1).clamp(min=0)] - values).abs())
        scale = values.abs().max().clamp(min=1e-12)
        return bool((nearest <= self.tolerance * scale).all())


def _numbers(out: Any) -> Tensor:
    """The finite numbers of the first floating-point tensor that an op has returned, flat; of complex ones both parts."""
    for leaf in tree_leaves(out):
        if (
            isinstance(leaf, Tensor)
            and leaf.layout == torch.strided
            and (leaf.is_floating_point() or leaf.is_complex())
        ):
            flat = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            flat = flat.detach().reshape(-1)
            return flat[flat.isfinite()]
    return torch.zeros(0)
