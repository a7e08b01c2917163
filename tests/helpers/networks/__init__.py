"""Small networks of every kind of structure, for the table in `cases`."""

from __future__ import annotations

from tests.helpers.networks.convolutional import (
    Block,
    ConvNet,
    DenseNet,
    GroupNormNet,
    MobileNet,
    ResNet,
    ResNeXt,
    Sounds,
    SqueezeExcite,
    SuperResolution,
    Volumes,
    factorized,
)
from tests.helpers.networks.dense import Gated, LayerNormMlp, Mlp, Reused
from tests.helpers.networks.encoder_decoder import EncoderDecoder
from tests.helpers.networks.sequences import Attention, BagOfWords, Recurrent, transformer
from tests.helpers.networks.unusual import Auxiliary, HardCoded, InPlace, Locked, OwnParameters, Peeking, TwoInputs

__all__ = [
    "Attention",
    "Auxiliary",
    "BagOfWords",
    "Block",
    "ConvNet",
    "DenseNet",
    "EncoderDecoder",
    "Gated",
    "GroupNormNet",
    "HardCoded",
    "InPlace",
    "LayerNormMlp",
    "Locked",
    "Mlp",
    "MobileNet",
    "OwnParameters",
    "Peeking",
    "Recurrent",
    "ResNeXt",
    "ResNet",
    "Reused",
    "Sounds",
    "SqueezeExcite",
    "SuperResolution",
    "TwoInputs",
    "Volumes",
    "factorized",
    "transformer",
]
