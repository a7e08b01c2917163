"""What the tests know of a module of the zoo, and the small data sets that its modules train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

BATCHES, BATCH = 6, 64


@dataclass(frozen=True)
class Entry:
    """A module of the zoo.

    Args:
        module: makes it.
        cut: names of submodules each of which must have fewer parameters after the fit.
        stays: {name of a width: a part of the reason why it keeps its size}.
        skipped: the beginning of the reason why its events fail today; "" where none may fail.
        not_exported: a part of the error that torch raises for the module as it is written; "" where it exports.
    """

    module: Callable[[], LightningModule]
    cut: tuple[str, ...] = ()
    stays: Mapping[str, str] = field(default_factory=dict)
    skipped: str = ""
    not_exported: str = ""


def loader(*tensors: Tensor) -> DataLoader[Any]:
    """Batches in another order at each epoch, which depends on the epoch alone: a resumed run gets the same ones."""
    data = TensorDataset(*tensors)
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, 1, 0), generator=torch.Generator())


def points(features: int = 16) -> tuple[Tensor, Tensor]:
    """Points near a plane of four dimensions, in three classes."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCHES * BATCH, 4, generator=generator)
    x = hidden @ torch.randn(4, features, generator=generator)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return x, (hidden[:, 0] > 0).long() + (hidden[:, 1] > 0).long()


def images(channels: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    """Blurred blobs, with the quarter that the blob lies in as class."""
    generator = torch.Generator().manual_seed(2)
    count = BATCHES * BATCH
    centre = torch.rand(count, 2, generator=generator) * size
    grid = torch.arange(size) + 0.5
    rows = torch.exp(-0.3 * (grid - centre[:, :1]) ** 2)
    columns = torch.exp(-0.3 * (grid - centre[:, 1:]) ** 2)
    x = (rows[:, :, None] * columns[:, None, :])[:, None].repeat(1, channels, 1, 1)
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    return x, (centre[:, 0] > size / 2).long() * 2 + (centre[:, 1] > size / 2).long()


def tokens(length: int = 8, vocabulary: int = 12) -> Tensor:
    """Sequences that count upwards by one or two, modulo the vocabulary; 0 and 1 do not occur."""
    generator = torch.Generator().manual_seed(3)
    count = BATCHES * BATCH
    start = torch.randint(vocabulary - 2, (count, 1), generator=generator)
    step = torch.randint(1, 3, (count, 1), generator=generator)
    return (start + step * torch.arange(length)) % (vocabulary - 2) + 2


def waves(length: int = 24, channels: int = 2) -> Tensor:
    """Noisy sines of several frequencies, [sample, time, channel]."""
    generator = torch.Generator().manual_seed(4)
    count = BATCHES * BATCH
    phase = 6.28 * torch.rand(count, 1, channels, generator=generator)
    frequency = 0.2 + 0.5 * torch.rand(count, 1, channels, generator=generator)
    time = torch.arange(length, dtype=torch.float32)[None, :, None]
    return torch.sin(phase + frequency * time) + 0.05 * torch.randn(count, length, channels, generator=generator)
