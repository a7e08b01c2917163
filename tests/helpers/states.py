"""A copy of all state of a model, its optimizers and the random generators, to compare with later bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from evolvenet import IndexMap, WidthGraph


@dataclass(frozen=True, eq=False)
class TensorState:
    """A tensor as it was: the object itself, its values and its strides."""

    tensor: Tensor
    values: Tensor
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorState:
        return cls(tensor, tensor.detach().clone(), tensor.stride())


@dataclass(frozen=True, eq=False)
class State:
    """A model, its optimizers and the random generators at one moment.

    Args:
        tensors: every tensor that belongs to the model or an optimizer, by where it is.
        plain: the repr of everything else that can be read, by where it is.
    """

    tensors: Mapping[str, TensorState]
    plain: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> State:
        tensors: dict[str, TensorState] = {}
        plain: dict[str, str] = {}

        def note(where: str, value: Any) -> None:
            leaves, structure = tree_flatten(value)
            plain[f"{where} structure"] = str(structure)
            for k, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    tensors[f"{where}.{k}"] = TensorState.of(leaf)
                    if leaf.is_leaf and leaf.grad is not None:
                        tensors[f"{where}.{k}.grad"] = TensorState.of(leaf.grad)
                elif not isinstance(leaf, nn.Module) and " at 0x" not in repr(leaf):
                    plain[f"{where}.{k}"] = repr(leaf)

        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name != "_modules":
                    note(f"{path}.{name}", value)
            plain[f"{path} children"] = str(list(module._modules))
        for k, optimizer in enumerate(optimizers):
            note(f"optimizer {k} groups", [dict(group) for group in optimizer.param_groups])
            note(f"optimizer {k} state", [optimizer.state[p] for p in optimizer.state])
            plain[f"optimizer {k} keys"] = str([id(p) for p in optimizer.state])
        plain["generators"] = f"{torch.get_rng_state().tolist()} {np.random.get_state()} {random.getstate()}"
        return cls(tensors, plain)

    def differences(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> list[str]:
        """What is not as it was, by name; the tensors must be the same objects too."""
        now = State.of(model, optimizers)
        found = sorted(self.tensors.keys() ^ now.tensors.keys()) + sorted(self.plain.keys() ^ now.plain.keys())
        found += [where for where in self.plain.keys() & now.plain.keys() if self.plain[where] != now.plain[where]]
        for where in self.tensors.keys() & now.tensors.keys():
            one, two = self.tensors[where], now.tensors[where]
            if one.tensor is not two.tensor:
                found.append(f"{where} is another object")
            elif not same_bits(one.values, two.values) or one.strides != two.strides:
                found.append(where)
        return found


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same type, shape and entries, NaN included."""
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())


def zero_units(model: nn.Module, graph: WidthGraph, maps: Mapping[str, IndexMap]) -> None:
    """Set to 0, in place, every entry of the units that the maps remove: what pruning must be equal to."""
    tensors = model.state_dict()
    for name, index_map in maps.items():
        for tie in graph.widths[name].ties:
            axis = tensors[tie.tensor].movedim(tie.dim, 0)
            for unit in index_map.removed:
                axis[tie.start + unit * tie.repeat : tie.start + (unit + 1) * tie.repeat] = 0
