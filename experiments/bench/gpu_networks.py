"""The networks of `experiments.bench.gpu`, built without files from outside, and small ones in their place for a try."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # before torchvision

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VisionTransformer

from experiments.models.resnet import ResNet


@dataclass(frozen=True)
class Subject:
    """A network to train on random data.

    Args:
        make: the network.
        draw: a batch and its labels, of so many samples.
        batch: samples of a batch.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    batch: int


class Repeated(Dataset[tuple[Tensor, Tensor]]):
    """An epoch that repeats a few batches, which lie on the device: loading them takes no time.

    Args:
        batches: (inputs, labels).
        length: batches of an epoch.
    """

    def __init__(self, batches: list[tuple[Tensor, Tensor]], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index % len(self.batches)]

    @classmethod
    def loader(cls, subject: Subject, device: torch.device, length: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """A loader of a subject's batches."""
        torch.manual_seed(0)
        drawn = [subject.draw(subject.batch) for _ in range(4)]
        return DataLoader(cls([(x.to(device), y.to(device)) for x, y in drawn], length), batch_size=None)


class Training(LightningModule):
    """Trains a subject's network by AdamW.

    Args:
        subject: the network and its data.
        backend: of `torch.compile`; None to run the network as it is.
    """

    def __init__(self, subject: Subject, backend: str | None = None) -> None:
        super().__init__()
        network = subject.make()
        self.network: Any = network if backend is None else torch.compile(network, backend=backend)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of what the network predicts for each label."""
        inputs, labels = batch
        predicted = self.network(inputs)
        scores = predicted if isinstance(predicted, Tensor) else predicted.logits
        return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def images(side: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Draws random images with random labels."""
    return lambda count: (torch.randn(count, 3, side, side), torch.randint(classes, (count,)))


def texts(words: int, length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Draws random texts; the label of each word is the next one."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(words, (count, length + 1))
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    return draw


def llama(layers: int, hidden: int, inner: int, heads: int, words: int) -> nn.Module:
    """A LLaMA of the transformers library; with 14, 768, 2048, 12, 32000 it has 148 million parameters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


SUBJECTS = {
    "resnet50": Subject(torchvision.models.resnet50, images(224, 1000), 64),
    "vit_b_16": Subject(torchvision.models.vit_b_16, images(224, 1000), 64),
    "llama_150m": Subject(lambda: llama(14, 768, 2048, 12, 32_000), texts(32_000, 512), 8),
}
SMALL_SUBJECTS = {
    "resnet50": Subject(lambda: ResNet(3, 10, (4, 6, 8)), images(32, 10), 8),
    "vit_b_16": Subject(lambda: VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=10), images(32, 10), 8),
    "llama_150m": Subject(lambda: llama(1, 16, 32, 2, 50), texts(50, 8), 8),
}
