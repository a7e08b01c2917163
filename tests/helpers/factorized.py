"""Factorized layers whose ranks have been mixed, as training mixes them, and the closed forms of what their cut costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.lowrank.kinds import kind_named
from evolvenet.lowrank.layers import FactoredLayer, canonical, factored
from evolvenet.surgery.basis_change import along


def seeded(seed: int = 0) -> torch.Generator:
    """A source of random numbers."""
    return torch.Generator().manual_seed(seed)


def decaying(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """The layer in float64 with a random weight whose singular values fall."""
    layer = layer.double()
    weight = layer.get_parameter("weight")
    for dim in range(2):
        share = torch.logspace(0, -1.5, weight.shape[dim], dtype=torch.float64)
        turned = torch.linalg.qr(torch.randn(weight.shape[dim], weight.shape[dim], generator=generator).double())[0]
        drawn = torch.randn(weight.shape, generator=generator).double() if dim == 0 else weight.detach()
        weight.data = along(drawn, turned * share, dim)
    for name, parameter in layer.named_parameters():
        if name == "bias":
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
    return layer


def mix(chain: FactoredLayer, generator: torch.Generator, spread: float = 30.0) -> FactoredLayer:
    """Mix the coordinates of every rank by a random matrix of this condition number; the function stays."""
    for first, second in zip(chain.factors, chain.factors[1:], strict=False):
        made, used = first.get_parameter("weight"), second.get_parameter("weight")
        rows, columns = (int(type(each) is nn.ConvTranspose2d) for each in (first, second))
        size = made.shape[rows]
        one, two = (torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0] for _ in range(2))
        matrix = one @ torch.diag(torch.logspace(0, 1, size, base=spread).double()) @ two
        made.data = along(made.data, matrix, rows)
        used.data = along(used.data, torch.linalg.inv(matrix).mT, 1 - columns)
    return chain


def mixed_chain(
    layer: nn.Module, kind: str, ranks: tuple[int, ...], generator: torch.Generator, spread: float = 30.0
) -> FactoredLayer:
    """A chain in place of a layer without channel groups, its ranks mixed."""
    weight = canonical(layer, layer.get_parameter("weight").detach(), 1)[0]
    return mix(factored(layer, kind, ranks, [kind_named(kind).decompose(weight, ranks)]), generator, spread)


def weight_of(chain: FactoredLayer) -> Tensor:
    """`[out, in, k…]` of the layer that a chain stands for."""
    return canonical(chain.whole(), chain.merged_weight.detach(), 1)[0]


def correlated(count: int, features: int, generator: torch.Generator, *space: int) -> Tensor:
    """Inputs `[count, features, space…]` that are correlated, of unlike sizes, and not about 0."""
    x = torch.randn(count, features, *space, generator=generator).double()
    matrix = torch.randn(features, features, generator=generator).double()
    scale = torch.logspace(0.5, -1, features).double()
    return along(x, scale[:, None] * matrix, 1) + torch.randn(features, *[1] * len(space), generator=generator).double()


def moment_of(x: Tensor, kernel: tuple[int, ...], *, centred: bool) -> Tensor:
    """Second moment, or covariance, of the patches of a convolution without padding; of the rows for a dense layer."""
    rows = functional.unfold(x, kernel).movedim(1, -1).flatten(0, 1) if kernel else x
    rows = rows - rows.mean(0) if centred else rows
    return rows.mT @ rows / len(rows)
