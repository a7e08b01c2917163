"""The networks, the data and the training of `experiments.compare.pruning`, the same for every method."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format
from torchvision.transforms.v2 import functional as images_of

from experiments.compare.copies import fingerprint
from experiments.data.images import Augment, BatchLoader, Cifar10Data, DigitsData, ImageData, MnistData, Split
from experiments.models.resnet import ResNet
from experiments.pages import write_whole

CALIBRATION = 1024
"""Training images that methods with data measure on; BatchNorm is re-estimated on the same ones."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Whose running statistics are re-estimated."""


@dataclass(frozen=True)
class Task:
    """A data set and the network that is trained on it.

    Args:
        name: of the task; the cache's folder.
        read: directory → the data module.
        build: a fresh network, its weights from torch's global random state.
        moments: mean and deviation of the training pixels, one each a channel.
        epochs: of the uncut network's training.
        seeds: of the networks in the comparison, by default.
        augment: for training batches; None for none.
        rate: largest learning rate of the uncut network's training.
        batch: images a training batch.
        default: whether it is run where the command names no data set.
    """

    name: str
    read: Callable[[Path], ImageData]
    build: Callable[[], nn.Module]
    moments: tuple[tuple[float, ...], tuple[float, ...]]
    epochs: int
    seeds: tuple[int, ...] = (0, 1, 2)
    augment: Augment = field(default_factory=Augment)
    rate: float = 3e-3
    batch: int = 256
    default: bool = True

    def normalise(self, images: Tensor) -> Tensor:
        """Images uint8 `[N, channels, H, W]` → the network's input, float, normalised."""
        return self._scaled(images_of.to_dtype(images, torch.float32, scale=True))

    def augmented(self, images: Tensor, generator: Generator) -> Tensor:
        """The same with the task's augmentation, drawn from the generator."""
        return self._scaled(self.augment(images_of.to_dtype(images, torch.float32, scale=True), generator))

    def _scaled(self, pixels: Tensor) -> Tensor:
        mean, deviation = self.moments
        return images_of.normalize(pixels, list(mean), list(deviation))


def tasks() -> dict[str, Task]:
    """Every task by name; the last one is for tests and trials."""
    mnist = Task(
        "mnist",
        lambda root: MnistData(root=root),
        lambda: ResNet(1, 10, (24, 48, 96), (2, 2, 2), (1, 2, 2), stem_stride=2, hidden=64),
        ((0.1307,), (0.3081,)),
        epochs=4,
        augment=Augment(shift=1),
    )
    cifar10 = Task(
        "cifar10",
        lambda root: Cifar10Data(root=root),
        lambda: ResNet(3, 10, (32, 64, 128), (1, 2, 2), (1, 2, 2), stem_stride=1, hidden=64),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        epochs=12,
        seeds=(0,),
        augment=Augment(shift=3, flip=True),
        batch=128,
    )
    digits = Task(
        "digits",
        lambda root: DigitsData(),
        lambda: ResNet(1, 10, (16, 48), (1, 1), (1, 2), hidden=24),
        ((0.3053,), (0.3761,)),
        epochs=2,
        seeds=(0,),
        batch=64,
        default=False,
    )
    return {task.name: task for task in (mnist, cifar10, digits)}


@dataclass(frozen=True)
class TaskData:
    """A task with its data in memory."""

    task: Task
    train: Split
    test: tuple[Tensor, Tensor]

    @classmethod
    def open(cls, task: Task, root: Path) -> TaskData:
        """Read the data: the whole training split for training, the test split for the accuracies.

        Raises:
            DataError: if the data is not there.
        """
        train, test = task.read(root).read()
        return cls(task, train, (task.normalise(test.images), test.labels))

    @property
    def example(self) -> Tensor:
        """Two images, for the trace."""
        return self.task.normalise(self.train.images[:2])

    def calibration(self, seed: int, count: int = CALIBRATION) -> list[Tensor]:
        """Training images without augmentation, in batches of 256, for the methods that measure on data."""
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(seed))
        return list(self.task.normalise(self.train.images[order[:count]]).split(256))

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that the model classifies correctly, in eval mode."""
        images, labels = self.test
        model.eval()
        with torch.no_grad():
            # Small batches: memory for larger activations goes back to the system each time, and costs as much as the layers.
            chosen = torch.cat([model(part).argmax(1) for part in images.split(100)])
        return float(chosen.eq(labels).double().mean())

    def fit(self, model: nn.Module, seed: int, epochs: int, rate: float, warm: float) -> float:
        """Train with AdamW on all training images; the order and the augmentation depend on the seed alone.

        Forward in bfloat16 (autocast), weights and optimizer in float32.

        Args:
            model: is trained in place.
            seed: of the order of the images and of their augmentation.
            epochs: how many.
            rate: the largest learning rate.
            warm: share of the steps in which the rate rises to it; it then falls to 0 along a cosine.

        Returns:
            Seconds that an epoch took.
        """
        loader = BatchLoader(self.train, self.task.batch, self.task.augmented, shuffle=True, seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
        total = epochs * len(loader)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=warm)
        begin = time.perf_counter()
        convert_conv2d_weight_memory_format(model.train(), torch.channels_last)
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for images, labels in loader:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(images.contiguous(memory_format=torch.channels_last))
                functional.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
                schedule.step()
        convert_conv2d_weight_memory_format(model.eval(), torch.contiguous_format)
        return (time.perf_counter() - begin) / epochs


def uncut(data: TaskData, seed: int, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a seed: read from the folder if it is there, else trained and saved there.

    Returns:
        The network in eval mode, and its record: accuracy on the test split, parameters, seconds an epoch took, and
        "weights", a fingerprint of the trained weights.
    """
    weights, record = folder / "uncut.pt", folder / "uncut.json"
    torch.manual_seed(seed)
    model = data.task.build()
    if record.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval(), json.loads(record.read_text(encoding="utf-8"))
    seconds = data.fit(model, seed, data.task.epochs, data.task.rate, warm=0.3)
    found = {
        "accuracy": data.accuracy(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": data.task.epochs,
        "seconds_an_epoch": round(seconds, 1),
        "weights": fingerprint(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    write_whole(record, json.dumps(found, indent=1))
    return model, found


def reestimate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimate BatchNorm's running statistics as the plain mean over batches; leaves the model in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        # By itself: dropout would change what the others see.
        norm.train()
    with torch.no_grad():
        for batch in batches:
            _ = model(**batch) if isinstance(batch, dict) else model(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
