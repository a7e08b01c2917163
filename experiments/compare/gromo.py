"""How gromo widens a dense network, for the comparisons: its TINY, layer by layer, with a line search."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALES = tuple(2.0 ** (power / 2) for power in range(-12, 13))
"""Scaling factors that gromo's line search tries, beside 0."""

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Batches of (images, labels)."""


def gromo_tiny(model: nn.Module, pairs: Pairs) -> nn.Module:
    """A dense network with twice the units in each hidden layer, or as many as gromo finds.

    Args:
        model: `Flatten`, then dense layers with ReLU between them, all hidden ones equally wide.
        pairs: (images, labels) for the statistics.
    """
    grown = gromo_of(model, pairs[0][0])
    return gromo_widen(grown, pairs, grown.layers[0].out_features)


def gromo_of(model: nn.Module, images: Tensor) -> Any:
    """A `GrowingMLP` of gromo with the weights of a dense network.

    Args:
        model: `Flatten`, then dense layers with ReLU between them, all hidden ones equally wide.
        images: on which both must give the same outputs.
    """
    dense = [module for module in model.modules() if isinstance(module, nn.Linear)]
    module = importlib.import_module("gromo.containers.growing_mlp")
    shape = dense[0].in_features, dense[-1].out_features, dense[0].out_features, len(dense) - 1
    grown = module.GrowingMLP(*shape, activation=nn.ReLU(), device=torch.device("cpu"))
    with torch.no_grad():
        for theirs, ours in zip(grown.layers, dense, strict=True):
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
        assert torch.allclose(grown(images), model(images), atol=1e-5), "gromo's model is not the same network"
    return grown


def gromo_widen(grown: Any, pairs: Pairs, units: int) -> Any:
    """Give every hidden layer so many units more, or as many as gromo finds; returns the same object.

    The scaling factor scales gromo's update of the present weights and the new units' rows and columns; of `SCALES` and 0
    the one with the least loss on the statistics' batches is taken.

    Args:
        grown: gromo's `GrowingMLP`.
        pairs: (images, labels) for the statistics.
        units: new units for each hidden layer.
    """
    for index in range(len(grown.layers) - 1):
        grown.set_growing_layers(index=index)
        grown.init_computation()
        for images, labels in pairs:
            grown.zero_grad()
            # Summed: gromo's thresholds are for gradients of single samples' losses.
            functional.cross_entropy(grown(images), labels, reduction="sum").backward()
            grown.update_computation()
        grown.compute_optimal_updates(maximum_added_neurons=units)
        grown.reset_computation()
        grown.dummy_select_update()
        grown.set_scaling_factor(_line_search(grown, pairs))
        grown.apply_change()
    grown.zero_grad()
    return grown


def _line_search(grown: Any, pairs: Pairs) -> float:
    """The scaling factor with the least loss."""
    losses = {}
    for scale in (0.0, *SCALES):
        grown.set_scaling_factor(scale)
        with torch.no_grad():
            losses[scale] = sum(float(functional.cross_entropy(grown.extended_forward(x), y)) for x, y in pairs)
    return min(losses, key=lambda scale: losses[scale])


def installed() -> bool:
    """Whether gromo is installed."""
    return importlib.util.find_spec("gromo") is not None


def version() -> str:
    """Its version, for the head of a page."""
    return importlib.metadata.version("gromo") if installed() else "(not installed)"
