"""The data flow of one run of a model: which op produced and which ops consumed every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from evolvenet._compat.torch import schema_of, storage_id, tree_leaves, tree_map_only
from evolvenet.tracing.tracing_mode import TracingMode


class Value(int):
    """Number of a tensor in an `OpTrace`; a tensor that is written to in place gets a new one."""


@dataclass(frozen=True)
class Op:
    """One op that has run.

    Args:
        name: "convolution", "add", …; an in-place op has the name of the other one.
        args: its arguments, with a `Value` for every tensor.
        kwargs: the same by keyword.
        inputs: the tensors among them.
        output: its first result.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Value, ...]
    output: Value


class OpTrace(TracingMode):
    """Runs every op unchanged and records its inputs and its output.

    Args:
        tensors: parameters and buffers by name.

    Attributes:
        shapes: of every value.
        producers: value → the op that produced it; inputs and `own_values` have none.
        consumers: value → the ops that consumed it.
        own_values: the values of `tensors`.
        tensor_names: value → name of the tensor, for `own_values` and for what is computed from them alone.

    >>> import torch
    >>> weight = torch.ones(3, 2)
    >>> with (op_trace := OpTrace({"weight": weight})):
    ...     made = torch.mm(torch.ones(1, 2), weight.t()).relu_()
    >>> [op.name for op in op_trace.producers.values()]
    ['ones', 't', 'mm', 'relu']
    >>> sorted(op_trace.tensor_names.values())
    ['weight', 'weight']
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.producers: dict[Value, Op] = {}
        self.consumers: dict[Value, list[Op]] = {}
        self._values = WeakTensorKeyDictionary()
        self.tensor_names: dict[Value, str] = {self._new(tensor): name for name, tensor in tensors.items()}
        self.own_values = frozenset(self.tensor_names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and record it."""
        numbered, named = tree_map_only(Tensor, self._value_of, (args, kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if made:
            name = schema_of(func).name.rpartition("::")[2]
            if schema_of(func).is_mutable:
                name = name.removesuffix("_")
                self._renumber(made)
            inputs = tuple(leaf for leaf in tree_leaves((numbered, named)) if isinstance(leaf, Value))
            self._note(Op(name, numbered, named, inputs, self._new(made[0])))
        return out

    def _note(self, op: Op) -> None:
        self.producers[op.output] = op
        for value in set(op.inputs):
            self.consumers.setdefault(value, []).append(op)
        if op.inputs and all(value in self.tensor_names for value in op.inputs):
            self.tensor_names[op.output] = self.tensor_names[op.inputs[0]]

    def _value_of(self, tensor: Tensor) -> Value:
        known = self._values.get(tensor)
        return self._new(tensor) if known is None else known

    def _new(self, tensor: Tensor) -> Value:
        value = self._values[tensor] = Value(len(self.shapes))
        self.shapes.append(tuple(tensor.shape))
        return value

    def _renumber(self, written: list[Tensor]) -> None:
        """Give a new number to all tensors that share memory with one that was written to."""
        places = {storage_id(tensor) for tensor in written}
        for tensor in [tensor for tensor in self._values if storage_id(tensor) in places]:
            self._new(tensor)
