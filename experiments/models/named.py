"""Classifiers of torchvision and timm by their names."""

from __future__ import annotations

from typing import Any

import evolvenet  # noqa: F401  isort: skip  # before torchvision

import torchvision
from torch import Tensor, nn

from evolvenet.errors import EvolveNetError


class ModelNameError(EvolveNetError):
    """No classifier has this name, or the package is not installed."""


class Coloured(nn.Module):
    """Gives a network for images in colour those in grey too, their one channel three times.

    Args:
        network: images `[N, 3, height, width]` → logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1 or 3, height, width]` → logits `[N, classes]`."""
        return self.network(images.expand(-1, 3, -1, -1))


def torchvision_model(name: str, classes: int, weights: str | None = None, **options: Any) -> nn.Module:
    """A classifier of torchvision.

    Args:
        name: such as "resnet18", see `torchvision.models.list_models(module=torchvision.models)`.
        classes: number of logits; with weights, of the 1,000 classes that they know.
        weights: name of trained weights, "DEFAULT" for the best, which torchvision downloads; None for random ones.
        **options: of the model.

    Raises:
        ModelNameError: if there is no such model.

    >>> type(torchvision_model("resnet18", classes=10).network).__name__
    'ResNet'
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelNameError(
            f"Model: expected a classifier of torchvision, got {name!r}. There are {', '.join(known)}."
        )
    given = {} if weights is not None else {"num_classes": classes}
    return Coloured(torchvision.models.get_model(name, weights=weights, **given, **options))


def timm_model(name: str, classes: int, in_channels: int = 3, pretrained: bool = False, **options: Any) -> nn.Module:
    """A classifier of timm.

    Args:
        name: such as "convnext_atto", see `timm.list_models()`.
        classes: number of logits.
        in_channels: of the images.
        pretrained: whether timm downloads trained weights.
        **options: of the model.

    Raises:
        ModelNameError: if there is no such model, or timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelNameError(f"Model: expected timm for model=timm, got {error}. pip install timm") from error
    if not timm.is_model(name.partition(".")[0]):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:10])
        raise ModelNameError(f"Model: expected a classifier of timm, got {name!r}. Similar: {near or 'none'}.")
    return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=in_channels, **options)
