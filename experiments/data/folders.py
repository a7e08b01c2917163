"""Images of a folder for each class, read once and kept in memory at one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evolvenet  # noqa: F401  isort: skip  # before torchvision

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from experiments.data.images import DataError, ImageData, Split


class FolderData(ImageData):
    """`root/train/CLASS/*` for training and validation, `root/test/CLASS/*` (or `val`) for test, as torchvision's ImageFolder.

    Labels are the places of the classes in `root/train`, by name; a test split may lack some of them.

    Args:
        root: the folder.
        size: height and width to which every image is scaled, the shorter side first, the middle cut out.
        **options: see `ImageData`.
    """

    def __init__(self, root: str | Path, size: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.size = Path(root).expanduser(), size

    def read(self) -> tuple[Split, Split]:
        """See `ImageData.read`."""
        test = next((name for name in ("test", "val") if (self.root / name).is_dir()), "test")
        train, numbers = self._read("train")
        held, own = self._read(test)
        # ImageFolder numbers the classes of each folder by themselves: those of training are the labels.
        if unknown := sorted(set(own) - set(numbers)):
            raise DataError(
                f"Data: expected classes of {self.root / 'train'} in {self.root / test}, got {', '.join(unknown)} too. Move "
                f"or rename these folders, or add them to {self.root / 'train'}."
            )
        labels = torch.tensor([numbers[name] for name in own])
        return train, Split(held.images, labels[held.labels])

    def _read(self, name: str) -> tuple[Split, dict[str, int]]:
        """The images of a folder, and {class: its label in them}."""
        steps = [v2.Resize(self.size), v2.CenterCrop(self.size), v2.PILToTensor()]
        steps += [v2.Grayscale()] if self.channels == 1 else []
        try:
            found = ImageFolder(str(self.root / name), transform=v2.Compose(steps))
            images, labels = zip(*found, strict=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"Data: expected {self.root / name}/CLASS/ with images, got {type(error).__name__}: {error}. Set data.root."
            ) from error
        return Split(torch.stack(images), torch.tensor(labels)), found.class_to_idx
