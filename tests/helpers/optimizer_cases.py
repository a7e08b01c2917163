"""Every optimizer of torch, two models with one width each, and their resize by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from evolvenet.graph.index_map import IndexMap
from evolvenet.surgery.basis_change import BasisChange
from evolvenet.surgery.optimizer_state import apply_state, compile_state, validate_state

LR = 0.01

ELEMENTWISE: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "sgd momentum": partial(torch.optim.SGD, momentum=0.9),
    "sgd nesterov foreach": partial(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "adam": partial(torch.optim.Adam, foreach=False),
    "adam amsgrad foreach": partial(torch.optim.Adam, amsgrad=True, foreach=True),
    "adam amsgrad fused": partial(torch.optim.Adam, amsgrad=True, fused=True),
    "adamw": torch.optim.AdamW,
    "adamw fused": partial(torch.optim.AdamW, fused=True),
    "nadam": torch.optim.NAdam,
    "nadam foreach": partial(torch.optim.NAdam, foreach=True),
    "radam": torch.optim.RAdam,
    "radam foreach": partial(torch.optim.RAdam, foreach=True),
    "adamax": torch.optim.Adamax,
    "adamax foreach": partial(torch.optim.Adamax, foreach=True),
    "adadelta": torch.optim.Adadelta,
    "adadelta foreach": partial(torch.optim.Adadelta, foreach=True),
    "adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.1),
    "adagrad foreach": partial(torch.optim.Adagrad, foreach=True),
    "adagrad fused": partial(torch.optim.Adagrad, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "rmsprop centered foreach": partial(torch.optim.RMSprop, momentum=0.9, centered=True, foreach=True),
    "rprop": torch.optim.Rprop,
    "rprop foreach": partial(torch.optim.Rprop, foreach=True),
    "asgd": partial(torch.optim.ASGD, t0=3),
    "asgd foreach": partial(torch.optim.ASGD, t0=3, foreach=True),
}
OPTIMIZERS = {
    **ELEMENTWISE,
    "adafactor": torch.optim.Adafactor,
    "adafactor foreach": partial(torch.optim.Adafactor, foreach=True),
    "sparse adam": torch.optim.SparseAdam,
    **({"muon": torch.optim.Muon} if hasattr(torch.optim, "Muon") else {}),
}
SHRINK = IndexMap.keep([0, 2, 3, 6, 7], size=8)
GROW = IndexMap.of([0, -1, 1, 2, 3, 4, -1, -1], size=5)
SPLIT = IndexMap.of([7, 1, 1, 4], size=8)
AXES = {"w1": 0, "b1": 0, "w2": 1, "rows": 1}


@dataclass(frozen=True)
class Swap:
    """What `compile_state` needs to know of a change."""

    tensor: nn.Parameter
    name: str
    axes: Mapping[int, IndexMap]
    value: Tensor
    bases: Mapping[int, BasisChange] = field(default_factory=dict)


class Hidden(nn.Module):
    """One hidden width of 8: rows of `w1`, all of `b1`, columns of `w2`."""

    def __init__(self, biases: bool = True) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(8, 5))
        self.b1 = nn.Parameter(torch.randn(8)) if biases else None
        self.w2 = nn.Parameter(torch.randn(3, 8))

    def loss(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w1, self.b1).relu(), self.w2).square().mean()


class Table(nn.Module):
    """A sparse embedding whose second axis is the width."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(10, 8))

    def loss(self, x: Tensor) -> Tensor:
        ids = (x[:, 0].abs() * 7).long() % 6
        return F.embedding(ids, self.rows, sparse=True).square().mean()


def model_for(name: str) -> Hidden | Table:
    """The model that the optimizer can train: Muon takes matrices alone, SparseAdam sparse gradients alone."""
    return Table() if name == "sparse adam" else Hidden(biases=name != "muon")


def swaps(model: Hidden | Table, index_map: IndexMap) -> list[Swap]:
    """The change of the width, with random values for new units."""
    made = []
    for name, parameter in model.named_parameters():
        dim = AXES[name]
        value = index_map.apply(parameter.detach(), dim)
        for unit in index_map.new_units:
            value.select(dim, unit).normal_()
        made.append(Swap(parameter, name, {dim: index_map}, value))
    return made


def resize(model: Hidden | Table, optimizer: Optimizer, index_map: IndexMap) -> list[Swap]:
    """Change the width by hand and carry the state along."""
    changes = swaps(model, index_map)
    plan = compile_state(optimizer, changes)
    for change in changes:
        change.tensor.grad = None
        change.tensor.data = change.value
    apply_state(plan)
    validate_state(optimizer)
    return changes


def train(model: Hidden | Table, optimizer: Optimizer, steps: int, seed: int = 0) -> float:
    """A few steps; the last loss."""
    generator = torch.Generator().manual_seed(seed)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model.loss(torch.randn(16, 5, generator=generator, dtype=next(model.parameters()).dtype))
        loss.backward()
        losses.append(float(loss.detach()))
        return losses[-1]

    for _ in range(steps):
        optimizer.step(closure)
    return losses[-1]
