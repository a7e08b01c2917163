"""Trained networks and their tasks as `experiments.compare.time_to_accuracy` needs them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

import evolvenet
from evolvenet.measurement.output_error import OutputMeasure
from experiments.compare.few_samples import SETTINGS, polished
from experiments.compare.language_networks import SMALL, TINY, Setting, Text, Uncut, build, drawn, loss_of, windows
from experiments.compare.language_peers import parameters
from experiments.compare.language_polish import Polished
from experiments.compare.networks import TaskData, tasks, uncut
from experiments.data.images import BatchLoader


@dataclass(frozen=True)
class Ways:
    """How networks of one task are trained here.

    Args:
        lengths: optimizer steps of a whole cycle of the learning rate, ascending.
        cut: largest learning rates that are tried after a cut.
        scratch: those that are tried from scratch.
        warm: share of the steps in which the rate rises, after a cut and from scratch.
        watches: how often the accuracy is watched in a cycle.
        margins: points of accuracy below the uncut network, ascending; training ends where the first is reached.
    """

    lengths: Sequence[int]
    cut: Sequence[float]
    scratch: Sequence[float]
    warm: tuple[float, float] = (0.05, 0.3)
    watches: int = 10
    margins: Sequence[float] = (1, 2, 3, 5)


class Subject(ABC):
    """A trained network, and what its task trains and is measured on.

    Args:
        name: of the task.
        seed: of the network.
        model: the trained network, in eval mode.
        weights: a fingerprint of its weights.
        ways: how it is trained here.
    """

    outputs: str | None = None
    """Which outputs count, as for `evolvenet.trace`."""
    heads = False
    """Whether whole heads are widths."""
    measure: OutputMeasure = "outputs"
    """What `evolvenet.allocate` goes by."""

    def __init__(self, name: str, seed: int, model: nn.Module, weights: str, ways: Ways) -> None:
        self.name, self.seed, self.model, self.weights, self.ways = name, seed, model, weights, ways

    @property
    @abstractmethod
    def example(self) -> Any:
        """Inputs for the trace."""

    @abstractmethod
    def calibration(self) -> list[Any]:
        """Unlabelled training samples for the cut, in batches."""

    @abstractmethod
    def polish(self, model: nn.Module) -> evolvenet.Polish:
        """Train a cut network in place on the calibration samples, without labels."""

    @abstractmethod
    def fresh(self) -> nn.Module:
        """The uncut architecture with new weights from torch's global random state."""

    @abstractmethod
    def training(self, seed: int) -> Iterator[Any]:
        """Training batches without end; they depend on the seed alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a training batch, for the backward pass."""

    @abstractmethod
    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """As the uncut network was trained with."""

    @abstractmethod
    def accuracy(self, model: nn.Module, part: str) -> float:
        """Share of right answers, 0 … 1, on the "watched" or the "judged" part; the model is in eval mode afterwards."""

    def begin(self, model: nn.Module) -> None:  # noqa: B027  most models need nothing
        """Bring a model into the form in which it is trained."""

    def clip(self, model: nn.Module) -> None:  # noqa: B027  likewise
        """Between backward pass and step."""


class Images(Subject):
    """A network of `experiments.compare.networks`.

    The uncut network has been trained on all training images. So the test split is halved: the images at even places are
    watched while a network trains, those at odd places are looked at once a network, where it has reached the accuracy.

    Args:
        data: the task with its data.
        seed: of the network.
        folder: of the trained network.
        ways: how it is trained here.
    """

    def __init__(self, data: TaskData, seed: int, folder: Path, ways: Ways) -> None:
        model, trained = uncut(data, seed, folder)
        super().__init__(data.task.name, seed, model, trained["weights"], ways)
        images, labels = data.test
        self.data = data
        self._parts = {"watched": (images[::2], labels[::2]), "judged": (images[1::2], labels[1::2])}

    @property
    def example(self) -> Tensor:
        """See `Subject.example`."""
        return self.data.example

    def calibration(self) -> list[Tensor]:
        """See `Subject.calibration`."""
        return self.data.calibration(self.seed)

    def polish(self, model: nn.Module) -> evolvenet.Polish:
        """See `Subject.polish`; as in `experiments.compare.few_samples`."""
        setting, removed = SETTINGS[self.name], round(100 * (1 - parameters(model) / parameters(self.model)))
        return polished(model, self.model, self.calibration(), setting, setting.by_size.get(removed, {}))

    def fresh(self) -> nn.Module:
        """See `Subject.fresh`."""
        return self.data.task.build()

    def training(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Subject.training`."""
        task = self.data.task
        loader = BatchLoader(self.data.train, task.batch, task.augmented, shuffle=True, seed=seed)
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from loader

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """See `Subject.loss`; forward in bfloat16, as the uncut network's training."""
        images, labels = batch
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(logits.float(), labels)

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """See `Subject.optimizer`."""
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)

    def begin(self, model: nn.Module) -> None:
        """See `Subject.begin`."""
        convert_conv2d_weight_memory_format(model, torch.channels_last)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: str) -> float:
        """See `Subject.accuracy`."""
        images, labels = self._parts[part]
        model.eval()
        return float(torch.cat([model(each).argmax(1) for each in images.split(100)]).eq(labels).double().mean())


class Characters(Subject):
    """A GPT-2 of two layers on the text of `experiments.compare.language`: right answers are the next characters.

    Validation text is watched, test text is looked at once a network, where it has reached the accuracy.

    Args:
        text: its text.
        setting: how large everything is.
        seed: of the network.
        folder: of the trained network.
        ways: how it is trained here.
    """

    outputs = "logits"
    heads = True
    measure = "kl"

    def __init__(self, text: Text, setting: Setting, seed: int, folder: Path, ways: Ways) -> None:
        self.uncut = Uncut.of("gpt2", seed, text, setting, folder, "cpu")
        super().__init__("gpt2", seed, self.uncut.model, self.uncut.record["weights"], ways)
        parts = {"watched": text.validation, "judged": text.test}
        self._parts = {name: windows(part, setting.context, setting.judged) for name, part in parts.items()}

    @property
    def example(self) -> dict[str, Tensor]:
        """See `Subject.example`."""
        return self.uncut.example

    def calibration(self) -> list[dict[str, Tensor]]:
        """See `Subject.calibration`."""
        return self.uncut.calibration()

    def polish(self, model: nn.Module) -> evolvenet.Polish:
        """See `Subject.polish`; as in `experiments.compare.language_polish`, but with few steps, as these count here."""
        settings = {"steps": 200, "rate": 2e-3, "batch_size": 32, "loss": "kl"}
        return Polished(self.uncut, written=3, settings=settings).polish(model)

    def fresh(self) -> nn.Module:
        """See `Subject.fresh`."""
        return build("gpt2", self.uncut.setting)

    def training(self, seed: int) -> Iterator[Tensor]:
        """See `Subject.training`."""
        generator, setting = torch.Generator().manual_seed(seed), self.uncut.setting
        while True:
            yield drawn(self.uncut.text.train, setting.context, setting.batch, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """See `Subject.loss`."""
        return loss_of(model, batch)

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """See `Subject.optimizer`."""
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)

    def clip(self, model: nn.Module) -> None:
        """See `Subject.clip`."""
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: str) -> float:
        """See `Subject.accuracy`."""
        model.eval()
        chosen = [
            model(input_ids=each[:, :-1]).logits.argmax(-1).eq(each[:, 1:]) for each in self._parts[part].split(64)
        ]
        return float(torch.cat(chosen).double().mean())


WAYS = {
    "mnist": Ways((50, 100, 200, 400, 800), (3e-4, 1e-3), (3e-3, 1e-2), margins=(0.2, 0.5, 1, 2)),
    "cifar10": Ways((200, 400, 800, 1600, 3200, 6400), (1e-3, 3e-3), (3e-3, 1e-2), margins=(1, 2, 3, 5, 10)),
    "gpt2": Ways((100, 200, 400, 800, 1600), (2e-3, 5e-3), (2e-3, 5e-3), (0.05, 0.1), margins=(1, 2, 3, 5, 10)),
    "digits": Ways((10, 20), (3e-3,), (1e-2,), watches=5),
}
"""By task; the last one is for tests and trials."""


def subject(name: str, seed: int, data: Path, trained: Path, tiny: bool = False) -> Subject:
    """A task's trained network: read if it is there, else trained and saved.

    Args:
        name: "mnist", "cifar10", "gpt2" or "digits".
        seed: of the network.
        data: folder of mnist.npz and cifar10.npz.
        trained: folder of the trained networks, "task/seedN" each, and of text.txt.
        tiny: whether the language model is the one for trials.

    Raises:
        DataError: if the data is not there.
    """
    folder = trained / name / f"seed{seed}"
    if name == "gpt2":
        return Characters(Text.read(trained / "text.txt"), TINY if tiny else SMALL, seed, folder, WAYS[name])
    return Images(TaskData.open(tasks()[name], data), seed, folder, WAYS[name])
