"""Layers in every geometry, with inputs: what a factorized layer must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYERS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "dense": (nn.Linear, (7, 5), {}),
    "dense without bias": (nn.Linear, (5, 7), {"bias": False}),
    "conv1d": (nn.Conv1d, (6, 4, 3), {"stride": 2, "padding": 1}),
    "conv1d reflected": (nn.Conv1d, (4, 6, 5), {"padding": 2, "padding_mode": "reflect"}),
    "plain": (nn.Conv2d, (4, 6, 3), {}),
    "stride per axis": (nn.Conv2d, (4, 6, 3), {"stride": (2, 1), "padding": (0, 2)}),
    "kernel per axis": (nn.Conv2d, (4, 5, (3, 5)), {"stride": (1, 3), "padding": (2, 1), "bias": False}),
    "dilation per axis": (nn.Conv2d, (4, 6, (3, 2)), {"dilation": (1, 2), "padding": (1, 2)}),
    "same, even kernel": (nn.Conv2d, (4, 6, (4, 3)), {"padding": "same", "dilation": (1, 2)}),
    "valid": (nn.Conv2d, (4, 6, 3), {"padding": "valid", "stride": 2}),
    "reflect": (nn.Conv2d, (4, 6, 3), {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2)}),
    "replicate": (nn.Conv2d, (4, 6, 3), {"padding": (1, 2), "padding_mode": "replicate"}),
    "circular, same": (nn.Conv2d, (4, 6, (3, 4)), {"padding": "same", "padding_mode": "circular"}),
    "grouped": (nn.Conv2d, (6, 8, 3), {"groups": 2, "padding": 1}),
    "depthwise": (nn.Conv2d, (4, 8, 5), {"groups": 4, "padding": 2, "bias": False}),
    "1x1": (nn.Conv2d, (6, 5, 1), {"stride": 2, "padding": 1}),
    "conv3d": (nn.Conv3d, (3, 4, (2, 3, 2)), {"stride": (1, 2, 1), "padding": (1, 0, 1)}),
    "transposed 1d": (nn.ConvTranspose1d, (6, 4, 4), {"stride": 2, "padding": 1}),
    "transposed": (
        nn.ConvTranspose2d,
        (4, 6, (3, 4)),
        {"stride": (2, 3), "padding": (1, 2), "output_padding": (1, 2), "dilation": (2, 1)},
    ),
    "transposed grouped": (nn.ConvTranspose2d, (4, 6, 3), {"groups": 2, "stride": 2, "bias": False}),
    "transposed 3d": (nn.ConvTranspose3d, (3, 2, 2), {"stride": (2, 1, 2), "output_padding": (1, 0, 0)}),
}
"""{name: (type, sizes, options)}."""


def layer_and_inputs(name: str, samples: int = 3) -> tuple[nn.Module, Tensor]:
    """A layer of `LAYERS` in float64, in eval mode, with inputs; the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    kind, sizes, options = LAYERS[name]
    layer = kind(*sizes, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    spaces: dict[str, tuple[int, ...]] = {"1d": (11,), "2d": (9, 8), "3d": (5, 6, 7)}
    space = spaces.get(kind.__name__[-2:], ())
    return layer, torch.randn(samples, sizes[0], *space, generator=generator, dtype=torch.float64)
