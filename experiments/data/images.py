"""Image data sets, each split one uint8 tensor in memory, read and augmented in whole batches."""

from __future__ import annotations

import contextlib
import io
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as images_of

from evolvenet.errors import EvolveNetError

log = logging.getLogger(__name__)


class DataError(EvolveNetError):
    """A data set is missing, cannot be downloaded, or has another layout than expected."""


class Split(NamedTuple):
    """Images, uint8 `[N, channels, height, width]`, and their labels, int64 `[N]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Augment:
    """Random shift, rotation, stretching and mirroring, drawn for each image, the whole batch in one resampling.

    Args:
        shift: largest shift along each axis, pixels.
        rotation: largest angle to either side, degrees.
        flip: mirror half of the images left to right.
        stretch: largest share by which each axis becomes longer or shorter, below 1.

    >>> Augment(shift=2)(torch.ones(4, 1, 8, 8), torch.Generator()).shape
    torch.Size([4, 1, 8, 8])
    """

    shift: int = 0
    rotation: float = 0.0
    flip: bool = False
    stretch: float = 0.0

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Augment float images `[N, channels, height, width]`; pixels from outside the image are 0."""
        if not (self.shift or self.rotation or self.flip or self.stretch):
            return images
        affine = self._affine(len(images), images.shape[-2:], generator).to(images.device)
        grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, align_corners=False)

    def _affine(self, count: int, size: torch.Size, generator: Generator) -> Tensor:
        angle = (torch.rand(count, generator=generator) * 2 - 1) * float(np.deg2rad(self.rotation))
        shift = torch.randint(-self.shift, self.shift + 1, (count, 2), generator=generator)
        mirror = torch.randint(0, 2, (count,), generator=generator) * 2 - 1 if self.flip else torch.ones(count)
        height, width = size
        across = torch.stack([mirror * angle.cos(), -angle.sin(), shift[:, 0] * 2 / width], dim=1)
        down = torch.stack([mirror * angle.sin(), angle.cos(), shift[:, 1] * 2 / height], dim=1)
        affine = torch.stack([across, down], dim=1)
        if self.stretch:
            # The grid maps places of the new image to the old one: twice the length is half the step there.
            lengths = 1 + (torch.rand(count, 1, 2, generator=generator) * 2 - 1) * self.stretch
            affine[:, :, :2] /= lengths
        return affine


class BatchLoader:
    """Batches of a split, drawn by index from one tensor: no workers, no copies of single images.

    The order and the augmentation of an epoch depend on `seed` and the epoch's number alone; Lightning sets the
    number through `sampler`, so that a resumed run gets the same batches as the uninterrupted one.

    Args:
        split: where the batches come from.
        batch_size: images a batch.
        prepare: uint8 images and a random generator → the model's float inputs.
        shuffle: new order every epoch, an incomplete last batch left out; else in order and complete.
        seed: of the order and of the augmentation.

    Raises:
        DataError: if shuffled batches would be larger than the split.
    """

    batch_sampler = None  # Lightning reads it if there is a `sampler`

    def __init__(
        self,
        split: Split,
        batch_size: int,
        prepare: Callable[[Tensor, Generator], Tensor],
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if shuffle and not 1 <= batch_size <= len(split.labels):
            raise DataError(
                f"Data: expected a batch size of 1 to {len(split.labels)} (the images in the training split), "
                f"got {batch_size}. Set data.batch_size."
            )
        self.split, self.batch_size, self.prepare = split, batch_size, prepare
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    @property
    def sampler(self) -> BatchLoader:
        """The loader itself, on which Lightning calls `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.split.labels)
        return count // self.batch_size if self.shuffle else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.split.labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for index in order.split(self.batch_size)[: len(self)]:
            yield self.prepare(self.split.images[index], generator), self.split.labels[index]


class ImageData(lightning.LightningDataModule):
    """Base of the data sets: a held-out validation split, normalisation, the three loaders.

    Args:
        batch_size: images a training batch.
        val_size: images held out of the training split for validation.
        seed: of the held-out split, the order and the augmentation.
        augment: for training batches only; None for none.
        classes: number of labels, which the network is built for.
        channels: of an image.
    """

    def __init__(
        self,
        batch_size: int = 128,
        val_size: int = 5000,
        seed: int = 0,
        augment: Augment | None = None,
        classes: int | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        self.classes, self.channels = classes, channels
        self.augment = augment or Augment()
        self.splits: dict[str, Split] = {}
        self.mean: list[float] = []
        self.std: list[float] = []

    def read(self) -> tuple[Split, Split]:
        """The training split (validation still inside) and the test split.

        Raises:
            DataError: if the data is missing and cannot be downloaded.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the data once, hold out the validation split, and take the pixels' mean and deviation."""
        if self.splits:
            return
        whole, test = self.read()
        self._check(whole, test)
        count = len(whole.labels)
        if not 1 <= self.val_size < count:
            raise DataError(f"Data: expected data.val_size between 1 and {count - 1}, got {self.val_size}.")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        train, val = (Split(whole.images[i], whole.labels[i]) for i in (order[self.val_size :], order[: self.val_size]))
        self.mean, self.std = _moments(train.images)
        self.splits = {"train": train, "val": val, "test": test}

    def _check(self, whole: Split, test: Split) -> None:
        found = int(max(split.labels.max() for split in (whole, test))) + 1 if len(test.labels) else 0
        if self.classes is not None and found > self.classes:
            raise DataError(
                f"Data: expected labels 0 … {self.classes - 1}, got up to {found - 1}. Set data.classes={found}."
            )
        if self.channels is not None and whole.images.shape[1] != self.channels:
            raise DataError(
                f"Data: expected images of {self.channels} channels, got {whole.images.shape[1]}. Set data.channels and a model "
                "that takes them."
            )

    @property
    def example(self) -> Tensor:
        """One image as an input of the model, float `[1, channels, height, width]`."""
        return self.normalise(self.splits["train"].images[:1])

    def normalise(self, images: Tensor) -> Tensor:
        """The uint8 images as float, mean 0 and deviation 1 over the training split, per channel."""
        return images_of.normalize(images_of.to_dtype(images, torch.float32, scale=True), self.mean, self.std)

    def _train_batch(self, images: Tensor, generator: Generator) -> Tensor:
        pixels = images_of.to_dtype(images, torch.float32, scale=True)
        return images_of.normalize(self.augment(pixels, generator), self.mean, self.std)

    def _plain_batch(self, images: Tensor, _: Generator) -> Tensor:
        return self.normalise(images)

    def train_dataloader(self) -> BatchLoader:
        """Shuffled, augmented batches."""
        return BatchLoader(self.splits["train"], self.batch_size, self._train_batch, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> BatchLoader:
        """The held-out part of the training split, in order."""
        return BatchLoader(self.splits["val"], 500, self._plain_batch)

    def test_dataloader(self) -> BatchLoader:
        """The test split, in order."""
        return BatchLoader(self.splits["test"], 500, self._plain_batch)


FOLDS = 5
"""Parts of the digits; one of them is for test."""


class DigitsData(ImageData):
    """scikit-learn's 1,797 handwritten digits, 8 × 8, from inside its wheel; a fifth of them, 359 or 360, for test.

    Args:
        fold: which fifth; the folds 0 to 4 together test every image once. Larger numbers are taken modulo 5.
        **options: see `ImageData`.
    """

    def __init__(self, fold: int = 0, **options) -> None:
        super().__init__(**options)
        self.fold = fold

    def read(self) -> tuple[Split, Split]:
        """See `ImageData.read`."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "Data: the digits come with scikit-learn, which is not installed. In a clone: pip install '.[experiments]'"
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        folds = np.array_split(np.random.default_rng(0).permutation(len(labels)), FOLDS)
        test = folds.pop(self.fold % FOLDS)
        train = np.concatenate(folds)
        return _split(images[train], labels[train]), _split(images[test], labels[test])


class FileData(ImageData):
    """A data set from `root/<name>.npz` in Keras' layout where that file is, else torchvision's download into `root`.

    The file holds `x_train`, `y_train`, `x_test`, `y_test`: uint8 images `[N, height, width]` or
    `[N, height, width, channels]`, and integer labels.

    Args:
        root: the directory.
        **options: see `ImageData`.
    """

    name = ""
    torchvision_name = ""
    remedy = "Delete the file to have it downloaded, or replace it."
    """What to do about a file that cannot be read."""

    def __init__(self, root: str | Path = "data", **options) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()

    def read(self) -> tuple[Split, Split]:
        """See `ImageData.read`."""
        path = self.root / f"{self.name}.npz"
        return self._from_npz(path) if path.is_file() else self._from_torchvision(path)

    def _from_npz(self, path: Path) -> tuple[Split, Split]:
        try:
            with np.load(path) as file:
                return _split(file["x_train"], file["y_train"]), _split(file["x_test"], file["y_test"])
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(
                f"Data: expected {path} to hold x_train, y_train, x_test and y_test (uint8 images, Keras' layout), "
                f"got: {error}. {self.remedy}"
            ) from error

    def _from_torchvision(self, path: Path) -> tuple[Split, Split]:
        from torchvision import datasets

        dataset = getattr(datasets, self.torchvision_name)
        log.info("%s not found, using torchvision's download in %s", path, self.root)
        try:
            # torchvision prints every mirror that it tries; the error below has the reason.
            with contextlib.redirect_stdout(io.StringIO()):
                parts = [dataset(str(self.root), train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Data: {self.name} is not here: no file {path.absolute()}, and torchvision's download into "
                f"{self.root.absolute()} failed ({_one_line(error)}). Put {self.name}.npz (Keras' layout) into a directory "
                "and pass data.root=DIRECTORY, or connect to the internet."
            ) from error
        train, test = (_split(np.asarray(part.data), np.asarray(part.targets)) for part in parts)
        return train, test


class MnistData(FileData):
    """60,000 and 10,000 handwritten digits, 28 × 28 (LeCun et al. 1998)."""

    name = "mnist"
    torchvision_name = "MNIST"


class FashionMnistData(FileData):
    """60,000 and 10,000 pictures of clothes, 28 × 28 (Xiao et al. 2017)."""

    name = "fashion_mnist"
    torchvision_name = "FashionMNIST"


class Cifar10Data(FileData):
    """50,000 and 10,000 photographs of ten kinds of thing, 32 × 32 in colour (Krizhevsky 2009)."""

    name = "cifar10"
    torchvision_name = "CIFAR10"


class Cifar100Data(FileData):
    """50,000 and 10,000 photographs of a hundred kinds of thing, 32 × 32 in colour (Krizhevsky 2009)."""

    name = "cifar100"
    torchvision_name = "CIFAR100"


class NpzData(FileData):
    """Any data set in a file of Keras' layout, see `FileData`.

    Args:
        path: of the file.
        **options: see `ImageData`.
    """

    remedy = "Replace the file, or set data.path to another one."

    def __init__(self, path: str | Path, **options) -> None:
        super().__init__(root=Path(path).expanduser().parent, **options)
        self.path = Path(path).expanduser()

    def read(self) -> tuple[Split, Split]:
        """See `ImageData.read`."""
        if not self.path.is_file():
            raise DataError(f"Data: expected a file, got {self.path.absolute()}, where there is none. Set data.path.")
        return self._from_npz(self.path)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    if images.ndim not in (3, 4) or images.dtype != np.uint8 or labels.size != len(images):
        raise ValueError(f"images {images.dtype} {images.shape} with {labels.size} labels")
    tensor = torch.from_numpy(images)
    channels_first = tensor.movedim(-1, 1).contiguous() if images.ndim == 4 else tensor[:, None]
    return Split(channels_first, torch.from_numpy(labels.astype(np.int64).ravel()))


def _moments(images: Tensor) -> tuple[list[float], list[float]]:
    # Counting the 256 values needs no float copy of the whole split.
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean = (share * values).sum()
        means.append(float(mean))
        deviations.append(float(((values - mean).square() * share).sum().sqrt().clamp(min=1e-6)))
    return means, deviations


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:199]}…"
