"""A model's run, operation by operation: what was made out of what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from evolvenet.tracing.trace import TracingMode


class Value(int):
    """Number of a tensor in a `Record`; one that is written into gets a new number."""


@dataclass(frozen=True)
class Op:
    """One operation that ran.

    Args:
        name: "convolution", "add", …; of one in place that of the other.
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


class Record(TracingMode):
    """Lets every op run as it is and writes down what it read and made.

    Args:
        tensors: parameters and buffers by name.

    Attributes:
        shapes: of every value.
        makers: for every value but inputs and `own` ones the op that made it.
        readers: the ops that read a value.
        own: the values of the tensors themselves.
        held: name of the tensor for each of `own` and for all that is made of them alone.

    >>> import torch
    >>> weight = torch.ones(3, 2)
    >>> with (record := Record({"weight": weight})):
    ...     made = torch.mm(torch.ones(1, 2), weight.t()).relu_()
    >>> [op.name for op in record.makers.values()]
    ['ones', 't', 'mm', 'relu']
    >>> sorted(record.held.values())
    ['weight', 'weight']
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.makers: dict[Value, Op] = {}
        self.readers: dict[Value, list[Op]] = {}
        self._values = WeakTensorKeyDictionary()
        self.held: dict[Value, str] = {self._new(tensor): name for name, tensor in tensors.items()}
        self.own = frozenset(self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and write it down."""
        numbered, named = tree_map_only(Tensor, self._of, (args, kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if made:
            name = func._schema.name.rpartition("::")[2]
            if func._schema.is_mutable:
                name = name.removesuffix("_")
                self._forget(made)
            inputs = tuple(leaf for leaf in tree_leaves((numbered, named)) if isinstance(leaf, Value))
            self._note(Op(name, numbered, named, inputs, self._new(made[0])))
        return out

    def _note(self, op: Op) -> None:
        self.makers[op.output] = op
        for value in set(op.inputs):
            self.readers.setdefault(value, []).append(op)
        if op.inputs and all(value in self.held for value in op.inputs):
            self.held[op.output] = self.held[op.inputs[0]]

    def _of(self, tensor: Tensor) -> Value:
        known = self._values.get(tensor)
        return self._new(tensor) if known is None else known

    def _new(self, tensor: Tensor) -> Value:
        value = self._values[tensor] = Value(len(self.shapes))
        self.shapes.append(tuple(tensor.shape))
        return value

    def _forget(self, written: list[Tensor]) -> None:
        """What shares memory with a tensor that was written into is no longer what it was."""
        places = {tensor.untyped_storage()._cdata for tensor in written}
        for tensor in [tensor for tensor in self._values if tensor.untyped_storage()._cdata in places]:
            self._new(tensor)
