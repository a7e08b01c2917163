"""Train a network, change its widths once, train on with the state carried and with fresh optimizers."""

from __future__ import annotations

import evolvenet  # isort: skip  # before torchvision, which it patches

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from experiments.data.images import MnistData
from experiments.models.resnet import ResNet

KEPT, GROWN = 0.7, 1.25
"""Sizes after a cut and after a growth, as shares of each width."""

BATCH = 64
CALIBRATION = 8
"""Batches that a cut is reconstructed on."""

EVENTS = ("no change", "cut", "growth")
STATES = ("carried", "reset")


@dataclass(frozen=True)
class Subject:
    """A network and how it is trained.

    Args:
        optimizer: name of the optimizer.
        network: its name in `NETWORKS`.
        make: (model, learning rate) → optimizers.
        rates: learning rates.
    """

    optimizer: str
    network: str
    make: Callable[[nn.Module, float], list[Optimizer]]
    rates: tuple[float, ...]


def sgd(model: nn.Module, rate: float) -> list[Optimizer]:
    """SGD with momentum 0.9."""
    return [torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)]


def adamw(model: nn.Module, rate: float) -> list[Optimizer]:
    """AdamW with its defaults."""
    return [torch.optim.AdamW(model.parameters(), lr=rate)]


def muon(model: nn.Module, rate: float) -> list[Optimizer]:
    """Muon for the matrices, since it takes no other parameters, and AdamW for the rest."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return [torch.optim.Muon(matrices, lr=rate, weight_decay=0.01), torch.optim.AdamW(rest, lr=rate / 5)]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: ResNet(1, widths=(16, 32, 64), blocks=(1, 1, 1), strides=(1, 2, 2), stem_stride=2, hidden=64),
    "dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ),
}
SUBJECTS = (
    Subject("SGD, momentum", "ResNet", sgd, (0.01, 0.05)),
    Subject("AdamW", "ResNet", adamw, (5e-4, 2e-3)),
    Subject("Muon + AdamW", "dense", muon, (0.003, 0.01)),
)


class Batches:
    """Random batches of MNIST's training images, averaged to 14 × 14; the same ones for the same seed."""

    def __init__(self, root: Path) -> None:
        self.data = MnistData(root, val_size=1)
        self.data.setup()

    def __call__(self, seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches of (images `[BATCH, 1, 14, 14]`, labels)."""
        images, labels = self.data.splits["train"]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            index = torch.randint(0, len(labels), (BATCH,), generator=generator)
            yield functional.avg_pool2d(self.data.normalise(images[index]), 2), labels[index]


@dataclass
class Ratios:
    """Mean |update| of units over that of all survivors in the same tensor.

    An update is what a step adds to a parameter, decoupled weight decay left out. Survivors taken in groups of as many
    as there are new units show how far such a mean strays by chance.

    Args:
        shapes: of the parameters before they grew, by name; new units come last on every axis.
        largest: over tensors, axes and steps, by ("weights" or "vectors", "new units", "survivors" in groups as large,
            "one new unit" or "one survivor").
        steps: the ratio of the new units at each step, by (tensor, axis).
    """

    shapes: Mapping[str, torch.Size]
    largest: dict[tuple[str, str], float] = field(default_factory=dict)
    steps: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def note(self, updates: Mapping[str, Tensor]) -> None:
        """Add one step's updates, by parameter."""
        for name, old in self.shapes.items():
            size = updates[name].abs()
            level = float(size[tuple(slice(count) for count in old)].mean())
            for dim, count in enumerate(old):
                if size.shape[dim] > count and level > 0:
                    units = size.movedim(dim, 0).flatten(1).mean(1) if size.dim() > 1 else size
                    self._note_axis(name, dim, units[count:] / level, units[:count] / level)

    def _note_axis(self, name: str, dim: int, new_units: Tensor, survivors: Tensor) -> None:
        groups = survivors[: len(survivors) // len(new_units) * len(new_units)].view(-1, len(new_units)).mean(1)
        self.steps.setdefault((name, dim), []).append(float(new_units.mean()))
        kind = "weights" if len(self.shapes[name]) > 1 else "vectors"
        found = {"new units": new_units.mean(), "survivors": groups.max()}
        found |= {"one new unit": new_units.max(), "one survivor": survivors.max()}
        for who, ratio in found.items():
            self.largest[kind, who] = max(self.largest.get((kind, who), 0.0), float(ratio))


def train(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterator[tuple[Tensor, Tensor]],
    ratios: Ratios | None = None,
) -> list[float]:
    """Train on the batches; the loss of each step."""
    losses = []
    for images, labels in batches:
        loss = functional.cross_entropy(model(images), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        before = _decayed(model, optimizers) if ratios else {}
        for optimizer in optimizers:
            optimizer.step()
        if ratios:
            ratios.note({name: model.get_parameter(name).detach() - old for name, old in before.items()})
        losses.append(float(loss.detach()))
    return losses


def _decayed(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The parameters as weight decay alone would leave them; SGD here has none."""
    decay = {
        parameter: group["lr"] * group["weight_decay"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: parameter.detach() * (1 - decay[parameter]) for name, parameter in model.named_parameters()}


def change(event: str, model: nn.Module, optimizers: Sequence[Optimizer], batches: Batches, seed: int) -> None:
    """Do the event to the model and its optimizers."""
    if event == "no change":
        return
    images = [images for images, _ in batches(seed, CALIBRATION)]
    graph = evolvenet.trace(model, images[0][:1])
    share = KEPT if event == "cut" else GROWN
    sizes = {name: round(share * size) for name, size in graph.sizes.items()}
    if event == "cut":
        evolvenet.prune(model, graph, sizes, batches=images, optimizers=optimizers)
    else:
        generator = torch.Generator().manual_seed(seed)
        evolvenet.grow(model, graph, sizes, optimizers=optimizers, generator=generator)


@dataclass(frozen=True)
class Outcome:
    """One event on one trained network: by state, the mean loss after it and the updates of its new units."""

    losses: Mapping[str, float]
    ratios: Mapping[str, Ratios]

    @property
    def difference(self) -> float:
        """Mean loss with the carried state less that with fresh optimizers."""
        return self.losses["carried"] - self.losses["reset"]


def outcomes(subject: Subject, rate: float, seed: int, batches: Batches, before: int, after: int) -> dict[str, Outcome]:
    """Train one network, then do each event to a copy of it, and go on with the state carried and reset."""
    torch.manual_seed(seed)
    model = NETWORKS[subject.network]()
    optimizers = subject.make(model, rate)
    train(model, optimizers, batches(3 * seed, before))
    found = {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for event in EVENTS:
        changed, kept = copy.deepcopy((model, optimizers))
        change(event, changed, kept, batches, 3 * seed + 1)
        again = copy.deepcopy(changed)
        runs = {"carried": (changed, kept), "reset": (again, subject.make(again, rate))}
        ratios = {state: Ratios(shapes) for state in STATES}
        losses = {
            state: mean(train(*runs[state], batches(3 * seed + 2, after), ratios[state] if event == "growth" else None))
            for state in STATES
        }
        found[event] = Outcome(losses, ratios)
    return found
