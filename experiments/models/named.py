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
        classes: number of logits.
        weights: name of trained weights, "DEFAULT" for the best, which torchvision downloads; None for random ones. Where they
            have another number of classes (1,000 of ImageNet), the last layer is a new one with random weights.
        **options: of the model.

    Raises:
        ModelNameError: if there is no such model, or its last layer cannot be replaced.

    >>> type(torchvision_model("resnet18", classes=10).network).__name__
    'ResNet'
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelNameError(
            f"Model: expected a classifier of torchvision, got {name!r}. There are {', '.join(known)}."
        )
    given = {} if weights is not None else {"num_classes": classes}
    network = torchvision.models.get_model(name, weights=weights, **given, **options)
    return Coloured(network if weights is None else with_classes(network, classes))


def with_classes(network: nn.Module, classes: int) -> nn.Module:
    """A classifier whose last dense layer is a new one, unless it has as many logits already; changed in place.

    Args:
        network: of torchvision, where the last dense layer gives the logits.
        classes: number of logits.

    Raises:
        ModelNameError: if it has no dense layer.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise ModelNameError(
            f"Model: expected a classifier with a dense layer at its end, whose logits could become {classes}, got "
            f"{type(network).__name__} without one. Set model.weights=null, or take another model."
        )
    name, last = list(layers.items())[-1]
    if last.out_features != classes:
        network.set_submodule(name, nn.Linear(last.in_features, classes, bias=last.bias is not None))
    return network


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
