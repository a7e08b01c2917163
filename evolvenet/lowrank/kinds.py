"""All kinds of factorization, by name."""

from __future__ import annotations

from collections.abc import Mapping

from evolvenet.errors import FactorizationError
from evolvenet.lowrank.base import Kind, LayerShape
from evolvenet.lowrank.cp import Cp
from evolvenet.lowrank.slicewise import Slicewise
from evolvenet.lowrank.spatial import Spatial
from evolvenet.lowrank.svd import Svd
from evolvenet.lowrank.tensor_train import TensorTrain
from evolvenet.lowrank.tucker import Tucker

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (Svd(), Spatial(), Slicewise(), Tucker(), Cp(), TensorTrain())}
"""{name: kind}."""

FEW_INPUTS = 8
"""Inputs of a channel group below which a convolution's input channels are not reduced by "auto"."""


def kind_named(name: str) -> Kind:
    """The kind of a name.

    Raises:
        FactorizationError: if there is none.

    >>> kind_named("svd").name
    'svd'
    """
    if name not in KINDS:
        raise FactorizationError(f"Kinds: expected one of {', '.join(KINDS)} or 'auto', got {name!r}.")
    return KINDS[name]


def candidates(shape: LayerShape) -> tuple[Kind, ...]:
    """The kinds that "auto" selects from: SVD for dense layers and kernels of 1, Tucker-2 or spatial SVD for others.

    Where there are few inputs channel SVD takes the place of Tucker-2.

    >>> [kind.name for kind in candidates(LayerShape(64, 64, (3, 3)))]
    ['tucker', 'spatial']
    >>> [kind.name for kind in candidates(LayerShape(64, 3, (3, 3)))]
    ['svd', 'spatial']
    """
    if shape.places == 1:
        return (KINDS["svd"],)
    channels = KINDS["svd" if shape.inputs < FEW_INPUTS else "tucker"]
    split = KINDS["spatial"]
    wide = sum(size > 1 for size in shape.kernel)
    return (channels,) if wide < 2 or split.refusal(shape) else (channels, split)
