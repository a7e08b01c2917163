"""The networks of `experiments.compare.lowrank`, trained as those of `experiments.compare.networks` are."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from experiments.compare import networks
from experiments.compare.networks import Task
from experiments.data.images import Augment, MnistData
from experiments.models.vit import VisionTransformer


def tasks() -> dict[str, Task]:
    """Every task by name; the last one is for tests and trials.

    The residual networks are those of `experiments.compare.networks`. That of CIFAR-10 has fewer epochs, since three are
    trained.
    """
    known = networks.tasks()
    mnist = known["mnist"]
    cifar10 = replace(known["cifar10"], epochs=5, seeds=(0, 1, 2))
    vit = Task(
        "mnist_vit",
        lambda root: MnistData(root=root),
        lambda: VisionTransformer(1, size=28, patch=7, width=128, depth=4, heads=4),
        mnist.moments,
        epochs=6,
        augment=Augment(shift=1),
        rate=1e-3,
        batch=128,
    )
    dense = Task(
        "mnist_dense",
        lambda root: MnistData(root=root),
        lambda: nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(784, 512), nn.ReLU()),
            *(nn.Linear(512, 512), nn.ReLU()),
            *(nn.Linear(512, 512), nn.ReLU()),
            nn.Linear(512, 10),
        ),
        mnist.moments,
        epochs=3,
        rate=1e-3,
    )
    return {task.name: task for task in (mnist, cifar10, vit, dense, known["digits"])}
