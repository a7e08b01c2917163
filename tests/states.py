"""Everything that must stay bit for bit when nothing is to be changed, taken down and compared."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class State:
    """A model, its optimizers and the random generators at one moment.

    Args:
        tensors: (where, the object itself, its values, its strides) of every tensor that belongs to the model.
        plain: (where, repr) of everything else that can be read.
    """

    tensors: tuple[tuple[str, Tensor, Tensor, tuple[int, ...]], ...]
    plain: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> State:
        tensors: list[tuple[str, Tensor, Tensor, tuple[int, ...]]] = []
        plain: list[tuple[str, str]] = []

        def note(where: str, value: Any) -> None:
            leaves, structure = tree_flatten(value)
            plain.append((f"{where} structure", str(structure)))
            for k, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    tensors.append((f"{where}.{k}", leaf, leaf.detach().clone(), leaf.stride()))
                    if leaf.is_leaf and leaf.grad is not None:
                        tensors.append((f"{where}.{k}.grad", leaf.grad, leaf.grad.clone(), leaf.grad.stride()))
                elif not isinstance(leaf, nn.Module) and " at 0x" not in repr(leaf):
                    plain.append((f"{where}.{k}", repr(leaf)))

        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name != "_modules":
                    note(f"{path}.{name}", dict(value) if name in _TABLES else value)
            plain.append((f"{path} children", str(list(module._modules))))
        for k, optimizer in enumerate(optimizers):
            note(f"optimizer {k} groups", [dict(group) for group in optimizer.param_groups])
            note(f"optimizer {k} state", [optimizer.state[p] for p in optimizer.state])
            plain.append((f"optimizer {k} keys", str([id(p) for p in optimizer.state])))
        tensors.append(("torch generator", torch.get_rng_state(), torch.get_rng_state(), (1,)))
        plain.append(("numpy generator", str(np.random.get_state())))
        plain.append(("python generator", str(random.getstate())))
        return cls(tuple(tensors), tuple(plain))

    def differences(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> list[str]:
        """What is not as it was, by name; the tensors must be the same objects too."""
        now = State.of(model, optimizers)
        found = [where for where in dict(self.plain).keys() ^ dict(now.plain).keys()]
        found += [w for w, value in self.plain if dict(now.plain).get(w, value) != value]
        here = {where: entry for where, *entry in now.tensors}
        for where, tensor, values, strides in self.tensors:
            if where not in here:
                found.append(f"{where} is gone")
            elif where == "torch generator":
                found += [where] * (not torch.equal(values, here[where][1]))
            elif here[where][0] is not tensor:
                found.append(f"{where} is another object")
            elif not same_bits(values, here[where][1]) or strides != here[where][2]:
                found.append(where)
        return found


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same type, shape and entries, NaN included."""
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())


def twin(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return copy.deepcopy(model.state_dict())
